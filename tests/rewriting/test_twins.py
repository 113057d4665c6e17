"""Layers with other tensors compute what the layers themselves compute with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fxrep.rewriting.twins import twin


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2},
        {"stride": (1, 3)},
        {"padding": 1},
        {"padding": (0, 2)},
        {"padding": "same"},
        {"padding": "valid"},
        {"padding": 2, "padding_mode": "reflect"},
        {"padding": 1, "padding_mode": "circular"},
        {"dilation": (2, 1)},
        {"bias": False},
        {"groups": 2},
        {"groups": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(2, 6, 7, 8), (6, 7, 8), (0, 6, 7, 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_grouped_convolution(
    options: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    conv = nn.Conv2d(6, 12, 3, **{"groups": 6, **options}).to(dtype)
    x = torch.randn(shape, dtype=dtype)
    tensors = {name: torch.randn_like(value) for name, value in conv.named_parameters()}
    with torch.no_grad():
        wanted = torch.func.functional_call(conv, tensors, x)
        got = twin(conv, tensors).forward(x)
    assert torch.allclose(got, wanted, rtol=0, atol=1e-12 if dtype is torch.float64 else 1e-4)
    assert got.shape == wanted.shape


def test_a_grouped_convolution_reads_a_computed_weight() -> None:
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3, groups=4))
    weight, x = torch.randn(4, 1, 3, 3), torch.randn(1, 4, 5, 5)
    with torch.no_grad():
        got = twin(conv, {}, {"weight": weight}).forward(x)
        wanted = nn.functional.conv2d(x, weight, conv.bias, groups=4)
    assert torch.allclose(got, wanted, atol=1e-5)
