"""Questions about ranks and channels that have one answer, whatever the inputs are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxrep
from support.check import settled

Forward = Callable[[Any, Tensor], Any]


class Asking(nn.Module):
    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.lone = nn.Conv2d(3, 4, 1)
        self.first, self.same, self.wide = block(3, 4), block(4, 4), block(4, 8)
        self.run = [forward]

    def forward(self, x: Tensor) -> Any:
        return self.run[0](self, x)


def block(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs))


def _skip(self: Any, x: Tensor) -> Any:
    y = self.first(x)
    skip = self.same(y)
    return self.wide(y + skip if skip is not None and skip.shape[1] != 0 else y)


def _as_many(self: Any, x: Tensor) -> Any:
    y = self.first(x)
    z = self.wide(y)
    return z + y if y.shape[1] == z.size(1) else z


def _loop(self: Any, x: Tensor) -> Any:
    y = self.first(x)
    for _ in range(y.size(1) // 2):
        y = self.same(y)
    return self.wide(y)


def _rank(self: Any, x: Tensor) -> Any:
    y = self.first(x)
    y = self.same(y) if y.dim() == 4 and len(y.shape) == 4 and y.ndim > 3 else y.mean(0)
    return self.wide(y)


def _text(self: Any, x: Tensor) -> Any:
    y = self.first(x)
    return self.wide(y) if f"{y.shape[1]}" == "4" and int(y.shape[-3]) == 4 else y


def _flattened(self: Any, x: Tensor) -> Any:
    y = self.first(x).flatten(1)
    return y if y.ndim == 2 else self.wide(y)


def _starred(self: Any, x: Tensor) -> Any:
    y = self.first(x)
    sides = [side * 1 for side in y.shape[2:]]
    return self.wide(y.flatten(2).view(*y.shape[:2], *sides))


PROVEN = [_skip, _as_many, _loop, _rank, _text, _flattened, _starred]


def _width(self: Any, x: Tensor) -> Any:
    y = self.first(x)
    return self.wide(y[..., 1:] if y.shape[-1] % 2 else y)


def _before_any_layer(self: Any, x: Tensor) -> Any:
    return self.wide(self.first(x * 2 if x.shape[1] == 3 else x[:, :3]))


def _rank_of_a_convolution(self: Any, x: Tensor) -> Any:
    y = self.lone(x)  # takes (C, H, W), too
    return y if y.shape[1] == 4 else y * 2


def _of_batches(self: Any, x: Tensor) -> Any:
    y = self.first(x)
    return y if y.shape[0] == 1 else y * 2


def _reshaped(self: Any, x: Tensor) -> Any:
    y = self.first(x)
    y = y.unsqueeze_(0) if x.sum() > 0 else y  # that of a value: stays Python
    return y * y.ndim


OPEN = [_width, _before_any_layer, _rank_of_a_convolution, _of_batches, _reshaped]


def image(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64)


@pytest.mark.parametrize("forward", PROVEN + OPEN, ids=lambda each: each.__name__)
def test_the_answer_is_right(forward: Forward) -> None:
    model = settled(Asking(forward))
    fast = fxrep.optimize(model)
    shapes: list[tuple[int, ...]] = [(1, 3, 7, 8), (2, 3, 6, 5)]
    if forward is _rank_of_a_convolution:
        shapes += [(3, 4, 5), (3, 6, 4)]
    if forward is _before_any_layer:
        shapes += [(1, 5, 7, 8)]
    for shape in shapes:
        x = image(*shape)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-10, atol=1e-10)
    left = [each.where for each in fxrep.report(fast).skipped if each.reason.startswith("runs as")]
    assert left == ([] if forward in PROVEN else [""])
