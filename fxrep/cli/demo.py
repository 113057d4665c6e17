"""The built-in network of ``python -m fxrep``: RepVGG-A0 as it is trained.

Ding et al., "RepVGG: Making VGG-style ConvNets Great Again", CVPR 2021: table 2 (widths, depths),
figure 4 (the three branches of a block).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTHS = (48, 48, 96, 192, 1280)
DEPTHS = (1, 2, 4, 14, 1)


class Branch(nn.Sequential):
    """A convolution without bias and its BatchNorm."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False
        )
        self.bn = nn.BatchNorm2d(out_channels)


class Block(nn.Module):
    """ReLU of the sum of a 3x3, a 1x1 and, where shapes allow, an identity branch."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.dense = Branch(in_channels, out_channels, 3, stride)
        self.pointwise = Branch(in_channels, out_channels, 1, stride)
        keeps_shape = stride == 1 and in_channels == out_channels
        self.identity = nn.BatchNorm2d(in_channels) if keeps_shape else None
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride)."""
        y = self.dense(x) + self.pointwise(x)
        if self.identity is not None:
            y = y + self.identity(x)
        out: Tensor = self.act(y)
        return out


class RepVGG(nn.Module):
    """Stages of blocks, global average pooling, one Linear.

    Args:
        widths: output channels of each stage.
        depths: blocks of each stage; the first of each has stride 2.
        classes: outputs of the Linear.
    """

    def __init__(
        self,
        widths: tuple[int, ...] = WIDTHS,
        depths: tuple[int, ...] = DEPTHS,
        classes: int = 1000,
    ) -> None:
        super().__init__()
        channels = 3
        stages = []
        for width, depth in zip(widths, depths, strict=True):
            blocks = []
            for index in range(depth):
                blocks.append(Block(channels, width, stride=2 if index == 0 else 1))
                channels = width
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to logits (N, classes)."""
        logits: Tensor = self.head(self.stages(x).mean((2, 3)))
        return logits


@torch.no_grad()
def randomize_batchnorm(model: nn.Module, seed: int = 0) -> None:
    """Give every BatchNorm statistics, weight and bias as after training, in place.

    Fresh values (mean 0, variance 1, weight 1, bias 0) hide most mistakes. Variances stay in
    0.5-1.5: with far smaller variances a deep net amplifies float32 rounding.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        values = torch.rand(like.shape, generator=generator) * (high - low) + low
        return values.to(like)

    for module in model.modules():
        mean, var = getattr(module, "running_mean", None), getattr(module, "running_var", None)
        if not (isinstance(mean, Tensor) and isinstance(var, Tensor)):
            continue
        mean.copy_(uniform(mean, -0.3, 0.3))
        var.copy_(uniform(var, 0.5, 1.5))
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if isinstance(weight, Tensor):
            weight.copy_(uniform(weight, 0.5, 1.5))
        if isinstance(bias, Tensor):
            bias.copy_(uniform(bias, -0.3, 0.3))
