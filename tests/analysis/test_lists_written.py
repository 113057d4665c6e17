"""Operators that are given lists of tensors and write these."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from support.check import assert_equal
from support.models import IMAGE, Body


def all_at_once(m: Any, x: Tensor) -> Tensor:
    y = m.b(m.a(x))
    torch._foreach_mul_([y], 2)
    return y


def by_keyword(m: Any, x: Tensor) -> Tensor:
    y = m.b(m.a(x))
    torch._foreach_mul_(self=[y], scalar=2)
    return y


def of_aten(m: Any, x: Tensor) -> Tensor:
    y = m.b(m.a(x))
    torch.ops.aten._foreach_mul_.Scalar([y], 2)
    return y


def its_result(m: Any, x: Tensor) -> Any:
    y = m.b(m.a(x))
    return torch._foreach_mul_([y], 2)[0]


def between_two_readers(m: Any, x: Tensor) -> Tensor:
    y = m.b(m.a(x))
    z = m.c(y)
    torch._foreach_add_([y, z], 1.0)
    return m.c(y) + z


def before_the_batchnorm(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    torch._foreach_zero_((y,))
    return m.b(y)


def copied(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    z = y * 0
    torch._foreach_copy_([z], [y])
    return m.b(z)


def through_a_view(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    torch._foreach_mul_([y.view(-1)], 2)
    return m.b(y)


def several_lists(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    gradient, mean, square, step = y * 0 + 1, y * 0, y * 0, torch.ones(())
    torch._fused_adam_(
        [y], [gradient], [mean], [square], [], [step], lr=0.1, beta1=0.9, beta2=0.9,
        weight_decay=0.0, eps=1e-8, amsgrad=False, maximize=False,
    )  # fmt: skip
    return m.b(y) + m.c(mean)


def twice(m: Any, x: Tensor) -> Any:
    y = m.b(m.a(x))
    torch._foreach_pow_([y], 2)
    torch._foreach_neg_([y])
    return y, m.c(y)


def not_in_place(m: Any, x: Tensor) -> Any:
    return m.b(torch._foreach_mul([m.a(x)], 2)[0])


WRITES: list[Callable[[Any, Tensor], Any]] = [
    all_at_once, by_keyword, of_aten, its_result, between_two_readers, before_the_batchnorm, copied,
    through_a_view, several_lists, twice, not_in_place,
]  # fmt: skip


@pytest.mark.parametrize("forward", WRITES, ids=lambda forward: forward.__name__)
@torch.no_grad()
def test_operators_that_write_lists(forward: Callable[[Any, Tensor], Any]) -> None:
    model = Body(forward, a=nn.Conv2d(4, 4, 3), b=nn.BatchNorm2d(4), c=nn.Conv2d(4, 4, 1))
    assert_equal(model, IMAGE)
