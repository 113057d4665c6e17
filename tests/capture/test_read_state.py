"""What the forward of an island reads, other code may change: around a call or between calls."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxrep
from support.check import randomize
from support.readers import MEMBERS, Block
from support.saving import saved

from .test_guards import norms


class Above(nn.Module):
    """Decides on a value, calls the block, and calls it with another scale."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 1e3:
            return x
        first = self.block(x)
        undo = self.block.change()
        try:
            second = self.block(x)
        finally:
            undo()
        return first + 2 * second + self.block(x)


class Calling(Above):
    """Decides on a value, and calls the block."""

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) if x.mean() < 1e3 else x


def same(model: nn.Module, fast: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        for _ in range(2):
            expected, got = model(x), fast(x)
            assert got.dtype == expected.dtype
            assert torch.allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("name", MEMBERS)
def test_state_that_code_above_changes_around_a_call(name: str) -> None:
    model, x = randomize(Above(MEMBERS[name]())).eval(), torch.randn(2, 4, 5, 5)
    same(model, fxrep.optimize(model), x)


COUNTED = {name for name in MEMBERS if "in place" in name}  # a version never goes back


def copied(model: Any) -> Any:
    return copy.deepcopy(model)


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize(
    "way", [None, copied, pickled, saved], ids=["itself", "copied", "pickled", "saved"]
)
@pytest.mark.parametrize("name", MEMBERS)
def test_state_that_changes_between_calls(name: str, way: Any) -> None:
    model, x = randomize(Calling(MEMBERS[name]())).eval(), torch.randn(2, 4, 5, 5)
    fast: Any = fxrep.optimize(model)
    if way is not None:
        fast = way(fast)
    for _ in range(2):
        undos = [each.block.change() for each in (model, fast)]
        same(model, fast, x)
        for undo in reversed(undos):
            undo()
        same(model, fast, x)
    if name not in COUNTED:  # the graph stands for the block again
        assert norms(fast, x) == 0


@pytest.mark.parametrize("name", MEMBERS)
def test_what_is_read_is_no_reason_not_to_fold(name: str) -> None:
    model, x = randomize(Calling(MEMBERS[name]())).eval(), torch.randn(2, 4, 5, 5)
    fast = fxrep.optimize(model)
    assert norms(fast, x) == 0, str(fxrep.report(fast))
