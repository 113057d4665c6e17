"""Tensors that a forward makes of traced sizes, in every spelling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn, zeros

import fxrep
from support.check import settled

FACTORIES: dict[str, Callable[[Tensor], Tensor]] = {
    "one size": lambda x: torch.zeros(x.size(0)),
    "sizes": lambda x: torch.zeros(x.size(0), x.size(1)),
    "a size first": lambda x: torch.zeros(x.size(0), 4),
    "a size last": lambda x: torch.zeros(2, x.size(1)),
    "with a dtype": lambda x: torch.zeros(x.size(0), x.size(1), device=x.device, dtype=x.dtype),
    "a tuple": lambda x: torch.zeros((x.size(0), x.size(1))),
    "a list": lambda x: torch.zeros([x.size(0), 3], dtype=x.dtype),
    "a shape": lambda x: torch.zeros(x.shape),
    "a starred shape": lambda x: torch.zeros(*x.shape[:2]),
    "by keyword": lambda x: torch.zeros(size=(x.size(0), 2)),
    "an imported name": lambda x: zeros(x.size(0), x.size(1)),
    "computed sizes": lambda x: torch.zeros(x.size(0) * 2, x.shape[-1] // 2 + 1),
    "ones": lambda x: torch.ones(x.size(0), x.size(1)),
    "empty": lambda x: torch.empty(x.size(0), x.size(1)).fill_(1),
    "full": lambda x: torch.full((x.size(0), x.size(1)), 2.0),
    "arange": lambda x: torch.arange(x.size(2)),
    "arange from": lambda x: torch.arange(0, x.size(2), 2, device=x.device),
    "linspace": lambda x: torch.linspace(-1, 1, x.size(2)),
    "eye": lambda x: torch.eye(x.size(2), x.size(3)),
    "a mask": lambda x: torch.triu(torch.ones(x.size(2), x.size(2)), 1),
    "tril_indices": lambda x: torch.tril_indices(x.size(2), x.size(2)).float(),
    "new_zeros": lambda x: x.new_zeros(x.size(0), x.size(1)),
    "new_full": lambda x: x.new_full((x.size(0), x.size(1)), 2.0),
    "as_tensor": lambda x: torch.as_tensor(x),
    "as_tensor of a dtype": lambda x: torch.as_tensor(x, dtype=torch.float32),
    "no size": lambda x: torch.zeros(2, 3) + torch.as_tensor([1.0, 2.0, 3.0]),
}


class Making(nn.Module):
    def __init__(self, make: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.make = [make]

    def forward(self, x: Tensor) -> Any:
        y = self.norm(self.conv(x))
        return y, self.make[0](y)


@pytest.mark.parametrize("given", [False, True], ids=["", "examples"])
@pytest.mark.parametrize("name", FACTORIES)
def test_made_anew_for_each_size(name: str, given: bool) -> None:
    model = settled(Making(FACTORIES[name]))
    fast = fxrep.optimize(model, torch.rand(2, 3, 7, 6, dtype=torch.float64) if given else None)
    assert [each.where for each in fxrep.report(fast).rewrites] == ["conv"], fxrep.report(fast)
    for shape in ((2, 3, 7, 6), (3, 3, 9, 8)):
        x = torch.rand(*shape, dtype=torch.float64)
        for got, expected in zip(fast(x), model(x), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
