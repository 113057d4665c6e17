"""Who only reads a size is in nobody's way."""

from __future__ import annotations

import torch
from torch import nn

import fxrep
from support.check import assert_equal, check
from support.models import IMAGE

SIZES = [(2, 4, 6, 7), (1, 4, 3, 3)]


class Attention(nn.Module):
    """Reads the size of the normalised value, as visformer and others do, and adds a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)
        self.qkv = nn.Conv2d(4, 12, 1, bias=False)

    def forward(self, x):
        y = self.norm(x)
        b, c, h, w = y.shape
        q, k, v = self.qkv(y).reshape(b, 3, c, h * w).unbind(1)
        return x + (torch.softmax(q.transpose(1, 2) @ k, -1) @ v.transpose(1, 2)).mT.reshape(
            b, c, h, y.size(-1)
        )


def test_a_size_that_is_read_after_a_batchnorm():
    check(Attention().eval(), SIZES, batchnorms=0)


class Spreads(nn.Module):
    """One channel times four scales: the size after it is not the size before."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scales", torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1, 1))
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        y = x[:, :1] * self.scales
        return self.conv(y), torch.ones(y.shape, dtype=x.dtype), y.size(1)


def test_a_size_that_broadcasting_changes():
    check(Spreads().eval(), SIZES)


def test_the_size_of_an_unknown_operand_is_left_alone():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scales", torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1))

        def forward(self, x):
            return (x * self.scales).shape

    optimized = fxrep.optimize(Scaled().eval())
    assert optimized(torch.zeros(2, 1, 5, 6)) == (2, 3, 5, 6)
    assert optimized(torch.zeros(2, 3, 5, 6)) == (2, 3, 5, 6)


def test_a_constant_that_adds_dimensions():
    class Lifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.full((1, 1, 1, 1), 2.0))

        def forward(self, x):
            return (x * self.scale).shape

    assert fxrep.optimize(Lifted().eval())(torch.zeros(5)) == (1, 1, 1, 5)


class ReadsChannels(nn.Module):
    """The shape of an inner value is read, and the layer after it changes the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 2, 1)
        self.skip, self.bn = nn.Conv2d(4, 2, 3, padding=1), nn.BatchNorm2d(2)

    def forward(self, x):
        y = self.first(x)
        return self.bn(self.second(y) + self.skip(x)) * y.shape[1]


def test_the_shape_of_a_value_with_other_channels():
    assert assert_equal(ReadsChannels(), IMAGE).rewrites
