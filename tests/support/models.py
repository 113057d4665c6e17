"""Small models that a test spells out on the spot, and what they are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# An input for models of four channels; another height than width, so that the two are told apart.
IMAGE = torch.randn(1, 4, 6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

Forward = Callable[[Any, Tensor], Any]


class _Parts(nn.Module):
    """Parts under their names, and a forward given as a function of the model and its inputs."""

    def __init__(self, forward: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.body = forward
        for name, part in parts.items():
            setattr(self, name, part)


class Body(_Parts):
    """A model of one input: `Body(lambda m, x: m.b(m.a(x)), a=..., b=...)`."""

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


class Two(_Parts):
    """A model of two inputs: `Two(lambda m, x, h: m.a(x) + m.b(h), a=..., b=...)`."""

    def forward(self, x: Tensor, h: Tensor) -> Any:
        return self.body(self, x, h)


def conv(inputs: int = 8, outputs: int = 8, kernel: Any = 3, **how: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, **how)


def conv_bn(inputs: int, outputs: int, kernel: Any, **how: Any) -> nn.Sequential:
    """Convolution without bias, then BatchNorm."""
    how = {"bias": False, **how}
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, **how), nn.BatchNorm2d(outputs))


def call(layer: Any, x: Tensor) -> Tensor:
    """A convolution by its function."""
    return F.conv2d(
        x, layer.weight, bias=layer.bias, stride=layer.stride, padding=layer.padding,
        dilation=layer.dilation, groups=layer.groups,
    )  # fmt: skip
