"""Parts of a model that TorchScript compiled: they are called as they are."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxrep
from support.check import randomize
from support.models import Body


class Branches(nn.Module):
    """Control flow on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if bool(y.sum() > 0):
            return y
        return y * 2

    @torch.jit.export
    def other(self, x: Tensor) -> Tensor:
        return self.conv(x) * 3


def plain() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()


X = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))

SCRIPTED: dict[str, Callable[[], Any]] = {
    "scripted": lambda: torch.jit.script(plain()),
    "traced": lambda: torch.jit.trace(plain(), X),
    "branches": lambda: torch.jit.script(Branches().eval()),
    "frozen": lambda: torch.jit.freeze(torch.jit.script(plain())),
    "for inference": lambda: torch.jit.optimize_for_inference(torch.jit.script(plain())),
    "a layer": lambda: torch.jit.script(nn.Conv2d(3, 4, 3).eval()),
}


def undecided(m: Any, x: Tensor) -> Any:
    return x if x.sum() > 1e9 else m.rest(m.part(x))


USES: dict[str, Callable[[Any, Tensor], Any]] = {
    "called": lambda m, x: m.bn(m.conv(m.part(x))),
    "its forward": lambda m, x: m.bn(m.conv(m.part.forward(x))),
    "below Python code": undecided,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("examples", [False, True], ids=["", "example inputs"])
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", SCRIPTED)
def test_a_scripted_part(name: str, use: str, examples: bool) -> None:
    conv, bn = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
    rest = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    model = Body(USES[use], part=SCRIPTED[name](), conv=conv, bn=bn, rest=rest).eval()
    for each in (bn, rest[1]):
        randomize(each)
    optimized = fxrep.optimize(model, X if examples else None)
    torch.testing.assert_close(optimized(X), model(X), rtol=1e-4, atol=1e-4)
    assert fxrep.report(optimized).rewrites, "the BatchNorm"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.bn(m.conv(F.relu(getattr(m.part, "0")(x)))),
        lambda m, x: m.bn(m.conv(m.part(x))) * getattr(m.part, "0").weight.sum(),
        lambda m, x: m.bn(m.conv(m.part(x))) * float(m.part.training),
        lambda m, x: m.bn(m.conv(m.branches.other(x))),
    ],
    ids=["its child", "its weight", "its flag", "its method"],
)
def test_what_a_scripted_part_holds(forward: Callable[[Any, Tensor], Any]) -> None:
    part, branches = SCRIPTED["scripted"](), SCRIPTED["branches"]()
    bn = randomize(nn.BatchNorm2d(4))
    model = Body(forward, part=part, branches=branches, conv=nn.Conv2d(4, 4, 3), bn=bn).eval()
    torch.testing.assert_close(fxrep.optimize(model)(X), model(X), rtol=1e-4, atol=1e-4)


def test_a_scripted_function() -> None:
    scripted = torch.jit.script(_doubled)
    model = Body(lambda m, x: m.a(scripted(x)), a=nn.Conv2d(3, 4, 3)).eval()
    torch.testing.assert_close(fxrep.optimize(model)(X), model(X))


def _doubled(x: Tensor) -> Tensor:
    return x * 2 if bool(x.sum() > 0) else x


class Locked(nn.Sequential):
    """A class that says how it is copied, as it holds what has no copy."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.lock = threading.Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> Locked:
        made = Locked(*(copy.deepcopy(each, memo) for each in self))
        return made.train(self.training)


def test_a_part_that_copies_itself() -> None:
    model = nn.Sequential(Locked(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.Conv2d(4, 4, 3)).eval()
    optimized = fxrep.optimize(model)
    torch.testing.assert_close(optimized(X), model(X))
    copy.deepcopy(optimized)
