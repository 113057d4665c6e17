"""Arithmetic that changes the dtype of a value is no part of a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxrep
from fxrep.analysis.dtypes import Dtypes
from fxrep.ops.calls import Calls
from support.check import randomize
from support.models import Body

# Values of shape (N, 3, H, W) in the dtype of the convolution that reads them.
CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "greater": lambda x: (x > 0) * 2.0,
    "equal, shifted": lambda x: x.eq(0) + 0.5,
    "scaled and shifted": lambda x: torch.isnan(x) * 2.0 - 1,
    "divided": lambda x: torch.isfinite(x) / 2,
    "subtracted from": lambda x: 1 - (x > 0) / 2,
    "logical": lambda x: torch.logical_and(x > 0, x < 1) * 1.5,
    "logical_not": lambda x: x.logical_not() * 1.5,
    "any": lambda x: (x * torch.ones(3, 1, 1)).any(1, keepdim=True).expand(-1, 3, -1, -1) * 0.5,
    "not": lambda x: ~(x > 0) * 0.1,
    "and": lambda x: ((x > 0) & (x < 1)) * 0.1,
    "signbit": lambda x: x.signbit() * 0.1,
    "isclose": lambda x: x.isclose(x + 1e-9) * 0.1,
    "long": lambda x: x.long() * 0.5,
    "int": lambda x: x.int() * 0.5,
    "bool": lambda x: x.bool() * 0.5,
    "byte": lambda x: x.abs().byte() / 255,
    "to": lambda x: x.abs().to(torch.uint8) / 255,
    "to(dtype=)": lambda x: x.to(dtype=torch.int64) / 255,
    "type": lambda x: x.type(torch.int32) * 0.1,
    "type_as": lambda x: x.type_as(torch.ones(1, dtype=torch.long)) * 0.5,
    "to(other)": lambda x: x.to(x > 0) * 0.5,
    "to(other.dtype)": lambda x: x.to(x.long().dtype) * 0.5,
    "ones_like": lambda x: torch.ones_like(x, dtype=torch.long) * 0.1,
    "argsort": lambda x: x.argsort(1) * 0.1,
    "topk": lambda x: x.topk(3, 1)[1] / 3,
    "topk.indices": lambda x: x.topk(3, 1).indices / 3,
    "sort of integers": lambda x: x.long().sort(1)[0] / 3,
    "argmax": lambda x: x.argmax(1, keepdim=True).expand(-1, 3, -1, -1) * 0.1,
    "bucketize": lambda x: torch.bucketize(x, torch.tensor([0.0, 1.0])) * 0.1,
    "where": lambda x: torch.where(x > 0, 1, 0) * 0.3,
    "integer arithmetic": lambda x: (x.int() + 1) * 2 * 0.1,
    "in place": lambda x: x.long().add_(1) * 0.5,
    "negative": lambda x: -(x.int()) * 0.2,
    "rounded": lambda x: x.int().round() * 0.2,
    "clamped": lambda x: x.int().clamp(0, 3) * 0.1,
    "views": lambda x: (x > 0).reshape(x.shape).permute(0, 1, 3, 2) * 0.1,
    "an item": lambda x: (x > 0)[:, :, 1:] * 0.1,
    "rolled": lambda x: (x > 0).roll(1, 2) * 0.1,
    "padded": lambda x: F.pad(x.long(), (1, 1)) * 0.1,
    "pooled": lambda x: F.max_pool2d(x.long(), 2) * 0.1,
    "cumulative sum": lambda x: (x > 0).cumsum(2) * 0.1,
    "a sum": lambda x: (x > 0).sum(1, keepdim=True).expand(-1, 3, -1, -1) * 0.1,
    "added to a value": lambda x: x.int() + x,
    "concatenated": lambda x: torch.cat([x[:, :1], (x > 0)[:, :2]], 1),
    "stacked": lambda x: torch.stack([x[:, 0] > 0] * 3, 1) * 0.5,
    "positions": lambda x: torch.arange(x.shape[3], device=x.device).expand_as(x) * 0.1,
    "filled": lambda x: torch.full(x.shape, 3, device=x.device) * 0.1,
    "another device": lambda x: (x > 0).to(x.device) * 0.1,
    "half": lambda x: x.half() * torch.ones(1, 3, 1, 1),
    "bfloat16": lambda x: x.to(torch.bfloat16) + torch.ones(1, 3, 1, 1),
}


@pytest.mark.parametrize("examples", [False, True], ids=["", "example inputs"])
@pytest.mark.parametrize("name", CHANGES)
def test_arithmetic_that_changes_the_dtype_before_a_layer(name: str, examples: bool) -> None:
    model = randomize(
        Body(
            lambda m, x: m.b(m.a(CHANGES[name](x))), a=nn.Conv2d(3, 4, 3), b=nn.BatchNorm2d(4)
        ).eval()
    )
    x = torch.randn(2, 3, 8, 8)
    optimized = fxrep.optimize(model, x if examples else None)
    torch.testing.assert_close(optimized(x), model(x), rtol=1e-4, atol=1e-4)
    assert len(fxrep.report(optimized).rewrites) == 1, "the BatchNorm"


@pytest.mark.parametrize("examples", [False, True], ids=["", "example inputs"])
@pytest.mark.parametrize(
    "function",
    [
        lambda i: F.one_hot(i, 4) * 0.5,
        lambda i: F.one_hot(i, 4) - 0.5,
        lambda i: F.one_hot(i, 4).flip(1) / 3,
    ],
    ids=["scaled", "shifted", "divided"],
)
def test_one_hot_vectors(function: Callable[[Tensor], Tensor], examples: bool) -> None:
    model = Body(lambda m, i: m.a(function(i)), a=nn.Linear(4, 5)).eval()
    i = torch.randint(0, 4, (2, 6))
    optimized = fxrep.optimize(model, i if examples else None)
    torch.testing.assert_close(optimized(i), model(i))


class Mask(nn.Module):
    """Python code that chooses a dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return x > 0 if x.sum() > -1e9 else x


@pytest.mark.parametrize("examples", [False, True], ids=["", "example inputs"])
@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.mask(x) * 2.0,
        lambda m, x: m.mask(x) + 0.5,
        lambda m, x: m.mask(x)[:, :, 1:].flip(2) * m.scale,
        lambda m, x: 1.0 - m.mask(x) / 2,
    ],
    ids=["scaled", "shifted", "a view", "subtracted from"],
)
def test_a_dtype_that_python_code_chooses(function: Any, examples: bool) -> None:
    model = Body(
        lambda m, x: m.a(function(m, x)), mask=Mask(), a=nn.Conv2d(3, 4, 3),
        scale=nn.Parameter(torch.ones(1, 3, 1, 1)),
    ).eval()  # fmt: skip
    x = torch.randn(2, 3, 8, 8)
    optimized = fxrep.optimize(model, x if examples else None)
    torch.testing.assert_close(optimized(x), model(x), rtol=1e-4, atol=1e-4)


def test_an_image_of_bytes() -> None:
    model = Body(lambda m, x: m.a(x / 255), a=nn.Conv2d(3, 4, 3)).eval()
    x = torch.randint(0, 255, (2, 3, 8, 8), dtype=torch.uint8)
    torch.testing.assert_close(fxrep.optimize(model, x)(x), model(x))


def test_what_comes_back_to_floating_point_still_folds() -> None:
    model = randomize(
        Body(
            lambda m, x: m.b(m.a((x > 0).float() * 2.0 - 1)), a=nn.Conv2d(3, 4, 3),
            b=nn.BatchNorm2d(4),
        ).eval()
    )  # fmt: skip
    x = torch.randn(2, 3, 8, 8)
    optimized = fxrep.optimize(model)
    torch.testing.assert_close(optimized(x), model(x), rtol=1e-4, atol=1e-4)
    assert [type(m) for m in optimized.children()] == [nn.Conv2d]
    assert fxrep.report(optimized).rewrites


def test_an_argument_has_no_certain_dtype() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    half, comparison = graph.call_method("half", (x,)), graph.call_function(torch.gt, (x, 0))
    dtypes = Dtypes(graph, Calls(nn.Module()))
    assert dtypes.of(x) is None
    assert dtypes.of(half) is torch.float16
    assert dtypes.is_integral(comparison) and not dtypes.is_integral(half)
