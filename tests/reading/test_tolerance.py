"""Whether a value may become a view of a larger one depends on its readers, not on their names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from support.check import check
from support.models import Body, conv

WIDE = ((2, 64, 5, 5), (1, 64, 4, 7), (3, 64, 2, 2))


def flat(module: nn.Module, args: tuple[Tensor], result: Tensor) -> Tensor:
    """A hook that raises for a view with gaps."""
    return args[0].view(-1)


def body(name: str, module: nn.Module) -> nn.Module:
    layers = {each: conv(64, 4, 1) for each in "abc"}
    forward: Callable[[Any, Tensor], Any] = lambda m, x: [  # noqa: E731
        getattr(m, name)(layer(x)) for layer in (m.a, m.b, m.c)
    ]
    return Body(forward, **layers, **{name: module}).eval()


@pytest.mark.parametrize("name", ["softmax", "matmul", "transpose", "permute", "act"])
def test_a_module_named_like_a_method_is_asked_like_any_other(name: str) -> None:
    hooked = nn.Softmax(1)
    hooked.register_forward_hook(flat)
    check(body(name, hooked), WIDE, layers=3, cost="always")


@pytest.mark.parametrize("name", ["softmax", "act"])
def test_what_a_module_is_decides(name: str) -> None:
    check(body(name, nn.Sigmoid()), WIDE, layers=1, cost="always")


@pytest.mark.parametrize("turned, joined", [
    (lambda y: torch.transpose(y, 1, 2).softmax(1), True),
    (lambda y: y.permute(0, 2, 3, 1).relu(), True),
    (lambda y: y.permute(0, 2, 3, 1).flatten(1), False),
    (lambda y: y.transpose(1, 2).transpose(1, 2).add_(1), False),
])  # fmt: skip
def test_a_view_of_a_view_is_asked_of_its_own_readers(turned: Any, joined: bool) -> None:
    model = Body(
        lambda m, x: [turned(layer(x)) for layer in (m.a, m.b, m.c)],
        **{each: conv(64, 4, 1) for each in "abc"},
    ).eval()  # fmt: skip
    check(model, WIDE, layers=1 if joined else 3, cost="always", more_work=True)
