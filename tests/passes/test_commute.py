"""Pointwise maps move to the smaller side of a pooling or a resize, or out of the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from support.check import assert_equal, check, count, inputs_of
from support.models import Body, call, conv

CONV: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
AVERAGE = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
SINGLE = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}
MAXIMUM = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}

EVEN = ((1, 8, 8, 8), (2, 8, 12, 4))
ODD = ((2, 8, 9, 7), (1, 8, 5, 5), (1, 8, 3, 2), (1, 8, 4, 6))


def at(rank: int, *sizes: int) -> tuple[tuple[int, ...], ...]:
    return tuple((1, 8, *(n + 2 * i for i in range(rank))) for n in sizes)


def convolved(model: nn.Module, shape: Any) -> int:
    """Multiply-accumulates of everything, BatchNorms included."""
    return count(model, inputs_of(shape, torch.float32)).macs


def ratio(model: nn.Module, optimized: nn.Module, shape: Any) -> float:
    return convolved(optimized, shape) / convolved(model, shape)


# --- a 1x1 and what gives fewer positions --------------------------------------------------------

# What follows the 1x1, and the share of the work that is left of an 8x8 image.
SMALLER: dict[str, tuple[Callable[[Any, Tensor], Tensor], float]] = {
    "avg_pool": (lambda m, x: F.avg_pool2d(m.a(x), 2), 1 / 4),
    "avg_pool, overlapping": (lambda m, x: F.avg_pool2d(m.a(x), 3, 2), 9 / 64),
    "uncounted padding": (
        lambda m, x: F.avg_pool2d(m.a(x), 3, 2, 1, count_include_pad=False), 1 / 4,
    ),
    "a last window that hangs over": (
        lambda m, x: F.avg_pool2d(m.a(x), 3, 2, ceil_mode=True), 1 / 4,
    ),
    "its own divisor": (lambda m, x: F.avg_pool2d(m.a(x), 2, divisor_override=4), 1 / 4),
    "module": (lambda m, x: m.pool(m.a(x)), 1 / 4),
    "functional conv": (lambda m, x: F.avg_pool2d(call(m.a, x), kernel_size=(2, 2)), 1 / 4),
    "adaptive to one": (lambda m, x: F.adaptive_avg_pool2d(m.a(x), 1), 1 / 64),
    "adaptive to one by one": (lambda m, x: F.adaptive_avg_pool2d(m.a(x), (1, 1)), 1 / 64),
    "module, adaptive to one": (lambda m, x: m.single(m.a(x)), 1 / 64),
    "mean": (lambda m, x: m.a(x).mean((-2, -1), keepdim=True), 1 / 64),
    "torch.mean": (lambda m, x: torch.mean(m.a(x), dim=[-1, -2], keepdim=True), 1 / 64),
    "pooled, then scaled": (lambda m, x: 2 * F.avg_pool2d(m.a(x), 4) / 3 - 1, 1 / 16),
    "scaled, then pooled": (lambda m, x: F.avg_pool2d(m.a(x) * 0.5 + 1, 2), 1 / 4),
    "activated after it": (lambda m, x: F.avg_pool2d(m.a(x), 2).relu_(), 1 / 4),
    "two poolings": (lambda m, x: F.adaptive_avg_pool2d(F.avg_pool2d(m.a(x), 2), 1), 1 / 64),
}  # fmt: skip


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", [name for name in SMALLER if SMALLER[name][1] > 1 / 64])
def test_1x1_runs_after_what_shrinks(name: str, bias: bool) -> None:
    forward, share = SMALLER[name]
    parts = {"pool": nn.AvgPool2d(2), "single": nn.AdaptiveAvgPool2d(1)}
    model = Body(forward, a=conv(8, 6, 1, bias=bias), **parts).eval()
    optimized = check(model, (*EVEN, *ODD), layers=1)
    left = convolved(optimized, EVEN[0])
    assert left == round(8 * 6 * 64 * share), f"{left} MACs"


@pytest.mark.parametrize("out", [6, 8, 16])
@pytest.mark.parametrize("name", [name for name in SMALLER if SMALLER[name][1] == 1 / 64])
def test_1x1_runs_after_a_global_pooling(name: str, out: int) -> None:
    parts = {"pool": nn.AvgPool2d(2), "single": nn.AdaptiveAvgPool2d(1)}
    model = Body(SMALLER[name][0], a=conv(8, out, 1), **parts).eval()
    optimized = check(model, (*EVEN, *ODD), layers=1)
    assert convolved(optimized, EVEN[0]) == 8 * out


def test_1x1_runs_after_a_pooling_of_2_that_is_scaled() -> None:
    model = nn.Sequential(conv(8, 6, 1), nn.AvgPool2d(2), nn.BatchNorm2d(6)).eval()
    optimized = check(model, (*EVEN, *ODD), layers=1)
    assert convolved(optimized, EVEN[0]) == 8 * 6 * 16


@pytest.mark.parametrize("name", ["chain", "norm", "sum", "groups"])
def test_what_is_pointwise_as_a_whole_runs_after_the_pooling(name: str) -> None:
    parts: dict[str, tuple[Callable[[Any, Tensor], Tensor], dict[str, Any]]] = {
        "chain": (lambda m, x: m.b(m.a(x)), {"a": conv(8, 32, 1), "b": conv(32, 8, 1)}),
        "norm": (lambda m, x: m.b(m.a(x)), {"a": conv(8, 8, 1), "b": nn.BatchNorm2d(8)}),
        "sum": (lambda m, x: m.a(x) + m.b(x) + x, {"a": conv(8, 8, 1), "b": conv(8, 8, 1)}),
        "groups": (lambda m, x: m.a(x), {"a": conv(8, 8, 1, groups=4)}),
    }
    forward, layers = parts[name]
    model = Body(lambda m, x: F.avg_pool2d(forward(m, x), 2), **layers).eval()
    optimized = check(model, (*EVEN, *ODD), layers=1, operations=2)
    assert convolved(optimized, EVEN[0]) == 16 * 8 * (2 if name == "groups" else 8)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("kind", [AVERAGE, SINGLE])
def test_every_rank(rank: int, kind: Any) -> None:
    pool = kind[rank](2 if kind is AVERAGE else 1)
    model = nn.Sequential(CONV[rank](8, 8, 1), NORM[rank](8), pool).eval()
    optimized = check(model, at(rank, 4, 2, 3, 5), layers=1)
    assert ratio(model, optimized, at(rank, 4)[0]) <= 1 / 2**rank


# --- a 1x1 and what gives more positions ---------------------------------------------------------

LARGER: dict[str, tuple[Callable[[Any, Tensor], Tensor], float]] = {
    "nearest": (lambda m, x: m.a(F.interpolate(x, scale_factor=2)), 1 / 4),
    "nearest-exact": (
        lambda m, x: m.a(F.interpolate(x, scale_factor=(2, 3), mode="nearest-exact")), 1 / 6,
    ),
    "bilinear": (lambda m, x: m.a(F.interpolate(x, scale_factor=2, mode="bilinear")), 1 / 4),
    "corners aligned": (
        lambda m, x: m.a(F.interpolate(x, None, 2, "bilinear", align_corners=True)), 1 / 4,
    ),
    "bicubic": (lambda m, x: m.a(F.interpolate(x, scale_factor=4, mode="bicubic")), 1 / 16),
    "module": (lambda m, x: m.a(m.up(x)), 1 / 4),
    "nearest module": (lambda m, x: m.a(m.nearest(x)), 1 / 4),
    "bilinear module": (lambda m, x: m.a(m.bilinear(x)), 1 / 4),
    "module, then functional": (lambda m, x: call(m.a, m.up(x)) - 1, 1 / 4),
}  # fmt: skip


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", LARGER)
def test_1x1_runs_before_what_enlarges(name: str, bias: bool) -> None:
    forward, share = LARGER[name]
    parts = {
        "up": nn.Upsample(scale_factor=2, mode="bicubic"),
        "nearest": nn.UpsamplingNearest2d(scale_factor=2),
        "bilinear": nn.UpsamplingBilinear2d(scale_factor=2),
    }
    model = Body(forward, a=conv(8, 6, 1, bias=bias), **parts).eval()
    optimized = check(model, (*EVEN, *ODD), layers=1)
    assert convolved(optimized, EVEN[0]) == 8 * 6 * 64
    assert convolved(model, EVEN[0]) >= 8 * 6 * 64 / share


# --- a BatchNorm out of the way ------------------------------------------------------------------


def _below(between: Callable[[Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    return lambda m, x: m.norm(between(m.a(x)))


# Positive scales, as `check` draws them: what keeps the order may stand between.
NORMS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "nearest": _below(lambda y: F.interpolate(y, scale_factor=2)),
    "bilinear to a size": _below(lambda y: F.interpolate(y, size=(7, 6), mode="bilinear")),
    "half the size": _below(lambda y: F.interpolate(y, scale_factor=0.5, mode="area")),
    "max_pool": _below(lambda y: F.max_pool2d(y, 2)),
    "max_pool, padded": _below(lambda y: F.max_pool2d(y, 3, 2, 1)),
    "max_pool, dilated": _below(lambda y: torch.max_pool2d(y, 2, 1, 1, 2)),
    "max_pool, ceil": _below(lambda y: F.max_pool2d(y, 2, ceil_mode=True)),
    "module": lambda m, x: m.norm(m.pool(m.a(x))),
    "adaptive maximum": lambda m, x: m.norm(m.adaptive(m.a(x))),
    "adaptive average": _below(lambda y: F.adaptive_avg_pool2d(y, (3, 2))),
    "pooled, uncounted": _below(lambda y: F.avg_pool2d(y, 3, 2, 1, count_include_pad=False)),
    "mean": _below(lambda y: y.mean((-1, -2), True)),
    "two of them": _below(lambda y: F.interpolate(F.max_pool2d(y, 2), scale_factor=2)),
}


@pytest.mark.parametrize("name", NORMS)
def test_batchnorm_folds_over_what_lies_between(name: str) -> None:
    parts = {"pool": nn.MaxPool2d(2), "adaptive": nn.AdaptiveMaxPool2d((2, 2))}
    model = Body(NORMS[name], a=conv(padding=1), norm=nn.BatchNorm2d(8), **parts).eval()
    check(model, (*EVEN, *ODD), layers=1)


WINDOWS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "max_pool of 3": _below(lambda y: F.max_pool2d(y, 3, 2)),
    "max_pool, dilated": _below(lambda y: F.max_pool2d(y, 2, 1, 0, 2)),
    "a quarter of the size": _below(lambda y: F.interpolate(y, scale_factor=0.25)),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_batchnorm_folds_over_windows_of_more_than_two(name: str) -> None:
    model = Body(WINDOWS[name], a=conv(padding=1), norm=nn.BatchNorm2d(8)).eval()
    check(model, (*EVEN, *ODD), layers=1)


@pytest.mark.parametrize("name", WINDOWS)
def test_batchnorm_folds_over_windows_without_validation(name: str) -> None:
    model = Body(WINDOWS[name], a=conv(padding=1), norm=nn.BatchNorm2d(8)).eval()
    check(model, (*EVEN, *ODD), layers=1, validate=False)


@pytest.mark.parametrize("transposed", [False, True])
def test_batchnorm_folds_over_a_pixel_shuffle(transposed: bool) -> None:
    """Each scale is repeated for all the channels that its output is made of."""
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    for factor, shuffle in ((2, nn.PixelShuffle(2)), (3, F.pixel_shuffle)):
        model = Body(
            lambda m, x, s=shuffle, f=factor: m.norm(s(m.a(x)) if f == 2 else s(m.a(x), f)),
            a=kind(8, 5 * factor**2, 3, padding=1), norm=nn.BatchNorm2d(5), shuffle=shuffle,
        ).eval()  # fmt: skip
        check(model, (*EVEN, *ODD), layers=1, operations=None)


@pytest.mark.parametrize("rank", [1, 3])
def test_batchnorm_folds_over_max_pooling_in_every_rank(rank: int) -> None:
    model = nn.Sequential(CONV[rank](8, 6, 3, padding=1), MAXIMUM[rank](2), NORM[rank](6)).eval()
    check(model, at(rank, 4, 2, 3, 5), layers=1)


# --- what stays ----------------------------------------------------------------------------------


def _negative(m: Any, x: Tensor) -> Tensor:
    return F.max_pool2d(m.a(x), 2) * m.c


# Of 48 * 64 multiply-accumulates at 8x8, none may go away; `norms` may neither.
STAYS: dict[str, tuple[Callable[[Any, Tensor], Any], dict[str, Any]]] = {
    "max_pool after the 1x1": (lambda m, x: F.max_pool2d(m.a(x), 2), {}),
    "1x1 after max_pool": (lambda m, x: m.a(F.max_pool2d(x, 2)), {}),
    "1x1 after a pooling": (lambda m, x: m.a(F.avg_pool2d(x, 2)), {}),
    "1x1 below an enlargement": (lambda m, x: F.interpolate(m.a(x), scale_factor=2), {}),
    "resize to a size": (lambda m, x: m.a(F.interpolate(x, size=(16, 16))), {}),
    "resize to a size after it": (lambda m, x: F.interpolate(m.a(x), size=(4, 4)), {}),
    "padding counted, biased": (lambda m, x: F.avg_pool2d(m.a(x), 3, 2, 1), {}),
    "another divisor, hanging over": (
        lambda m, x: F.avg_pool2d(m.a(x), 3, 2, 0, True, True, 5), {},
    ),
    "adaptive to more": (lambda m, x: F.adaptive_avg_pool2d(m.a(x), 16), {}),
    "adaptive to some": (lambda m, x: F.adaptive_avg_pool2d(m.a(x), (2, 3)), {}),
    "mean of the rows": (lambda m, x: m.a(x).mean(-2, keepdim=True), {}),
    "mean over channels too": (lambda m, x: m.a(x).mean((1, 2, 3), keepdim=True), {}),
    "read by another too": (lambda m, x: (F.avg_pool2d(y := m.a(x), 2), y), {}),
    "pixel shuffle of a 1x1": (lambda m, x: m.b(F.pixel_shuffle(m.a(x), 2)), {"b": conv(2, 3, 1)}),
    "written in place in between": (
        lambda m, x: (F.avg_pool2d((y := m.a(x)), 2), y.relu_())[0], {},
    ),
    "max_pool with its indices": (
        lambda m, x: F.max_pool2d(m.a(x), 2, return_indices=True), {},
    ),
    "a kernel, not a point": (lambda m, x: m.b(F.interpolate(x, scale_factor=2)),
        {"b": conv(8, 6, 3, padding=1)}),
}  # fmt: skip


@pytest.mark.parametrize("cost", ["macs", "always"])
@pytest.mark.parametrize("name", STAYS)
def test_stays(name: str, cost: str) -> None:
    forward, parts = STAYS[name]
    model = Body(forward, a=conv(8, 8, 1), **parts).eval()
    more = cost == "always"
    optimized = check(model, (*EVEN, *ODD), cost=cost, more_work=more, validate=False)
    assert more or convolved(optimized, EVEN[0]) == convolved(model, EVEN[0])


SIGNS = {
    "negative": -torch.ones(8, 1, 1), "one of them": torch.tensor([1.0] * 7 + [-1]).view(8, 1, 1),
    "zero": torch.tensor([1.0] * 7 + [0]).view(8, 1, 1),
}  # fmt: skip


@pytest.mark.parametrize("sign", SIGNS)
def test_a_scale_that_is_not_positive_stays_after_max_pooling(sign: str) -> None:
    model = Body(_negative, a=conv(padding=1), c=SIGNS[sign]).eval()
    check(model, (*EVEN, *ODD), layers=1, operations=3, rewrites=0, validate=False)


def test_a_batchnorm_with_a_negative_scale_stays_after_max_pooling() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return F.batch_norm(F.max_pool2d(m.a(x), 2), m.mean, m.var, m.gamma)

    for last, left in ((-1.0, 1), (1.0, 0)):
        gamma = torch.tensor([1.0] * 7 + [last])
        parts = {"mean": torch.zeros(8), "var": torch.ones(8), "gamma": gamma}
        model = Body(forward, a=conv(padding=1), **parts).eval()
        check(model, (*EVEN, *ODD), layers=1, batchnorms=left, validate=False)


def test_a_1x1_never_moves_to_the_larger_side() -> None:
    """A classifier over BN -> global pooling: the BatchNorm may not take the 1x1 along."""
    model = nn.Sequential(nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), conv(8, 6, 1)).eval()
    check(model, (*EVEN, *ODD), batchnorms=None)


def test_a_divisor_counts_the_padding() -> None:
    """What validation catches, the algebra must not propose."""
    pool = nn.AvgPool2d(2, 1, 1, count_include_pad=False, divisor_override=4)
    check(nn.Sequential(pool, conv(8, 4, 1)).eval(), (*EVEN, *ODD), validate=False)


class LinearOnWidth(nn.Module):
    """The channels of a Linear are the last dimension, over which the pooling goes."""

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.linear = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        self.pool = pool

    def forward(self, x):
        return self.pool(self.linear(x))


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("pool", [nn.AdaptiveAvgPool2d(1), nn.AvgPool2d(2), nn.AvgPool2d((2, 1))])
def test_a_linear_layer_on_the_width_stays_above_pooling(pool, validate):
    x = torch.randn(1, 4, 6, 8, dtype=torch.float64)
    assert len(assert_equal(LinearOnWidth(pool), x, validate=validate).rewrites) == 1


# --- over all of them ----------------------------------------------------------------------------


@st.composite
def movers(draw: st.DrawFn) -> Callable[[Tensor], Tensor]:
    """A pooling or a resize, commuting or not."""
    kind = draw(st.sampled_from(["average", "maximum", "adaptive", "resize", "size", "shuffle"]))
    kernel, stride = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    padding, ceil = draw(st.integers(0, kernel // 2)), draw(st.booleans())
    if kind == "average":
        # A divisor without counted padding: see above.
        counted, divisor = draw(st.booleans()), draw(st.sampled_from([None, None, kernel**2, 5]))
        counted = counted or divisor is not None
        return lambda x: F.avg_pool2d(x, kernel, stride, padding, ceil, counted, divisor)
    if kind == "maximum":
        return lambda x: F.max_pool2d(x, kernel, stride, padding, ceil_mode=ceil)
    if kind == "adaptive":
        return lambda x: F.adaptive_avg_pool2d(x, kernel + 1)  # not to one pixel: see above
    if kind == "shuffle":
        return lambda x: F.pixel_shuffle(x, 2)
    mode = draw(st.sampled_from(["nearest", "bilinear", "bicubic", "nearest-exact"]))
    if kind == "size":
        return lambda x: F.interpolate(x, size=(kernel + 1, stride + 3), mode=mode)
    factor = draw(st.sampled_from([2, 3, 0.5, 1.5]))
    return lambda x: F.interpolate(x, scale_factor=factor, mode=mode)


def _runs(model: nn.Module, shape: tuple[int, ...]) -> bool:
    try:
        with torch.no_grad():
            return bool(model(torch.zeros(shape)).numel())
    except (RuntimeError, ValueError):
        return False


@given(data=st.data(), cost=st.sampled_from(["macs", "always"]))
def test_any_pointwise_around_any_mover(data: st.DataObject, cost: str) -> None:
    """Layers, BatchNorms and scales of either sign on both sides of one mover or two."""
    channels, steps = 8, []
    parts: dict[str, Any] = {}
    for name in "abcde"[: data.draw(st.integers(2, 5))]:
        kind = data.draw(st.sampled_from(["layer", "norm", "mover", "mover", "scale"]))
        if kind == "mover":
            move = data.draw(movers())
            try:  # a pixel shuffle leaves fewer channels
                channels = move(torch.zeros(1, channels, 9, 9)).shape[1]
            except RuntimeError:
                continue
            steps.append(lambda m, x, move=move: move(x))
            continue
        if kind == "layer":
            out = data.draw(st.sampled_from([4, 8, 16]))
            parts[name] = conv(channels, out, data.draw(st.sampled_from([1, 1, 1, 2])))
            channels = out
        elif kind == "norm":
            parts[name] = nn.BatchNorm2d(channels)
        else:
            parts[name] = nn.Parameter(torch.randn(channels, 1, 1))
        steps.append(
            lambda m, x, n=name, scale=kind == "scale": (
                x * getattr(m, n) if scale else getattr(m, n)(x)
            )
        )

    def forward(m: Any, x: Tensor) -> Tensor:
        for step in steps:
            x = step(m, x)
        return x

    model = Body(forward, **parts).eval()
    shapes = [shape for shape in (*EVEN, *ODD) if _runs(model, shape)]
    assume(len(shapes) > 1)
    check(model, shapes, batchnorms=None, cost=cost, more_work=cost == "always", validate=False)
