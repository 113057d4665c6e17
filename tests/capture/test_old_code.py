"""Spellings of older libraries: `Variable`, and tables that a forward looks up by a rank."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, autograd, nn
from torch.autograd import Variable

import fxrep
from support.check import randomize

FORWARDS: dict[str, Callable[[Any, Tensor], Any]] = {
    "a Variable of a buffer": lambda m, x: m.body(torch.index_select(x, 1, Variable(m.order))),
    "a Variable of a value": lambda m, x: m.body(Variable(x)) * 2,
    "by the name of its module": lambda m, x: m.body(
        autograd.Variable(x, requires_grad=False) + autograd.Variable(torch.ones(1))
    ),
    "every tensor is a Variable": lambda m, x: m.body(x) * (2 if isinstance(x, Variable) else 3),
    "or one of several classes": lambda m, x: (
        m.body(x) * (2 if isinstance(x, (int, Variable)) else 3)
    ),
    "a table by rank": lambda m, x: m.body(x) * m.table[m.body(x).ndim],
    "with a default": lambda m, x: m.body(x) * m.table.get(m.body(x).dim(), 7.0),
    "a set of ranks": lambda m, x: m.body(x) * (2 if m.body(x).ndim in {3, 4} else 3),
    "the size": lambda m, x: m.body(x) * m.table.get(m.body(x).shape[1], 7.0),
}


@functools.lru_cache
def doubled(number: int) -> float:
    return number * 2.0


# The results of a cache are taken out of it after the trace.
CACHED: dict[str, Callable[[Any, Tensor], Any]] = {
    "a cache by rank": lambda m, x: m.body(x) * doubled(m.body(x).ndim),
    "a cache by size": lambda m, x: m.body(x) * doubled(x.shape[-1]),
}
OF_SIZES: dict[str, Callable[[Any, Tensor], Any]] = {
    "a table by size": lambda m, x: m.body(x) * m.table.get(x.shape[-1], 7.0),
    "a set of sizes": lambda m, x: m.body(x) * (2 if x.shape[-1] in {5, 6} else 3),
}


class Old(nn.Module):
    order: Tensor

    def __init__(self, does: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.body = randomize(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
        self.register_buffer("order", torch.tensor([3, 2, 1, 0]))
        self.table, self.does = {2: 1.0, 3: 2.0, 4: 3.0, 5: 4.0}, does

    def forward(self, x: Tensor) -> Any:
        return self.does(self, x)


def made(forward: Callable[[Any, Tensor], Any]) -> Any:
    return Old(forward).eval()


@pytest.mark.parametrize("examples", [False, True], ids=["", "example inputs"])
@pytest.mark.parametrize("name", [*FORWARDS, *OF_SIZES, *CACHED])
def test_it_folds(name: str, examples: bool) -> None:
    model = made({**FORWARDS, **OF_SIZES, **CACHED}[name])
    optimized = fxrep.optimize(model, torch.randn(1, 4, 5, 5) if examples else None)
    for size in (5, 6, 7, 5):
        x = torch.randn(2, 4, size, size)
        torch.testing.assert_close(optimized(x), model(x), rtol=1e-4, atol=1e-4)
    if name in FORWARDS or (examples and name in OF_SIZES):
        assert fxrep.report(optimized).rewrites, fxrep.report(optimized)
    assert model.table == {2: 1.0, 3: 2.0, 4: 3.0, 5: 4.0}


def test_a_table_that_grows_by_size() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        y = m.body(x)
        if y.shape[-1] not in m.table:
            m.table[y.shape[-1]] = float(y.shape[-1])
        return y * m.table[y.shape[-1]]

    model = made(forward)
    for examples in (None, torch.randn(1, 4, 5, 5), torch.randn(1, 4, 9, 9)):
        optimized = fxrep.optimize(model, examples)
        assert list(model.table) == [2, 3, 4, 5]
        for size in (5, 9, 7, 9):
            x = torch.randn(1, 4, size, size)
            expected = model.body(x) * {5: 4.0}.get(size, float(size))
            torch.testing.assert_close(optimized(x), expected, rtol=1e-4, atol=1e-4)
