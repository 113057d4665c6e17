"""Classes that say themselves what a call is: the forward is fused, the call stays theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxrep
from support.check import randomize, untouched


class Doubled(nn.Sequential):
    def __call__(self, x: Tensor) -> Any:
        return super().__call__(x) * 2


class ReadsAWeight(nn.Sequential):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs) + self[0].weight.sum()


class PassesTheForward(nn.Sequential):
    def __call__(self, x: Tensor) -> Any:
        return self.forward(x) * 3


class CallsItsLayers(nn.Sequential):
    def __call__(self, x: Tensor) -> Any:
        return x if x.sum() > 1e9 else self[1](self[0](x))


class Another(nn.Sequential):
    scale = 3

    def __call__(self, x: Tensor) -> Any:
        return self.other(x)

    def other(self, x: Tensor) -> Any:
        return self.forward(x) * self.scale


class Several(nn.Sequential):
    def __call__(self, x: Tensor) -> Any:
        return super().__call__(x), x


class Implementation(nn.Sequential):
    def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
        return super()._call_impl(*args, **kwargs) * 4


class OfTheInstance(nn.Sequential):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.__dict__["_call_impl"] = Times(self)


class Times:
    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, x: Tensor) -> Any:
        return self.module.forward(x) * 5


class Undecided(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return x if x.sum() > 1e9 else self.inner(x)


KINDS: list[Callable[..., nn.Module]] = [
    Doubled, ReadsAWeight, PassesTheForward, CallsItsLayers, Another, Several, Implementation,
    OfTheInstance,
]  # fmt: skip
PLACES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "root": lambda module: module,
    "inside": lambda module: nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), module),
    "below Python code": Undecided,
}


@pytest.mark.parametrize("examples", [False, True], ids=["", "example inputs"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_its_own_call(kind: Callable[..., nn.Module], place: str, examples: bool) -> None:
    inner = kind(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model = randomize(PLACES[place](inner).eval())
    x = torch.randn(2, 3, 6, 6)
    optimized = untouched(model, lambda: fxrep.optimize(model, x if examples else None))
    torch.testing.assert_close(optimized(x), model(x), rtol=1e-4, atol=1e-4)


def test_the_forward_is_fused() -> None:
    model = randomize(Doubled(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval())
    optimized = fxrep.optimize(model)
    assert type(optimized) is Doubled
    assert len(fxrep.report(optimized).rewrites) == 1
