"""The dtype of the layers that fxrep makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxrep
from support.check import randomize
from support.models import Body


def pooled(x: Tensor) -> Tensor:
    return F.avg_pool2d(F.avg_pool2d(x, 2), 2)


# Pooling alone becomes a convolution if the cost model allows everything: in the dtype of its
# operand, whatever the dtype of the layers.
POOLINGS: dict[str, Callable[[Any, Tensor], Any]] = {
    "converted": lambda m, x: m.c(F.relu(pooled(m.b(m.a(x)).double()))),
    "after a function": lambda m, x: m.c(F.relu(pooled(torch.sigmoid(m.a(x).double())))),
    "after a layer": lambda m, x: pooled(F.relu(m.c(m.a(x).double()))),
    "after arithmetic": lambda m, x: pooled(F.relu(m.c(m.a(x).double()) * 2 + 1)),
    "in the first dtype": lambda m, x: pooled(F.relu(m.a(x))),
    "by modules": lambda m, x: m.c(F.relu(m.e(m.d(F.relu(m.a(x)).double())))),
    "in a dtype of no layer": lambda m, x: pooled(F.relu(m.a(x)).bfloat16()).float(),
    "not known": lambda m, x: pooled(m.a(x).to(m.c.weight.dtype).cumsum(1).to(torch.float64)),
}


@pytest.mark.parametrize("examples", [False, True], ids=["", "example inputs"])
@pytest.mark.parametrize("name", POOLINGS)
def test_pooling_keeps_its_dtype(name: str, examples: bool) -> None:
    model = randomize(
        Body(
            POOLINGS[name], a=nn.Conv2d(3, 4, 1), b=nn.BatchNorm2d(4),
            c=nn.Conv2d(4, 4, 1).double(), d=nn.AvgPool2d(2), e=nn.AvgPool2d(2),
        ).eval()
    )  # fmt: skip
    x = torch.randn(2, 3, 16, 16)
    optimized = fxrep.optimize(model, x if examples else None, cost="always")
    torch.testing.assert_close(optimized(x), model(x), rtol=1e-4, atol=1e-4)
