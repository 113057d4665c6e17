"""Layers without inputs or outputs, which torch allows: they stay, and nothing raises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxrep
from support.models import Body

EMPTY: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "no inputs": (lambda: nn.Sequential(nn.Linear(0, 4), nn.Linear(4, 3)), (2, 0)),
    "nothing between": (lambda: nn.Sequential(nn.Linear(4, 0), nn.Linear(0, 3)), (2, 4)),
    "no outputs": (lambda: nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 0)), (2, 4)),
    "neither": (lambda: nn.Sequential(nn.Linear(0, 4), nn.Linear(4, 0)), (2, 0)),
    "nothing at all": (lambda: nn.Sequential(nn.Linear(0, 0), nn.Linear(0, 0)), (2, 0)),
    "linear, BatchNorm": (lambda: nn.Sequential(nn.Linear(0, 4), nn.BatchNorm1d(4)), (2, 0)),
    "no weights, BatchNorm": (lambda: nn.Sequential(nn.Linear(4, 0), nn.BatchNorm1d(0)), (2, 4)),
    "BatchNorm, convolution": (
        lambda: nn.Sequential(nn.BatchNorm2d(0), nn.Conv2d(0, 4, 3)), (2, 0, 5, 5),
    ),
    "convolution of nothing": (lambda: nn.Sequential(nn.Conv2d(0, 4, 1)), (2, 0, 5, 5)),
    "convolution to nothing": (
        lambda: nn.Sequential(nn.Conv2d(3, 0, 1), nn.Conv2d(0, 4, 1)), (2, 3, 5, 5),
    ),
    "one axis": (lambda: nn.Sequential(nn.Conv1d(3, 0, 1), nn.BatchNorm1d(0)), (2, 3, 5)),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(3, 0, 2), nn.BatchNorm2d(0)), (2, 3, 5, 5),
    ),
    "a sum": (
        lambda: Body(
            lambda m, x: m.a(x) + m.b(x), a=nn.Conv2d(0, 4, 1), b=nn.Conv2d(0, 4, 3, padding=1)
        ),
        (2, 0, 5, 5),
    ),
    "a concatenation": (
        lambda: Body(
            lambda m, x: m.b(torch.cat([m.a(x[:, :0]), x], 1)),
            a=nn.Conv2d(0, 1, 1), b=nn.Conv2d(4, 4, 1),
        ),
        (2, 3, 5, 5),
    ),
    "siblings": (
        lambda: Body(
            lambda m, x: (m.a(x), m.b(x)), a=nn.Conv2d(0, 4, 1), b=nn.Conv2d(0, 2, 1)
        ),
        (2, 0, 5, 5),
    ),
    "scaled": (
        lambda: Body(lambda m, x: m.a(x) * m.scale, a=nn.Linear(3, 0),
                     scale=nn.Parameter(torch.ones(0))),
        (2, 3),
    ),
    "pooled": (
        lambda: nn.Sequential(nn.Conv2d(3, 0, 1), nn.AvgPool2d(2), nn.Conv2d(0, 3, 1)),
        (2, 3, 4, 4),
    ),
    "a split": (
        lambda: Body(lambda m, x: m.b(m.a(x).split([0, 4], 1)[1]), a=nn.Conv2d(3, 4, 1),
                     b=nn.Conv2d(4, 4, 1)),
        (2, 3, 5, 5),
    ),
}  # fmt: skip


def answer(model: nn.Module, x: Tensor) -> Any:
    """The result, or the error: torch itself refuses some of these."""
    try:
        return model(x)
    except (RuntimeError, IndexError) as error:
        return str(error)


@pytest.mark.parametrize("cost", ["macs", "always"])
@pytest.mark.parametrize("name", EMPTY)
def test_layers_without_channels(name: str, cost: str) -> None:
    make, shape = EMPTY[name]
    model, x = make().eval(), torch.randn(shape)
    expected = answer(model, x)
    optimized = fxrep.optimize(model, None if isinstance(expected, str) else x, cost=cost)
    got = answer(optimized, x)
    if isinstance(expected, str):
        assert got == expected
    else:
        torch.testing.assert_close(got, expected)
