"""What nobody reads goes away; what has an effect, or might, stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from check import check
from torch import Tensor, nn

SHAPES = ((2, 8, 9, 9), (1, 8, 4, 7))


class Body(nn.Module):
    def __init__(self, forward: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.run = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def conv() -> nn.Conv2d:
    return nn.Conv2d(8, 8, 3, padding=1)


def _unread(m: Any, x: Tensor) -> Tensor:
    m.b(x)
    return m.a(x)


def _unread_branch(m: Any, x: Tensor) -> Tensor:
    torch.sigmoid(m.norm(m.b(x)).relu() * 2)
    return m.a(x)


def _auxiliary(m: Any, x: Tensor) -> Tensor:
    results = {"out": m.a(x), "aux": m.b(F.avg_pool2d(x, 2)).relu()}
    return results["out"]


@pytest.mark.parametrize("forward", [_unread, _unread_branch, _auxiliary])
def test_what_nobody_reads_is_gone(forward: Any) -> None:
    model = Body(forward, a=conv(), b=conv(), norm=nn.BatchNorm2d(8)).eval()
    optimized = check(model, SHAPES, layers=1, operations=1)
    assert "b" not in dict(optimized.named_modules())


@pytest.mark.parametrize("zero", [0, 0.0, nn.Parameter(torch.zeros(8, 1, 1))])
def test_a_branch_times_zero_is_gone(zero: Any) -> None:
    parts = {"a": conv(), "b": nn.Conv2d(8, 8, 5, padding=2), "zero": zero}
    model = Body(lambda m, x: m.a(x) + m.zero * m.b(x), **parts).eval()
    optimized = check(model, SHAPES, layers=1)
    kernels = [m.kernel_size for m in optimized.modules() if isinstance(m, nn.Conv2d)]
    assert kernels == [(3, 3)], "the branch has left a border of zeros"


def test_a_branch_times_zero_that_broadcasts_stays() -> None:
    parts = {"a": nn.Conv2d(8, 8, 3), "b": conv()}
    model = Body(lambda m, x: m.a(x) + 0 * m.b(x), **parts).eval()
    check(model, ((2, 8, 3, 3), (1, 8, 3, 3)), batchnorms=None)


def _in_place(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    F.relu_(y)
    y.add_(1)
    return y


def _border(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    y[:, :, :1] = 0
    return y


@pytest.mark.parametrize("forward", [_in_place, _border])
def test_what_is_written_for_its_effect_stays(forward: Any) -> None:
    check(Body(forward, a=conv()).eval(), SHAPES, layers=1)


def test_a_hooked_layer_stays() -> None:
    calls: list[int] = []
    model = Body(_unread, a=conv(), b=conv()).eval()
    model.b.register_forward_hook(lambda *_: calls.append(1))
    optimized = check(model, SHAPES, layers=2)
    calls.clear()
    optimized(torch.randn(SHAPES[0]))
    assert calls
