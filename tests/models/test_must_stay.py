"""What looks collapsible and is not, or only partly: equal outputs, whatever the cost model.

Most cases are wide in the middle (8 -> 64 -> 8 channels), so that a wrong merge would save nearly
all of the work. What is asserted about counts is only what no exact rewrite can undercut; the
rest may collapse as far as it stays equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.check import check
from support.models import Body, Forward, call, conv, conv_bn

# Odd, even, and small ones: large sizes never see a broadcast, nor a kernel that meets two borders.
# Every residue modulo 4 is among them, or a stride error could hide.
SHAPES = ((2, 8, 9, 9), (1, 8, 12, 7), (2, 8, 3, 3), (1, 8, 4, 1), (2, 8, 10, 8), (1, 8, 6, 11))


@dataclass(frozen=True)
class Case:
    """A model that tempts.

    Args:
        make: a new model.
        shapes: to compare at.
        reason: a word of the reason a report should give; loosely, any sensible one has it.
        again: whether a second run must find nothing.
        kept: counts (`layers`, `operations`) that hold under every cost model.
    """

    make: Callable[[], nn.Module]
    shapes: Any = SHAPES
    reason: str | None = None
    again: bool = True
    kept: dict[str, Any] = field(default_factory=dict)


CASES: dict[str, Case] = {}


def case(
    name: str, forward: Forward, parts: Callable[[], dict[str, Any]], *, shapes: Any = SHAPES,
    reason: str | None = None, again: bool = True, **kept: Any,
) -> None:  # fmt: skip
    assert name not in CASES, name
    CASES[name] = Case(lambda: Body(forward, **parts()), shapes, reason, again, kept)


def wide(first: Any = 1, second: Any = 3, **how: Any) -> dict[str, Any]:
    """Layers a (8 -> 64) and b (64 -> 8); `how` is for a, and for b where the key ends in _b."""
    b = {key[:-2]: value for key, value in how.items() if key.endswith("_b")}
    a = {key: value for key, value in how.items() if not key.endswith("_b")}
    return {"a": conv(8, 64, first, **a), "b": conv(64, 8, second, **b)}


def chained(m: Any, x: Tensor) -> Tensor:
    return m.b(m.a(x))


# --- a border that depends on x ------------------------------------------------------------------

# Reasons: "padding", which says what the second operation reads behind the border of the first.
case(
    "AConv", lambda m, x: F.silu(m.cv1(F.avg_pool2d(x, 2, 1, 0, False, True))),
    lambda: {"cv1": conv_bn(8, 16, 3, stride=2, padding=1)},
    reason="padding",
)  # fmt: skip
case(
    "AConv, wide", lambda m, x: m.b(F.avg_pool2d(m.a(x), 2, 1, 0)),
    lambda: wide(3, 3, padding=1, stride_b=2, padding_b=1), reason="padding", layers=2,
)  # fmt: skip


def _adown(m: Any, x: Tensor) -> Tensor:
    x = F.avg_pool2d(x, 2, 1, 0, False, True)
    x1, x2 = x.chunk(2, 1)
    x2 = F.max_pool2d(x2, 3, 2, 1)
    return torch.cat((F.silu(m.cv1(x1)), F.silu(m.cv2(x2))), 1)


case(
    "ADown", _adown,
    lambda: {"cv1": conv_bn(4, 8, 3, stride=2, padding=1), "cv2": conv_bn(4, 8, 1)},
    reason="not worth it",  # on the way to what pads, a slice would double the work
)  # fmt: skip
case("padded 3x3 -> padded 3x3", chained, lambda: wide(3, 3, padding=1, bias=False, padding_b=1),
     reason="padding", layers=2)  # fmt: skip
case("padded 3x3 -> padded 1x1", chained, lambda: wide(3, 1, padding=1, bias=False, padding_b=1),
     reason="padding", layers=2)  # fmt: skip
case("unpadded 3x3 -> padded 3x3", chained, lambda: wide(3, 3, bias=False, padding_b=1),
     reason="padding", layers=2)  # fmt: skip
case("dilated: the second steps over the border", chained,
     lambda: wide(3, 3, padding=1, bias=False, padding_b=2, dilation_b=2), layers=2)  # fmt: skip
case("strided pair", chained,
     lambda: wide(3, 3, stride=2, padding=1, bias=False, padding_b=1), layers=2)  # fmt: skip
case("strided pair, both", chained,
     lambda: wide(3, 3, stride=2, padding=1, bias=False, stride_b=2, padding_b=1),
     layers=2)  # fmt: skip
# Exact where the stride divides the size: patches, then a padded kernel. Here it need not.
case("patches -> padded 3x3", chained, lambda: wide(2, 3, stride=2, bias=False, padding_b=1),
     layers=2)  # fmt: skip
case("patches of 3 -> padded 3x3", chained, lambda: wide(3, 3, stride=3, bias=False, padding_b=1),
     shapes=((2, 8, 9, 9), (1, 8, 10, 11), (1, 8, 3, 5)), layers=2)  # fmt: skip
case(
    "padded rows -> padded rows",
    chained,
    lambda: wide((3, 1), (3, 1), padding=(1, 0), bias=False, padding_b=(1, 0)),
    layers=2,
)
for _first in ("low", "high"):
    for _second in ("low", "high"):
        _same: dict[str, Any] = {} if _first == _second else {"layers": 2}
        _sides = {"low": (1, 0, 1, 0), "high": (0, 1, 0, 1)}
        # One-sided twice on one side is exact; on opposite sides the second sees what is computed.
        case(
            f"2x2 padded {_first} -> 2x2 padded {_second}",
            lambda m, x, p=_sides[_first], q=_sides[_second]: m.b(F.pad(m.a(F.pad(x, p)), q)),
            lambda: wide(2, 2, bias=False),
            **_same,
        )  # fmt: skip
        case(
            f"3x3 padded {_first} -> strided 3x3 padded {_second}",
            lambda m, x, p=_sides[_first], q=_sides[_second]: m.b(F.pad(m.a(F.pad(x, p)), q)),
            lambda: wide(3, 3, bias=False, stride_b=2), layers=2,
        )  # fmt: skip
        case(
            f"strided 2x2 padded {_first} -> 3x3 padded {_second}",
            lambda m, x, p=_sides[_first], q=_sides[_second]: m.b(F.pad(m.a(F.pad(x, p)), q)),
            lambda: wide(2, 3, bias=False, stride=2),
        )  # fmt: skip
case("padded pool -> padded pool -> conv",
     lambda m, x: m.b(F.avg_pool2d(F.avg_pool2d(m.a(x), 3, 1, 1), 3, 1, 1)),
     lambda: wide(1, 1, bias=False))  # fmt: skip
case("cropped -> padded conv", lambda m, x: m.b(m.a(x[:, :, 1:-1, 1:-1])),
     lambda: wide(3, 1, padding=1))  # fmt: skip
case("conv -> crop -> padded conv", lambda m, x: m.b(m.a(x)[:, :, 1:-1, 1:-1]),
     lambda: wide(3, 3, padding=1, bias=False, padding_b=1), layers=2)  # fmt: skip
case("conv -> strided slice -> padded conv", lambda m, x: m.b(m.a(x)[:, :, 1::2, 1::2]),
     lambda: wide(3, 3, padding=1, bias=False, padding_b=1), layers=2)  # fmt: skip
case("slice to a fixed end", lambda m, x: m.b(m.a(x[:, :, :5])[:, :, :, 2:6]),
     lambda: wide(1, 3, bias=False, padding_b=1))  # fmt: skip
case("slice from a fixed end", lambda m, x: m.b(m.a(x)[:, :, -4:, :-1]),
     lambda: wide(3, 3, padding=1))  # fmt: skip
case(
    "transposed padded -> padded 3x3",
    lambda m, x: m.b(m.a(x)),
    lambda: {"a": nn.ConvTranspose2d(8, 64, 3, padding=1, bias=False), "b": conv(64, 8, padding=1)},
    layers=2,
)


# --- a bias that the padding does not have -------------------------------------------------------


def _ghost(m: Any, x: Tensor) -> Tensor:
    return m.post(m.column(m.row(m.short(x))))


def _ghost_parts(channels: int) -> dict[str, Any]:
    dw: dict[str, Any] = {"groups": channels}
    return {
        "short": conv_bn(8, channels, 3, padding=1),
        "row": conv_bn(channels, channels, (1, 5), padding=(0, 2), **dw),
        "column": conv_bn(channels, channels, (5, 1), padding=(2, 0), **dw),
        "post": nn.Sigmoid() if channels == 8 else conv(channels, 8, 1),
    }


case("GhostNetV3", _ghost, lambda: _ghost_parts(8))
case("GhostNetV3, wide", _ghost, lambda: _ghost_parts(64))
for _k in (5, 11):
    case(
        f"RepNeXt-L, {_k}", lambda m, x: m.norm(m.b(m.a(x))),
        lambda k=_k: {
            "a": conv(8, 8, (1, k), padding=(0, k // 2), groups=8),
            "b": conv(8, 8, (k, 1), padding=(k // 2, 0), groups=8),
            "norm": nn.BatchNorm2d(8),
        },
    )  # fmt: skip
for _k, _how in ((3, {}), (3, {"stride_b": 2}), (5, {"dilation_b": 2}), (2, {})):
    case(
        f"biased 1x1 -> padded {_k}x{_k} {_how or ''}", chained,
        lambda k=_k, how=_how: wide(1, k, padding_b=1, **how),
    )  # fmt: skip
case("biased 1x1 -> padded conv, grouped", chained,
     lambda: wide(1, 3, groups=2, groups_b=2, padding_b=1))  # fmt: skip
case("biased 1x3 -> padded 3x1", chained,
     lambda: wide((1, 3), (3, 1), padding=(0, 1), padding_b=(1, 0)))  # fmt: skip
case("BatchNorm -> padded conv", lambda m, x: m.b(m.a(m.norm(x))),
     lambda: {"norm": nn.BatchNorm2d(8), **wide(3, 1, padding=1)})  # fmt: skip
case("a constant added before a padded conv", lambda m, x: m.b(m.a(x) + 1.5),
     lambda: wide(1, 3, bias=False, padding_b=1))  # fmt: skip
case(
    "a parameter added before a padded conv",
    lambda m, x: m.b(m.a(x) - m.c),
    lambda: {"c": nn.Parameter(torch.randn(64, 1, 1)), **wide(1, 3, bias=False, padding_b=1)},
)
case("biased 1x1 -> padded average", lambda m, x: m.b(F.avg_pool2d(m.a(x), 3, 1, 1)),
     lambda: wide(1, 1))  # fmt: skip
case("biased 1x1 -> transposed", lambda m, x: m.b(m.a(x)),
     lambda: {"a": conv(8, 64, 1), "b": nn.ConvTranspose2d(64, 8, 4, 2, 1)})  # fmt: skip
case("sum of biased 1x1s -> padded conv", lambda m, x: m.b(m.a(x) + m.c(x)),
     lambda: {"c": conv(8, 64, 1, bias=False), **wide(1, 3, padding_b=1)})  # fmt: skip
case(
    "concat, one side biased -> padded conv",
    lambda m, x: m.b(torch.cat([m.a(x), m.c(x)], 1)),
    lambda: {"a": conv(8, 32, 1, bias=False), "c": conv(8, 32, 1), "b": conv(64, 8, padding=1)},
)


# --- average pooling that is no convolution ------------------------------------------------------

# Reasons: the name of the argument.
case("uncounted padding", lambda m, x: m.a(x) + m.pool(x),
     lambda: {"a": conv(padding=1), "pool": nn.AvgPool2d(3, 1, 1, count_include_pad=False)},
     reason="fewer values at the border", layers=1, operations=3)  # fmt: skip
case("uncounted padding, in a chain",
     lambda m, x: m.b(F.avg_pool2d(m.a(x), 3, 2, 1, False, False)),
     lambda: wide(3, 1, padding=1))  # fmt: skip
case(
    "ceil overhang",
    lambda m, x: m.a(x) + F.avg_pool2d(x, 2, ceil_mode=True),
    lambda: {"a": conv(stride=2, padding=1)},
    reason="ceil mode",
    layers=1,
    operations=3,
)
case("ceil overhang, in a chain", lambda m, x: m.b(F.avg_pool2d(m.a(x), 2, ceil_mode=True)),
     lambda: wide(3, 1, padding=1))  # fmt: skip
case("ceil overhang with padding", lambda m, x: m.a(x) + F.avg_pool2d(x, 3, 2, 1, ceil_mode=True),
     lambda: {"a": conv(stride=2, padding=1)},
     shapes=((2, 8, 2, 2), (1, 8, 9, 9), (1, 8, 3, 5)), layers=1, operations=3)  # fmt: skip
for _divisor in (3, 4):
    case(f"ceil overhang, divisor {_divisor}",
         lambda m, x, d=_divisor: m.a(x) + F.avg_pool2d(x, 2, ceil_mode=True, divisor_override=d),
         lambda: {"a": conv(stride=2, padding=1)})  # fmt: skip
case("divisor before a 1x1 with bias",
     lambda m, x: m.b(F.avg_pool2d(m.a(x), 2, divisor_override=3)), lambda: wide(1, 1))  # fmt: skip
case("adaptive pooling of one size", lambda m, x: m.a(x) + F.adaptive_avg_pool2d(x, 4),
     lambda: {"a": conv(stride=2, padding=1)},
     shapes=((2, 8, 8, 8), (1, 8, 7, 7), (1, 8, 7, 8)), layers=1, operations=3)  # fmt: skip
case("max pooling between 1x1s", lambda m, x: m.b(F.max_pool2d(m.a(x), 2)), lambda: wide(1, 1),
     layers=2)  # fmt: skip
case("max pooling below negative scales",
     lambda m, x: m.b(F.max_pool2d(m.a(x) * m.c, 3, 1, 1)),
     lambda: {"c": nn.Parameter(torch.linspace(-1, 1, 64).reshape(64, 1, 1)), **wide(1, 1)},
     layers=2)  # fmt: skip
case("3x3s around an upsampling", lambda m, x: m.b(F.interpolate(m.a(x), scale_factor=2)),
     lambda: wide(3, 3, padding=1, padding_b=1, bias=False), layers=2)  # fmt: skip


# --- padding modes -------------------------------------------------------------------------------

# Reasons: "padding mode".
for _mode in ("reflect", "replicate", "circular"):
    case(f"{_mode} and zeros in a sum", lambda m, x: m.a(x) + m.c(x),
         lambda mode=_mode: {"a": conv(padding=1), "c": conv(padding=1, padding_mode=mode)},
         reason="padding mode", layers=2)  # fmt: skip
    case(
        f"{_mode} and zeros, wide",
        lambda m, x: m.b(m.a(x) + m.c(x)),
        lambda mode=_mode: {
            "c": conv(8, 64, padding=1, padding_mode=mode),
            **wide(3, 1, padding=1),
        },
    )
    case(f"{_mode} by F.pad and zeros in a sum",
         lambda m, x, mode=_mode: m.a(F.pad(x, (1, 1, 1, 1), mode=mode)) + m.c(x),
         lambda: {"a": conv(), "c": conv(padding=1)}, layers=2)  # fmt: skip
    case(f"{_mode}, then zeros", lambda m, x, mode=_mode: m.b(m.a(F.pad(x, (1,) * 4, mode=mode))),
         lambda: wide(3, 3, bias=False, padding_b=1), layers=2)  # fmt: skip
    case(f"zeros, then {_mode}", lambda m, x, mode=_mode: m.b(F.pad(m.a(x), (1,) * 4, mode=mode)),
         lambda: wide(3, 3, bias=False, padding=1), layers=2)  # fmt: skip
    case(
        f"{_mode} between two 1x1s",
        lambda m, x, mode=_mode: m.b(F.pad(m.a(x), (1,) * 4, mode=mode)),
        lambda: wide(1, 1),
    )
case(
    "reflect and replicate in a sum",
    lambda m, x: m.a(x) + m.c(x),
    lambda: {
        "a": conv(padding=1, padding_mode="replicate"),
        "c": conv(padding=1, padding_mode="reflect"),
    },
    reason="padding mode",
    layers=2,
)
case("padded with a number", lambda m, x: m.b(F.pad(m.a(x), (1, 1, 1, 1), value=0.3)),
     lambda: wide(1, 3))  # fmt: skip
case("padded with a number, beside zeros",
     lambda m, x: m.a(F.pad(x, (1, 1, 1, 1), value=0.3)) + m.c(x),
     lambda: {"a": conv(), "c": conv(padding=1)})  # fmt: skip


# --- sizes that agree only sometimes, and broadcast ----------------------------------------------

# Reasons: "size".
PIXELS = ((2, 8, 3, 3), (1, 8, 3, 3), (3, 8, 3, 3))
case(
    "a branch of one pixel",
    lambda m, x: m.a(x) + m.c(x),
    lambda: {"a": conv(padding=1), "c": conv()},
    shapes=PIXELS,
    reason="size",
    layers=2,
)
case("a wide branch of one pixel", lambda m, x: m.c(x) + m.b(m.a(x)),
     lambda: {"c": conv(padding=1), **wide(3, 1)}, shapes=PIXELS)  # fmt: skip
case("pooled to one pixel", lambda m, x: m.a(x) + m.c(F.adaptive_avg_pool2d(x, 1)),
     lambda: {"a": conv(padding=1), "c": conv(kernel=1)}, layers=2)  # fmt: skip
case("pooled by its mean", lambda m, x: m.a(x) + m.c(x.mean((2, 3), keepdim=True)),
     lambda: {"a": conv(padding=1), "c": conv(kernel=1)}, layers=2)  # fmt: skip
case("sizes equal at even sizes only", lambda m, x: m.a(x) + m.c(x),
     lambda: {"a": conv(kernel=2, stride=2), "c": conv(kernel=1, stride=2)},
     shapes=((2, 8, 8, 8), (2, 8, 3, 3), (1, 8, 6, 3)), reason="size", layers=2)  # fmt: skip
case("phases added, not stacked", lambda m, x: m.a(x[:, :, ::2, ::2]) + m.c(x[:, :, 1::2, 1::2]),
     lambda: {"a": conv(kernel=1), "c": conv(kernel=1)},
     shapes=((2, 8, 8, 8), (2, 8, 3, 3), (1, 8, 6, 3)), layers=2)  # fmt: skip
case("a pixel added before a padded conv",
     lambda m, x: m.b(m.a(x) + m.c(F.adaptive_avg_pool2d(x, 1))),
     lambda: {"c": conv(8, 64, 1, bias=False), **wide(1, 3, bias=False, padding_b=1)})  # fmt: skip
case("a pixel of another source added before a padded conv",
     lambda m, x: m.b(m.a(x) + m.c(x.sigmoid())),
     lambda: {
         "a": conv(8, 64, padding=1, bias=False), "c": conv(8, 64, bias=False),
         "b": conv(64, 8, padding=1),
     }, shapes=PIXELS)  # fmt: skip
case("a pixel of another source added before a 1x1",
     lambda m, x: m.b(m.a(x) + m.c(x.sigmoid())),
     lambda: {"c": conv(8, 64), **wide(3, 1, padding=1)}, shapes=PIXELS)  # fmt: skip
case("a fixed size upsampled", lambda m, x: m.a(x) + m.up(m.c(x)),
     lambda: {
         "a": conv(padding=1), "c": conv(kernel=1, stride=2), "up": nn.Upsample(size=(9, 9)),
     }, shapes=((2, 8, 9, 9), (1, 8, 9, 9), (1, 8, 8, 8)), layers=2)  # fmt: skip
case("1x1 below a fixed size", lambda m, x: m.b(m.up(m.a(x))),
     lambda: {"up": nn.Upsample(size=(5, 4), mode="bilinear"), **wide(1, 1)})  # fmt: skip


# --- channels ------------------------------------------------------------------------------------

ONE_OR_THREE = ((2, 1, 9, 9), (1, 1, 7, 8), (2, 3, 9, 9))
case(
    "a mean of three channels",
    lambda m, x: m.a(x - m.mean),
    lambda: {"a": conv(3, 8), "mean": nn.Parameter(torch.randn(3, 1, 1))},
    shapes=ONE_OR_THREE,
)
case(
    "a deviation of three channels",
    lambda m, x: m.a((x - m.mean) / m.std),
    lambda: {
        "a": conv(3, 8, padding=1),
        "mean": torch.randn(1, 3, 1, 1),
        "std": torch.rand(1, 3, 1, 1) + 1,
    },
    shapes=ONE_OR_THREE,
)
case("a branch of one channel", lambda m, x: m.a(x) + m.c(x),
     lambda: {"a": conv(padding=1), "c": conv(8, 1, padding=1)})  # fmt: skip
case("a branch of one channel below a 1x1", lambda m, x: m.b(m.a(x) + m.c(x)),
     lambda: {"c": conv(8, 1, padding=1), **wide(3, 1, padding=1)})  # fmt: skip
ACROSS = ((2, 8, 9, 8), (1, 8, 5, 8), (1, 8, 8, 8))
case("a vector along the width", lambda m, x: m.b(m.a(x) * m.c),
     lambda: {"c": nn.Parameter(torch.rand(8) + 0.5), "a": conv(padding=1), "b": conv(kernel=1)},
     shapes=ACROSS)  # fmt: skip
case("a shift along the width", lambda m, x: m.b(m.a(x) + m.c),
     lambda: {"c": nn.Parameter(torch.randn(1, 8)), "a": conv(kernel=1), "b": conv(padding=1)},
     shapes=ACROSS)  # fmt: skip
case("a column", lambda m, x: m.b(m.a(x) * m.c),
     lambda: {"c": nn.Parameter(torch.rand(8, 1) + 0.5), "a": conv(kernel=1), "b": conv(kernel=1)},
     shapes=((2, 8, 8, 9), (1, 8, 8, 5)))  # fmt: skip
case("BatchNorm1d over tokens, as many as features",
     lambda m, x: m.b(m.norm(m.a(x))),
     lambda: {"a": nn.Linear(8, 8), "norm": nn.BatchNorm1d(8), "b": nn.Linear(8, 8)},
     shapes=((2, 8, 8), (1, 8, 8)))  # fmt: skip
case("channel shuffle between grouped 1x1s",
     lambda m, x: m.b(m.a(x).unflatten(1, (4, 16)).transpose(1, 2).flatten(1, 2)),
     lambda: wide(1, 1, groups=4, groups_b=4))  # fmt: skip
case("pixel shuffle between 1x1s", lambda m, x: m.b(F.pixel_shuffle(m.a(x), 2)),
     lambda: {"a": conv(8, 64, 1), "b": conv(16, 8, 1)})  # fmt: skip


# --- one layer, several calls --------------------------------------------------------------------

NORMS = {"n1": nn.BatchNorm2d, "n2": nn.BatchNorm2d}


def _two_norms(channels: int = 8) -> dict[str, Any]:
    return {name: kind(channels) for name, kind in NORMS.items()}


def _shared_once(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    return torch.relu(m.n1(y)), torch.sigmoid(m.n2(y))


case("one value under two BatchNorms", _shared_once, lambda: {"a": conv(), **_two_norms()})
case("one value under two BatchNorms, wide",
     lambda m, x: (m.b(m.n1(m.a(x))), torch.relu(m.n2(m.a(x)))),
     lambda: {**wide(3, 1), **_two_norms(64)})  # fmt: skip
case("a shared conv under two BatchNorms",
     lambda m, x: torch.relu(m.n1(m.a(x))) * torch.sigmoid(m.n2(m.a(x.abs()))),
     lambda: {"a": conv(padding=1), **_two_norms()}, layers=2)  # fmt: skip
case("a shared weight under two BatchNorms",
     lambda m, x: m.n1(call(m.a, x)).relu() + m.n2(F.conv2d(x.abs(), m.a.weight, padding=1)),
     lambda: {"a": conv(padding=1, bias=False), **_two_norms()}, layers=2)  # fmt: skip
case(
    "a shared BatchNorm over two convs",
    lambda m, x: m.n1(m.a(x)).relu() * m.n1(m.b(x.abs())).sigmoid(),
    lambda: {"a": conv(padding=1), "b": conv(kernel=3, padding=1), **_two_norms()},
    layers=2,
)
case("a shared conv in two chains",
     lambda m, x: m.b(m.a(x)).relu() + m.c(m.a(x.abs())).sigmoid(),
     lambda: {"c": conv(64, 8, padding=1), **wide(1, 3, padding_b=1)})  # fmt: skip
case("a shared conv twice in one chain", lambda m, x: m.a(m.a(x)),
     lambda: {"a": conv(padding=1, bias=False)}, layers=2)  # fmt: skip


# --- concatenation of split channels -------------------------------------------------------------


def _reversed(m: Any, x: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, 1)
    return torch.cat([m.b(x2), m.a(x1)], 1)


def _twice(m: Any, x: Tensor) -> Tensor:
    x1, _ = x.chunk(2, dim=1)
    return torch.cat([m.a(x1), m.b(x1)], 1)


def _unequal(m: Any, x: Tensor) -> Tensor:
    x1, x2 = x.split([4, 4], 1)
    return torch.cat([m.a(x1), m.b(x2)], 1)


def _halves(a: int = 4, b: int = 4, inputs: int = 4, **how: Any) -> dict[str, Any]:
    how = {"padding": 1, **how}
    return {"a": conv(inputs, a, **how), "b": conv(8 - inputs, b, **how)}


case("concat in the wrong order", _reversed, _halves)
case("concat in the wrong order below a 1x1", lambda m, x: m.c(_reversed(m, x)),
     lambda: {**_halves(32, 32), "c": conv(64, 8, 1)})  # fmt: skip
case("concat of unequal outputs", _unequal, lambda: _halves(2, 6))
case("concat of unequal outputs below a 1x1", lambda m, x: m.c(_unequal(m, x)),
     lambda: {**_halves(24, 40), "c": conv(64, 8, 1)})  # fmt: skip
case("concat of one chunk twice", _twice, _halves)
case("concat of unequal chunks", lambda m, x: torch.cat([m.a(x[:, :3]), m.b(x[:, 3:])], 1),
     lambda: _halves(inputs=3))  # fmt: skip
case("concat of overlapping chunks", lambda m, x: torch.cat([m.a(x[:, :4]), m.b(x[:, 3:7])], 1),
     _halves)  # fmt: skip
case("concat of every other channel", lambda m, x: torch.cat([m.a(x[:, ::2]), m.b(x[:, 1::2])], 1),
     _halves)  # fmt: skip
case("a chunk left out", lambda m, x: torch.cat([m.a(x[:, :4]), x[:, 6:]], 1), _halves)
case("concat of differently padded chunks",
     lambda m, x: torch.cat([m.a(x[:, :4]), m.b(x[:, 4:])], 1),
     lambda: {"a": conv(4, 4, padding=1), "b": conv(4, 4, 5, padding=2)})  # fmt: skip
case("concat of grouped convs of one source", lambda m, x: m.b(torch.cat([m.a(x), m.c(x)], 1)),
     lambda: {
         "a": conv(8, 32, padding=1, groups=2), "c": conv(8, 32, padding=1, groups=2),
         "b": conv(64, 8, 1, groups=4),
     })  # fmt: skip
case("groups that cross a concat", lambda m, x: m.b(torch.cat([m.a(x), x, m.a(x.abs())], 1)),
     lambda: {"a": conv(8, 8, padding=1), "b": conv(24, 8, 1, groups=2)})  # fmt: skip
case("concat along the height", lambda m, x: m.b(torch.cat([m.a(x), m.c(x)], 2)),
     lambda: {"c": conv(8, 64, 1), **wide(1, 1)})  # fmt: skip
case("concat along the height -> padded conv", lambda m, x: m.b(torch.cat([m.a(x), m.a(x)], 2)),
     lambda: wide(1, 3, bias=False, padding_b=1))  # fmt: skip
# Of an odd width the last column is read by nobody, where one strided conv would read it.
case("slices that leave out the last column",
     lambda m, x: m.a(torch.cat([x[..., :-1:2], x[..., 1::2]], 1)),
     lambda: {"a": conv(16, 8, padding=1)},
     shapes=((2, 8, 3, 5), (1, 8, 4, 6), (1, 8, 5, 3), (1, 8, 4, 7)))  # fmt: skip


# --- siblings ------------------------------------------------------------------------------------

BROAD = ((2, 64, 5, 5), (3, 64, 4, 7), (1, 64, 1, 2))


def _siblings(**how: Any) -> dict[str, Any]:
    return {"a": conv(64, 8, 1, **how), "b": conv(64, 8, 1, **how)}


def _one_written(m: Any, x: Tensor) -> Any:
    a, b = m.a(x), m.b(x)
    a += b.sigmoid()
    return a, b.relu_()


def _source_written(m: Any, x: Tensor) -> Any:
    y = torch.exp(x)
    a = m.a(y)
    y.sqrt_()
    return a.relu(), m.b(y).relu()


# Views of one output are not contiguous: `view` raises on them where it did not on the original.
case("siblings viewed", lambda m, x: (m.a(x).view(x.size(0), -1), m.b(x).view(-1, 8)),
     _siblings, shapes=BROAD)  # fmt: skip
case("siblings, one written in place", _one_written, _siblings, shapes=BROAD)
case("siblings, the source written between", _source_written, _siblings, shapes=BROAD, layers=2)
case(
    "siblings of unlike stride",
    lambda m, x: (m.a(x).relu(), m.b(x).sigmoid()),
    lambda: {"a": conv(64, 8, 1), "b": conv(64, 8, 1, stride=2)},
    shapes=BROAD,
)
case("siblings, grouped", lambda m, x: (m.a(x).relu(), m.b(x).sigmoid()),
     lambda: _siblings(groups=4), shapes=BROAD)  # fmt: skip
case("siblings, one also in a sum", lambda m, x: (m.a(x) + m.b(x), m.b(x).sigmoid(), m.c(x)),
     lambda: {**_siblings(), "c": conv(64, 8, 1)}, shapes=BROAD)  # fmt: skip
case("siblings below one BatchNorm", lambda m, x: (m.n1(m.a(x)).relu(), m.n1(m.b(x)).sigmoid()),
     lambda: {**_siblings(), **_two_norms()}, shapes=BROAD)  # fmt: skip


# --- padding with a value ------------------------------------------------------------------------


def _value(m: Any) -> Tensor:
    return m.a.bias.view(1, -1, 1, 1)


def _assign(z: Tensor, v: Any, p: int = 1, sides: Iterable[str] = "tblr") -> Tensor:
    for side in sides:
        if side == "t":
            z[:, :, 0:p, :] = v
        elif side == "b":
            z[:, :, -p:, :] = v
        elif side == "l":
            z[:, :, :, 0:p] = v
        else:
            z[:, :, :, -p:] = v
    return z


def _zeros(y: Tensor, p: int = 1) -> Tensor:
    return F.pad(y, (p, p, p, p))


def _wrong_value(scale: float) -> Forward:
    return lambda m, x: m.b(_assign(_zeros(m.a(x)), _value(m) * scale))


def _rolled(m: Any, x: Tensor) -> Tensor:
    return m.b(_assign(_zeros(m.a(x)), m.a.bias.roll(1).view(1, -1, 1, 1)))


def _by_number(m: Any, x: Tensor) -> Tensor:
    return m.b(_assign(_zeros(m.a(x)), 0.25))


def _from_x(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.b(_assign(_zeros(y), y.mean((2, 3), keepdim=True)))


def _too_narrow(m: Any, x: Tensor) -> Tensor:
    return m.b(_assign(_zeros(m.a(x), 2), _value(m), 1))


def _too_wide(m: Any, x: Tensor) -> Tensor:
    return m.b(_assign(_zeros(m.a(x)), _value(m), 2))


def _wrong_dimension(m: Any, x: Tensor) -> Tensor:
    z = _assign(_zeros(m.a(x)), _value(m), sides="tbl")
    z[:, 0:1] = 0.5
    return m.b(z)


def _wrong_sample(m: Any, x: Tensor) -> Tensor:
    z = _assign(_zeros(m.a(x)), _value(m))
    z[0:1] = _value(m)
    return m.b(z)


def _inner_row(m: Any, x: Tensor) -> Tensor:
    z = _zeros(m.a(x))
    z[:, :, 1:2, :] = _value(m)
    return m.b(_assign(z, _value(m), sides="blr"))


def _every_other(m: Any, x: Tensor) -> Tensor:
    z = _assign(_zeros(m.a(x)), _value(m), sides="tbl")
    z[:, :, ::2, -1:] = _value(m)
    return m.b(z)


def _without_corners(m: Any, x: Tensor) -> Tensor:
    z = _assign(_zeros(m.a(x)), _value(m), sides="tb")
    z[:, :, 1:-1, :1] = _value(m)
    z[:, :, 1:-1, -1:] = _value(m)
    z[:, :, :1, :1] = 0.0
    return m.b(z)


def _corners_twice(m: Any, x: Tensor) -> Tensor:
    z = _zeros(m.a(x))
    z[:, :, :1] += _value(m)
    z[:, :, -1:] += _value(m)
    z[:, :, :, :1] += _value(m)
    z[:, :, :, -1:] += _value(m)
    return m.b(z)


def _before_padding(m: Any, x: Tensor) -> Tensor:
    return m.b(_zeros(_assign(m.a(x), _value(m))))


def _after_reading(m: Any, x: Tensor) -> Any:
    z = _zeros(m.a(x))
    out = m.b(z)
    return out, _assign(z, _value(m)).sigmoid()


def _overwritten(m: Any, x: Tensor) -> Tensor:
    z = _assign(_zeros(m.a(x)), _value(m))
    z[:, :, :1] = 0.0
    return m.b(z)


def _two_values(m: Any, x: Tensor) -> Tensor:
    z = _assign(_zeros(m.a(x)), _value(m), sides="tb")
    return m.b(_assign(z, 2 * _value(m), sides="lr"))


def _view_before(m: Any, x: Tensor) -> Any:
    z = _zeros(m.a(x))
    v = z[:, :, :2]
    return m.b(_assign(z, _value(m))), v.relu()


def _view_written(m: Any, x: Tensor) -> Tensor:
    z = _assign(_zeros(m.a(x)), _value(m))
    v = z[:, :, :, 2:]
    v *= 2
    return m.b(z)


def _read_before(m: Any, x: Tensor) -> Any:
    z = _zeros(m.a(x))
    early = torch.relu(z)
    return m.b(_assign(z, _value(m))), early


def _read_between(m: Any, x: Tensor) -> Any:
    z = _assign(_zeros(m.a(x)), _value(m), sides="tb")
    early = m.b(z)
    return early, m.b(_assign(z, _value(m), sides="lr"))


def _zero_sibling(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.b(_assign(_zeros(y), _value(m))) + m.c(y)


def _zero_sibling_pad(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.c(_zeros(y)) + m.b(_assign(_zeros(y), _value(m)))


def _other_bias(m: Any, x: Tensor) -> Tensor:
    """A BatchNorm lies between: the value on zero input is not the conv's bias."""
    return m.b(_assign(_zeros(m.norm(m.a(x))), _value(m)))


def _padded_below(m: Any, x: Tensor) -> Tensor:
    """Right for a 1x1, but this one pads again after the assignments."""
    return m.c(_assign(_zeros(m.a(x)), _value(m)))


OTHERS = {side: "tblr".replace(side, "") for side in "tblr"}
PADDINGS: dict[str, tuple[Forward, dict[str, Any]]] = {
    "a value slightly wrong": (_wrong_value(1.001), {}),
    "the value negated": (_wrong_value(-1.0), {}),
    "the value of other channels": (_rolled, {}),
    "one number for all channels": (_by_number, {}),
    "a value that depends on x": (_from_x, {"layers": 2}),
    "too narrow": (_too_narrow, {"second": 5}),
    "too wide": (_too_wide, {"layers": 2}),
    "the channels overwritten instead of a side": (_wrong_dimension, {}),
    "a sample overwritten": (_wrong_sample, {"layers": 2}),
    "an inner row": (_inner_row, {"layers": 2}),
    "every other pixel of a side": (_every_other, {}),
    "a corner missing": (_without_corners, {}),
    "added, so that corners get it twice": (_corners_twice, {}),
    "assigned before the padding": (_before_padding, {"layers": 2}),
    "assigned after it was read": (_after_reading, {}),
    "overwritten with zeros": (_overwritten, {}),
    "two values": (_two_values, {}),
    "a view taken before": (_view_before, {}),
    "a view written": (_view_written, {"layers": 2}),
    "read before": (_read_before, {}),
    "read between": (_read_between, {}),
    "a zero-padded sibling": (_zero_sibling, {"c": {"padding": 1}}),
    "a zero-padded sibling by F.pad": (_zero_sibling_pad, {"c": {}}),
    "a BatchNorm between": (_other_bias, {"norm": True}),
    "padded once more": (_padded_below, {"c": {"padding": 1}}),
    **{
        f"without {side}": (
            lambda m, x, s=side: m.b(_assign(_zeros(m.a(x)), _value(m), sides=OTHERS[s])), {},
        )
        for side in "tblr"
    },
    "rows twice, no columns": (
        lambda m, x: m.b(_assign(_zeros(m.a(x)), _value(m), sides="tbtb")), {},
    ),
}  # fmt: skip


def _pad_parts(second: int = 3, c: dict[str, Any] | None = None, norm: bool = False) -> Any:
    parts = wide(1, second)
    if c is not None:
        parts["c"] = conv(64, 8, **c)
    if norm:
        parts["norm"] = nn.BatchNorm2d(64)
    return parts


for _name, (_forward, _how) in PADDINGS.items():
    _kept: dict[str, Any] = {key: _how[key] for key in _how if key == "layers"}
    _how = {key: _how[key] for key in _how if key != "layers"}
    case(f"bias padding: {_name}", _forward, lambda how=_how: _pad_parts(**how), **_kept)


# --- writes and aliases --------------------------------------------------------------------------


def _input_written(m: Any, x: Tensor) -> Tensor:
    y = m.b(m.a(x))
    x += 1
    return y + x


def _input_written_first(m: Any, x: Tensor) -> Tensor:
    x.relu_()
    return m.b(m.a(x))


def _same_object(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    z = y
    z += m.c(x)
    return m.b(z), y.sigmoid()


def _middle_partly_written(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    y[:, :4] = 0.5
    return m.b(y)


def _middle_scaled_partly(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    y[:, :, 1:] *= 2
    return m.b(y)


def _pixel_written(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    y[:, :, 0, 0] = 1.0
    return m.b(y)


def _view_then_written(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    v = y.flatten(2)
    y.mul_(2)
    return m.b(y), v.sigmoid()


def _middle_written_late(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    out = m.b(y)
    y.sigmoid_()
    return out, y


def _alias(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    d = m.drop(y)  # in eval the same tensor
    d += 1
    return m.b(y), d.sigmoid()


case("the input written afterwards", _input_written, lambda: wide(3, 1, padding=1))
case("the input written before", _input_written_first, lambda: wide(3, 1, padding=1))
# fx writes `z += c` as an assignment to y as well: a second trace sees one name.
case("one tensor under two names", _same_object,
     lambda: {"c": conv(8, 64, 1), **wide(3, 1, padding=1)}, again=False)  # fmt: skip
for _forward in (
    _middle_partly_written, _middle_scaled_partly, _pixel_written, _view_then_written,
    _middle_written_late,
):  # fmt: skip
    case(_forward.__name__.strip("_").replace("_", " "), _forward, lambda: wide(3, 1, padding=1))
for _drop in (
    nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.Identity,
):  # fmt: skip
    case(f"{_drop.__name__} is an alias", _alias,
         lambda drop=_drop: {"drop": drop(), **wide(3, 1, padding=1)})  # fmt: skip
for _function in (F.dropout, F.alpha_dropout, F.feature_alpha_dropout, F.dropout2d):
    case(
        f"F.{_function.__name__} is nothing",
        lambda m, x, f=_function: m.b(f(m.a(x), 0.5, False)),
        lambda: wide(3, 1, padding=1),
    )


# --- modules that are not what they look like ----------------------------------------------------


class Absolute(nn.Conv2d):
    """A subclass with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).abs()


class Shifted(nn.Conv2d):
    """A subclass that changes how it convolves."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x.roll(1, 3), weight, bias)


class ClampedNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-1, 1)


def _hooked(layer: nn.Module, *, before: bool = False) -> nn.Module:
    if before:
        layer.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    else:
        layer.register_forward_hook(lambda _m, _args, output: output.clamp(-0.2, 0.2))
    return layer


case("a hook on the first", chained,
     lambda: {**wide(3, 1), "a": _hooked(conv(8, 64))}, layers=2)  # fmt: skip
case("a hook on the second", chained,
     lambda: {**wide(3, 1), "b": _hooked(conv(64, 8, 1))})  # fmt: skip
case("a pre-hook on the second", chained,
     lambda: {**wide(3, 1), "b": _hooked(conv(64, 8, 1), before=True)})  # fmt: skip
case("a hook on a padding", lambda m, x: m.b(m.pad(m.a(x))),
     lambda: {**wide(1, 3, bias=False), "pad": _hooked(nn.ZeroPad2d(1))}, layers=2)  # fmt: skip
case("a hook on an average", lambda m, x: m.b(m.pool(m.a(x))),
     lambda: {**wide(1, 1, bias=False), "pool": _hooked(nn.AvgPool2d(2))}, layers=2)  # fmt: skip
case("a subclass with its own forward", chained,
     lambda: {**wide(3, 1), "a": Absolute(8, 64, 3)}, layers=2)  # fmt: skip
case("a subclass with its own _conv_forward", chained,
     lambda: {**wide(3, 1), "b": Shifted(64, 8, 1)})  # fmt: skip
case("a BatchNorm with its own forward", lambda m, x: m.b(m.norm(m.a(x))),
     lambda: {**wide(3, 1), "norm": ClampedNorm(64)}, layers=2)  # fmt: skip
case("batch statistics", lambda m, x: m.b(m.norm(m.a(x))),
     lambda: {**wide(3, 1), "norm": nn.BatchNorm2d(64, track_running_stats=False)},
     shapes=SHAPES[:3], reason="batch statistics", layers=2)  # fmt: skip
case("instance statistics", lambda m, x: m.b(m.norm(m.a(x))),
     lambda: {**wide(3, 1, padding=1), "norm": nn.InstanceNorm2d(64)},
     shapes=SHAPES[:3], layers=2)  # fmt: skip
case("a group norm", lambda m, x: m.b(m.norm(m.a(x))),
     lambda: {**wide(3, 1, padding=1), "norm": nn.GroupNorm(4, 64)}, layers=2)  # fmt: skip
# Inductor's freezing scales the wrong axis here.
case("grouped transposed conv -> BatchNorm", lambda m, x: m.norm(m.a(x)),
     lambda: {"a": nn.ConvTranspose2d(8, 8, 3, stride=2, groups=2), "norm": nn.BatchNorm2d(8)},
     layers=1)  # fmt: skip


def _cancelling() -> dict[str, Any]:
    """Two branches of a thousand times what their sum is."""
    parts = {"a": conv(padding=1), "c": conv(padding=1)}
    with torch.no_grad():
        parts["a"].weight.add_(100)
        parts["c"].weight.sub_(100)
    return parts


case("cancellation", lambda m, x: m.a(x) + m.c(x), _cancelling)
case("cancelled", lambda m, x: m.a(x) - m.a(x) + m.c(x), _cancelling)


# --- the tests -----------------------------------------------------------------------------------

ALL = list(CASES)


@pytest.mark.parametrize("name", ALL)
def test_stays_equal(name: str) -> None:
    made = CASES[name]
    check(made.make().eval(), made.shapes, batchnorms=None, again=made.again, **made.kept)


@pytest.mark.parametrize("name", ALL)
def test_stays_equal_without_the_cost_rule(name: str) -> None:
    made = CASES[name]
    check(
        made.make().eval(), made.shapes, batchnorms=None, cost="always", more_work=True,
        example_inputs=True, again=made.again, **made.kept,
    )  # fmt: skip


@pytest.mark.parametrize("name", ALL)
def test_the_answer_does_not_hang_on_validation(name: str) -> None:
    """What the algebra forbids must be declined by it, not caught by the check on the spot."""
    made = CASES[name]
    check(
        made.make().eval(), made.shapes, batchnorms=None, cost="always", more_work=True,
        validate=False, again=made.again, **made.kept,
    )  # fmt: skip


@pytest.mark.parametrize("name", [name for name in ALL if CASES[name].reason])
def test_says_why(name: str) -> None:
    made = CASES[name]
    check(made.make().eval(), made.shapes, batchnorms=None, reasons=[str(made.reason)])


def test_unbatched_concat_on_dimension_1_is_the_height() -> None:
    """Conv2d takes (C, H, W), where dim=1 is no channel: only an example tells."""
    for forward in (
        lambda m, x: m.b(torch.cat([m.a(x), m.a(x)], 1)),
        lambda m, x: torch.cat([m.a(x), m.c(x)], 1),
        lambda m, x: m.b(m.a(x)[:, :4]),
        lambda m, x: m.b(torch.cat([m.a(x), m.c(x)], 0)[:64]),
    ):
        model = Body(forward, c=conv(8, 64, padding=1), **wide(3, 1, padding=1)).eval()
        shapes = ((8, 9, 9), (8, 8, 7))
        for cost in ("macs", "always"):
            check(model, shapes, example_inputs=True, cost=cost, more_work=cost == "always")
