"""Chains of layers, padding and average pooling on their own, outside any published block.

Each in two or more spellings. `CHAIN_BLOCKS` lists what must collapse, `INVERTED` the chains that
may, as long as they stay exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from support.blocks import Block, normalise
from support.blocks_linear import SIZES, spelt
from support.models import call, conv, conv_bn


def _chains() -> Iterator[Block]:
    """Two or more layers in a row, wide in the middle, so that one layer is less work."""

    def pair(name: str, first: Callable[[], Any], second: Callable[[], Any], **how: Any) -> Any:
        yield from spelt(
            name,
            lambda: {"a": first(), "b": second()},
            lambda m, x: m.b(m.a(x)),
            lambda m, x: call(m.b, F.dropout(call(m.a, x), training=False)),
            **how,
        )

    for how in ({}, {"groups": 2}, {"groups": 8}):
        wide = {"bias": False, **how}
        for name, changes in (
            ("stride 1", {}), ("stride 2", {"stride": 2}), ("dilated", {"dilation": 2}),
            ("rows padded", {"padding": (1, 0)}),
        ):  # fmt: skip
            said = f"({how or ''}, {name})"
            outer: dict[str, Any] = {"padding": 1, **changes}
            yield from pair(
                f"kxk->1x1{said}", lambda h=how, o=outer: conv(8, 64, **h, **o),
                lambda h=how: conv(64, 8, 1, **h),
            )  # fmt: skip
            yield from pair(
                f"1x1->kxk unbiased{said}", lambda w=wide: conv(8, 64, 1, **w),
                lambda h=how, o=outer: conv(64, 8, **h, **o),
            )  # fmt: skip
            free = {**outer, "padding": 0}
            yield from pair(
                f"1x1->kxk unpadded{said}", lambda h=how: conv(8, 64, 1, **h),
                lambda h=how, o=free: conv(64, 8, **h, **o),
            )  # fmt: skip
        yield from pair(
            f"kx1->1xk unbiased({how or ''})",
            lambda w=wide: conv(8, 64, (3, 1), padding=(1, 0), **w),
            lambda h=how: conv(64, 8, (1, 3), padding=(0, 1), **h),
        )
        # The bias of the first meets no padding of the second.
        yield from pair(
            f"kx1->1xk biased, unpadded({how or ''})",
            lambda h=how: conv(8, 64, (5, 1), padding=(2, 0), **h),
            lambda h=how: conv(64, 8, (1, 3), **h),
        )
        yield from pair(
            f"3x3->3x3 unpadded({how or ''})",
            lambda h=how: conv(8, 64, padding=2, **h), lambda h=how: conv(64, 8, **h),
        )  # fmt: skip
    yield from pair(
        "strided pair",
        lambda: conv(8, 64, 2, stride=2, padding=1), lambda: conv(64, 8, 1, stride=2),
    )  # fmt: skip
    # Taps of the second lie two pixels apart: a 3x3 dilated by 2, not a 5x5.
    yield from pair(
        "1x1 stride 2->3x3", lambda: conv(8, 64, 1, stride=2), lambda: conv(64, 8, stride=2)
    )
    yield from spelt(
        "1x1->3x3->1x1 unbiased",
        lambda: {
            "a": conv_bn(8, 64, 1)[0], "b": conv(64, 64, padding=1, bias=False, groups=2),
            "c": conv(64, 8, 1, groups=2), "norm": nn.BatchNorm2d(8),
        },
        lambda m, x: m.norm(m.c(m.b(m.a(x)))),
        lambda m, x: normalise(m.norm, call(m.c, call(m.b, call(m.a, x)))),
    )  # fmt: skip
    yield from spelt(
        "BatchNorms along a chain of 1x1s",
        lambda: {"a": conv_bn(8, 32, 1), "b": conv_bn(32, 32, 1), "c": conv_bn(32, 8, 1)},
        lambda m, x: m.c(m.b(m.a(x))),
        lambda m, x: normalise(m.c[1], m.c[0](m.b[1](m.b[0](m.a(x))))),
    )  # fmt: skip
    yield from spelt(
        "transposed->1x1",
        lambda: {"a": nn.ConvTranspose2d(8, 64, 4, 2, 1), "b": conv(64, 8, 1)},
        lambda m, x: m.b(m.a(x)),
        lambda m, x: call(m.b, F.conv_transpose2d(x, m.a.weight, m.a.bias, 2, 1)),
    )
    yield from spelt(
        "1x1 unbiased->transposed",
        lambda: {"a": conv(8, 64, 1, bias=False), "b": nn.ConvTranspose2d(64, 8, 4, 2, 1)},
        lambda m, x: m.b(m.a(x)),
        lambda m, x: F.conv_transpose2d(call(m.a, x), m.b.weight, m.b.bias, 2, 1),
    )
    for rank, kind in ((1, nn.Conv1d), (3, nn.Conv3d)):
        yield from spelt(
            f"kxk->1x1 in {rank}d",
            lambda k=kind: {"a": k(4, 32, 3, padding=1), "b": k(32, 4, 1)},
            lambda m, x: m.b(m.a(x)),
            shapes=((2, 4, *(5,) * rank), (1, 4, *(4, 6, 3)[:rank])),
        )  # fmt: skip
    for shapes in (((2, 8), (3, 8)), ((2, 5, 8), (1, 7, 8))):
        yield from spelt(
            f"Linear->Linear{shapes[0]}",
            lambda: {"a": nn.Linear(8, 64), "b": nn.Linear(64, 8), "drop": nn.Dropout()},
            lambda m, x: m.b(m.drop(m.a(x))),
            lambda m, x: F.linear(F.linear(x, m.a.weight, m.a.bias), m.b.weight, m.b.bias),
            shapes=shapes,
        )  # fmt: skip
        yield from spelt(
            f"LoRA{shapes[0]}",
            lambda: {
                "base": nn.Linear(8, 8), "a": nn.Linear(8, 2, bias=False),
                "b": nn.Linear(2, 8, bias=False), "drop": nn.Dropout(),
            },
            lambda m, x: m.base(x) + m.b(m.a(m.drop(x))) * 0.5,
            lambda m, x: torch.add(m.base(x), F.linear(m.a(x), m.b.weight), alpha=0.5),
            shapes=shapes, example_inputs=True,
        )  # fmt: skip


def _padded() -> Iterator[Block]:
    """Zero padding goes into the convolution: one operation instead of two."""
    one = {"operations": 1}
    for how in ({}, {"stride": 2}, {"groups": 4, "bias": False}):
        yield from spelt(
            f"F.pad->conv({how or ''})",
            lambda h=how: {"a": conv(**h), "pad": nn.ZeroPad2d(1)},
            lambda m, x: m.a(F.pad(x, (1, 1, 1, 1))),
            lambda m, x: m.a(m.pad(x)),
            lambda m, x: call(m.a, F.pad(input=x, pad=[1] * 4, mode="constant", value=0.0)),
            **one,
        )
    yield from spelt(
        "pad rows, conv pads columns",
        lambda: {"a": conv(padding=(0, 1)), "pad": nn.ConstantPad2d((0, 0, 1, 1), 0.0)},
        lambda m, x: m.a(m.pad(x)),
        lambda m, x: call(m.a, F.pad(x, (0, 0, 1, 1))),
        **one,
    )  # fmt: skip
    yield from spelt(
        "pad twice",
        lambda: {"a": conv(kernel=5, padding=1), "pad": nn.ZeroPad2d(1)},
        lambda m, x: m.a(m.pad(x)),
        lambda m, x: call(m.a, F.pad(F.pad(x, (1, 1)), (0, 0, 1, 1))),
        **one,
    )  # fmt: skip
    # No convolution pads one side only; in a sum the sides meet.
    yield from spelt(
        "one-sided pads in a sum",
        lambda: {
            "a": conv(kernel=2), "b": conv(kernel=2), "c": conv(padding=1),
            "low": nn.ZeroPad2d((1, 0, 1, 0)), "high": nn.ZeroPad2d((0, 1, 0, 1)),
        },
        lambda m, x: m.a(m.low(x)) + m.b(m.high(x)) + m.c(x),
        lambda m, x: m.c(x) + m.a(F.pad(x, (1, 0, 1, 0))) + m.b(F.pad(x, (0, 1, 0, 1))),
        **one,
    )  # fmt: skip
    yield from spelt(
        "one-sided pad in front of a chain",
        lambda: {
            "a": conv(8, 64, stride=2), "b": conv(64, 8, 1), "pad": nn.ZeroPad2d((0, 1, 0, 1)),
        },
        lambda m, x: m.b(m.a(m.pad(x))),
        lambda m, x: m.b(m.a(F.pad(x, (0, 1, 0, 1)))),
        operations=2,
    )  # fmt: skip
    yield from spelt(
        "crop after a padded conv",
        lambda: {"a": conv(padding=1)},
        lambda m, x: m.a(x)[:, :, 1:-1, 1:-1],
        lambda m, x: F.pad(m.a(x), (-1, -1, -1, -1)),
        shapes=SIZES[:2],  # of two pixels it leaves an empty output, where a smaller conv raises
        **one,
    )
    yield from spelt(
        "strided slice after a conv",
        lambda: {"a": conv(padding=1)},
        lambda m, x: m.a(x)[:, :, ::2, ::2],
        lambda m, x: m.a(x)[..., 0::2, :][..., 0::2],
        **one,
    )
    yield from spelt(
        "1x1 of a strided slice",
        lambda: {"a": conv(kernel=1)},
        lambda m, x: m.a(x[:, :, ::2, ::2]),
        lambda m, x: call(m.a, x[..., ::2][..., ::2, :]),
        **one,
    )


def _pooled() -> Iterator[Block]:
    """Average pooling as one more kernel, where that is not more work."""
    pools: dict[str, tuple[Any, ...]] = {
        "3, 1, 1": ({"kernel_size": 3, "stride": 1, "padding": 1}, {"padding": 1}),
        "3, 2, 1": ({"kernel_size": 3, "stride": 2, "padding": 1}, {"padding": 1, "stride": 2}),
        "3, 1, 0": ({"kernel_size": 3, "stride": 1}, {}),
        "uncounted without padding": (
            {"kernel_size": 3, "stride": 1, "count_include_pad": False}, {},
        ),
        # With stride 1 there is nothing to round up.
        "ceil": ({"kernel_size": 3, "stride": 1, "padding": 1, "ceil_mode": True}, {"padding": 1}),
        "divisor": (
            {"kernel_size": 3, "stride": 1, "padding": 1, "divisor_override": 4}, {"padding": 1},
        ),
        "divisor, uncounted": (
            {
                "kernel_size": 3, "stride": 1, "padding": 1, "divisor_override": 5,
                "count_include_pad": False,
            }, {"padding": 1},
        ),
        "(3, 1)": (
            {"kernel_size": (3, 1), "stride": 1, "padding": (1, 0)}, {"padding": 1},
        ),
    }  # fmt: skip
    for name, (pool, how) in pools.items():
        for groups in (1, 8):
            yield from spelt(
                f"conv + avg_pool({name}, groups={groups})",
                lambda p=pool, h=how, g=groups: {
                    "a": conv_bn(8, 8, 3, groups=g, **h), "norm": nn.BatchNorm2d(8),
                    "pool": nn.AvgPool2d(**p), "how": p,
                },
                lambda m, x: m.a(x) + m.norm(m.pool(x)),
                lambda m, x: normalise(m.norm, F.avg_pool2d(x, **m.how)).add_(m.a(x)),
            )  # fmt: skip
    yield from spelt(
        "conv->avg_pool->1x1",
        lambda: {"a": conv(8, 64, padding=1), "b": conv(64, 8, 1), "pool": nn.AvgPool2d(2)},
        lambda m, x: m.b(m.pool(m.a(x))),
        lambda m, x: call(m.b, F.avg_pool2d(call(m.a, x), 2, 2)),
        shapes=SIZES[:2],
    )  # fmt: skip
    yield from spelt(
        "depthwise->avg_pool",
        lambda: {"a": conv(groups=8, padding=1), "pool": nn.AvgPool2d(2)},
        lambda m, x: m.pool(m.a(x)),
        lambda m, x: F.avg_pool2d(call(m.a, x), (2, 2)),
        operations=1,
    )
    yield from spelt(
        "avg_pool->wide conv->1x1",
        lambda: {"a": conv(8, 64, padding=0), "b": conv(64, 8, 1), "pool": nn.AvgPool2d(3, 1, 1)},
        lambda m, x: m.b(m.a(m.pool(x))),
        lambda m, x: m.b(m.a(F.avg_pool2d(x, 3, 1, 1))),
    )
    yield from spelt(
        "1x1 of cat of conv and avg_pool",
        lambda: {"a": conv(8, 64, padding=1), "b": conv(72, 8, 1), "pool": nn.AvgPool2d(3, 1, 1)},
        lambda m, x: m.b(torch.cat([m.a(x), m.pool(x)], 1)),
        lambda m, x: m.b(torch.concat((call(m.a, x), F.avg_pool2d(x, 3, 1, 1)), dim=-3)),
    )  # fmt: skip
    # cat raises where the sizes differ, so that at the others both see the same windows.
    yield from spelt(
        "1x1 of cat of strided conv and avg_pool",
        lambda: {
            "a": conv(8, 64, padding=1, stride=2), "b": conv(72, 8, 1), "pool": nn.AvgPool2d(2),
        },
        lambda m, x: m.b(torch.cat([m.a(x), m.pool(x)], 1)),
        lambda m, x: call(m.b, torch.cat(dim=1, tensors=(m.a(x), F.avg_pool2d(x, 2)))),
        shapes=((2, 8, 8, 10), (1, 8, 4, 6), (1, 8, 9, 9)),
    )  # fmt: skip


def _inverted(middle: int, groups: int, stride: int, norms: bool) -> nn.Module:
    layers = (
        conv(8, 64, 1, groups=groups, bias=not norms),
        conv(64, 64, padding=1, groups=middle, stride=stride, bias=not norms),
        conv(64, 8, 1, groups=groups, bias=not norms),
    )
    if not norms:
        return nn.Sequential(*layers)
    return nn.Sequential(*(nn.Sequential(c, nn.BatchNorm2d(c.out_channels)) for c in layers))


CHAIN_BLOCKS: tuple[Block, ...] = (*_chains(), *_padded(), *_pooled())

# biased 1x1 -> padded 3x3 -> 1x1 without activations, with BatchNorms or without: a name, a model
# and the numbers of layers that are right. The bias does not reach behind the border: one layer
# only where that is corrected. The last two layers always compose, but a depthwise middle is
# cheaper on its own.
INVERTED: tuple[tuple[str, Callable[[], nn.Module], Sequence[int]], ...] = tuple(
    (
        f"{middle} groups between {groups}, stride={stride}, norms={norms}",
        lambda m=middle, g=groups, s=stride, n=norms: _inverted(m, g, s, n),
        (1, 3) if middle == 64 else (1, 2),
    )
    for middle in (1, 4, 64)
    for groups in (1, 2)
    for stride in (1, 2)
    for norms in (False, True)
)
