"""What a layer computes, read from its attributes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

import fxrep
from support.check import randomize

N: Callable[[int], int] = np.int64  # type: ignore[assignment]


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv1d(4, 8, N(3), padding=N(1)),
        nn.Conv2d(4, 8, (N(3), N(3)), (N(2), N(1)), (N(1), N(0)), (N(1), N(1)), N(2)),
        nn.Conv3d(4, 4, 3, np.array([1, 2, 2]).tolist(), (N(1), N(1), N(1))),
        nn.ConvTranspose2d(4, 8, N(3), N(2), N(1), N(1), N(2)),
    ],
    ids=lambda conv: type(conv).__name__,
)
def test_integers_of_numpy(conv: nn.Module) -> None:
    rank = conv.weight.dim() - 2
    norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[rank]
    model = randomize(nn.Sequential(conv, norm(conv.out_channels))).eval()  # type: ignore[arg-type]
    x = torch.randn(2, 4, *[8] * rank)
    fast = fxrep.optimize(model)
    assert [type(each) for each in fast.children()] == [type(conv)], str(fxrep.report(fast))
    assert torch.allclose(fast(x), model(x), atol=1e-5)
