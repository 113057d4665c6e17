"""Models with code of their own for copies, which may use the copies of other modules."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxrep
from support.check import randomize


def used(module: nn.Module) -> nn.Module:
    """What code for copies may do with a copy."""
    repr(module), list(module.parameters()), module.train(module.training)
    return module


class Deep(nn.Sequential):
    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        layers = (used(copy.deepcopy(each, memo)) for each in self)
        return used(Deep(*layers).train(self.training))


def rebuilt(layers: list[nn.Module], training: bool) -> nn.Module:
    return used(Reduced(*map(used, layers)).train(training))


class Reduced(nn.Sequential):
    def __reduce_ex__(self, protocol: Any) -> Any:
        return rebuilt, (list(self.children()), self.training)


class WithState(nn.Sequential):
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        used(self)


class Holder:
    """No module, but its copy uses one."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __deepcopy__(self, memo: dict[int, Any]) -> Holder:
        return Holder(used(copy.deepcopy(self.module, memo)))


class Holding(nn.Module):
    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.layer, self.holder = conv(), Holder(other)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


def conv() -> nn.Module:
    return nn.Conv2d(4, 4, 1)


def folds() -> nn.Module:
    return nn.Sequential(conv(), nn.BatchNorm2d(4))


def holding(first: bool) -> nn.Module:
    other = folds()
    pair = [other, nn.Sequential(Holding(other))]
    return nn.Sequential(*(pair if first else reversed(pair)))


def shared() -> nn.Module:
    layer = conv()
    return nn.Sequential(layer, Deep(layer, nn.BatchNorm2d(4)), layer, folds())


MODELS: dict[str, Callable[[], nn.Module]] = {
    "__deepcopy__": lambda: nn.Sequential(Deep(conv(), nn.BatchNorm2d(4)), conv()),
    "__reduce_ex__": lambda: nn.Sequential(Reduced(conv(), nn.BatchNorm2d(4)), conv()),
    "__setstate__": lambda: nn.Sequential(WithState(conv(), nn.BatchNorm2d(4)), conv()),
    "one in the other": lambda: nn.Sequential(Deep(Reduced(conv(), nn.BatchNorm2d(4)), Deep())),
    "the root": lambda: Deep(conv(), nn.BatchNorm2d(4)),
    "an object, of a module before": lambda: holding(True),
    "an object, of a module behind": lambda: holding(False),
    "a shared layer": shared,
}


@pytest.mark.parametrize("examples", [False, True], ids=["", "examples"])
@pytest.mark.parametrize("name", MODELS)
def test_copies_of_other_modules_are_whole(name: str, examples: bool) -> None:
    torch.manual_seed(0)
    model, x = randomize(MODELS[name]()).eval(), torch.randn(2, 4, 5, 5)
    fast = fxrep.optimize(model, x if examples else None)
    assert fxrep.report(fast).rewrites
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
