"""Shapes of affine convolution maps: how they compose and add, without their weights.

Everything linear that fxrep rewrites is one map ``y = M(x) + b``. Per spatial axis M has a kernel
size k, stride s, zero padding on the low and the high side and dilation d: output i reads the
inputs ``i*s - low + j*d`` for j in 0..k-1. Over channels output o reads an interval of the
inputs (a `Band`), so that dense, grouped and depthwise convolutions, channel slices and
concatenations are all the same thing. ``Linear`` is the map with no spatial axis.

A transposed convolution has the same fields with the roles of input and output exchanged: input i
writes the outputs ``i*s - low + j*d``, and ``high`` is its padding less its output_padding.

Planning works on these objects alone; `fxrep.kernels` computes the weights that belong to them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Refusal:
    """Why something that looks like a rewrite is not one: the answer a user reads."""

    reason: str


@dataclass(frozen=True, slots=True)
class Axis:
    """One spatial axis of a map; a negative padding is a crop."""

    kernel: int = 1
    stride: int = 1
    low: int = 0
    high: int = 0
    dilation: int = 1

    @property
    def reach(self) -> int:
        """Distance between the first and the last tap."""
        return self.dilation * (self.kernel - 1)

    @property
    def excess(self) -> int:
        """Padding less reach: two maps of one stride give equal sizes iff they agree in it."""
        return self.low + self.high - self.reach

    @property
    def pointwise(self) -> bool:
        """Output i reads input i and nothing else."""
        return self.kernel == 1 and self.stride == 1 and self.low == 0 and self.high == 0

    @property
    def padded(self) -> bool:
        """Some output reads beyond an end."""
        return self.low > 0 or self.high > 0

    def needed(self, outputs: int) -> int:
        """The smallest input size that gives `outputs` positions."""
        return max(1, self.stride * (outputs - 1) + 1 - self.excess)


POINT = Axis()


@dataclass(frozen=True, eq=False)
class Band:
    """Which input channels each output channel reads: ``start[o] <= i < start[o] + width``."""

    starts: Tensor  # (O,) int64, on the CPU
    width: int
    inputs: int

    @property
    def outputs(self) -> int:
        """Number of output channels."""
        return len(self.starts)

    @cached_property
    def groups(self) -> int:
        """The largest number of groups whose blocks hold every interval."""
        common = math.gcd(self.outputs, self.inputs)
        for groups in range(min(common, self.inputs // self.width), 1, -1):
            if common % groups == 0 and self.fits(groups):
                return groups
        return 1

    def fits(self, groups: int) -> bool:
        """Whether every interval lies inside the block of its group."""
        block = self.inputs // groups
        starts = self.starts.view(groups, -1)
        first = torch.arange(groups) * block
        inside = (starts.amin(1) >= first) & (starts.amax(1) + self.width <= first + block)
        return bool(inside.all())

    @cached_property
    def is_diagonal(self) -> bool:
        """Output o reads input o and nothing else."""
        return (
            self.width == 1
            and self.outputs == self.inputs
            and bool((self.starts == torch.arange(self.outputs)).all())
        )


@lru_cache(maxsize=512)
def grouped_band(outputs: int, inputs: int, groups: int) -> Band:
    """The band of a convolution with `groups` groups."""
    block = inputs // groups
    starts = torch.arange(groups).repeat_interleave(outputs // groups) * block
    return Band(starts, block, inputs)


def _compose_bands(outer: Band, inner: Band) -> Band:
    """The hull of the inner intervals that each outer interval covers."""
    if inner.is_diagonal:
        return outer
    if outer.width == 1:
        return inner if outer.is_diagonal else replace(inner, starts=inner.starts[outer.starts])
    distinct, where = torch.unique(outer.starts, return_inverse=True)
    windows = inner.starts.unfold(0, outer.width, 1)[distinct]
    return _band(windows.amin(1)[where], windows.amax(1)[where] + inner.width, inner.inputs)


def _hull(bands: Sequence[Band]) -> Band:
    """The smallest band that holds all of them."""
    if all(band is bands[0] for band in bands):
        return bands[0]
    starts = torch.stack([band.starts for band in bands])
    ends = torch.stack([band.starts + band.width for band in bands])
    return _band(starts.amin(0), ends.amax(0), bands[0].inputs)


def _band(starts: Tensor, ends: Tensor, inputs: int) -> Band:
    width = int((ends - starts).max())
    return Band(starts.clamp(max=inputs - width), width, inputs)


@dataclass(frozen=True, eq=False)
class Map:
    """The shape of one affine convolution map (its weight is ``(O, band.width, *kernel)``)."""

    axes: tuple[Axis, ...]
    band: Band
    transposed: bool = False
    padding_mode: str = "zeros"

    @property
    def inputs(self) -> int:
        """Number of input channels."""
        return self.band.inputs

    @property
    def outputs(self) -> int:
        """Number of output channels."""
        return self.band.outputs

    @property
    def channel_axis(self) -> int:
        """The channels' dimension, counted from the last: -1 for Linear, -3 for Conv2d."""
        return -len(self.axes) - 1

    @property
    def kernel(self) -> tuple[int, ...]:
        """Kernel size per axis."""
        return tuple(axis.kernel for axis in self.axes)

    @property
    def pointwise(self) -> bool:
        """Output position i depends on input position i alone."""
        return not self.transposed and all(axis.pointwise for axis in self.axes)

    @property
    def padded(self) -> bool:
        """Some output reads beyond an end, on some axis."""
        return any(axis.padded for axis in self.axes)

    @property
    def symmetric(self) -> bool:
        """Whether a layer does this padding itself; otherwise a pad comes before it."""
        return self.transposed or all(a.low == a.high and a.low >= 0 for a in self.axes)

    @property
    def weights(self) -> int:
        """Elements of the weight of a convolution that computes this map."""
        return self.outputs * (self.inputs // self.band.groups) * math.prod(self.kernel)


@dataclass(frozen=True)
class Diagonal:
    """A map that scales each channel, of any rank; with no axis it scales all alike.

    Attributes:
        channels: number of channels, None when any.
        axis: the dimension it scales, counted from the last; None when it scales all alike.
    """

    channels: int | None = None
    axis: int | None = None


IDENTITY = Diagonal()
Linear = Map | Diagonal


def conv_map(
    *,
    outputs: int,
    inputs: int,
    groups: int,
    axes: Sequence[Axis],
    transposed: bool = False,
    padding_mode: str = "zeros",
) -> Map:
    """The map of a convolution layer; ``axes=()`` is a Linear."""
    # A kernel of one tap has every dilation: say 1, so that it never disturbs a common grid.
    axes = tuple(replace(a, dilation=1) if a.kernel == 1 else a for a in axes)
    return _map(tuple(axes), grouped_band(outputs, inputs, groups), transposed, padding_mode)


def _map(axes: tuple[Axis, ...], band: Band, transposed: bool, padding_mode: str) -> Map:
    padded = any(axis.padded for axis in axes)
    return Map(axes, band, transposed, padding_mode if padded else "zeros")


def _lift(diagonal: Diagonal, like: Map) -> Map | Refusal:
    """A diagonal map written as a convolution of the rank and channels of `like`."""
    refusal = _meets(diagonal, like.outputs, like.channel_axis)
    if refusal is not None:
        return refusal
    if like.inputs != like.outputs:
        return Refusal(
            f"a branch of {like.outputs} channels is added to one of {like.inputs} channels"
        )
    channels = like.outputs
    return Map(tuple(POINT for _ in like.axes), grouped_band(channels, channels, channels))


def _meets(diagonal: Diagonal, channels: int, axis: int) -> Refusal | None:
    """Why `diagonal` does not act on these channels, or None if it does."""
    if diagonal.axis is not None and diagonal.axis != axis:
        return Refusal(f"it acts on dimension {diagonal.axis}, the channels are on {axis}")
    if diagonal.channels is not None and diagonal.channels != channels:
        return Refusal(f"it has {diagonal.channels} channels, its operand has {channels}")
    return None


def compose(outer: Linear, inner: Linear, *, biased: bool) -> Linear | Refusal:
    """The shape of ``outer(inner(x) + b)``, or why that is no single map.

    Args:
        outer: the map applied last.
        inner: the map applied first.
        biased: whether a bias b is added between the two.

    Returns:
        The composite, equal to the chain for every input size and at every border, or a
        `Refusal`: padding of the outer map reads zeros where the chain without it would read
        ``b`` or values computed from real inputs.
    """
    if isinstance(outer, Diagonal) and isinstance(inner, Diagonal):
        return _compose_diagonals(outer, inner)
    if isinstance(outer, Diagonal):
        assert isinstance(inner, Map)
        return _meets(outer, inner.outputs, inner.channel_axis) or inner
    if isinstance(inner, Diagonal):
        refusal = _meets(inner, outer.inputs, outer.channel_axis)
        # Reflected or repeated values carry the bias with them; zeros do not.
        zeros = outer.transposed or (outer.padded and outer.padding_mode == "zeros")
        if refusal is None and biased and zeros:
            refusal = Refusal(
                "a transposed convolution after it spreads its bias unevenly"
                if outer.transposed
                else "the padding of the convolution after it does not see its bias"
            )
        return refusal or outer
    return _compose_maps(outer, inner, biased)


def _compose_diagonals(outer: Diagonal, inner: Diagonal) -> Diagonal | Refusal:
    for name in ("axis", "channels"):
        a, b = getattr(outer, name), getattr(inner, name)
        if a is not None and b is not None and a != b:
            return Refusal(f"scales of {name} {b} and {a} follow each other")
    axis = inner.axis if outer.axis is None else outer.axis
    return Diagonal(inner.channels if outer.channels is None else outer.channels, axis)


def _compose_maps(outer: Map, inner: Map, biased: bool) -> Map | Refusal:
    if len(outer.axes) != len(inner.axes):
        return Refusal(f"a {len(outer.axes)}-d map follows a {len(inner.axes)}-d one")
    if outer.inputs != inner.outputs:
        return Refusal(f"{inner.outputs} channels feed a map of {outer.inputs}")
    band = _compose_bands(outer.band, inner.band)
    if outer.transposed or inner.transposed:
        if outer.pointwise:
            return replace(inner, band=band)
        if inner.pointwise and not biased:
            return replace(outer, band=band)
        return Refusal("a transposed convolution composes with pointwise maps only")
    if inner.pointwise and outer.padding_mode != "zeros":
        return replace(outer, band=band)
    if outer.padding_mode != "zeros":
        return Refusal(f"{outer.padding_mode} padding between two convolutions")
    if inner.padding_mode != "zeros" and outer.padded:
        return Refusal(f"zero padding after {inner.padding_mode} padding")
    axes = []
    for axis_outer, axis_inner in zip(outer.axes, inner.axes, strict=True):
        if not _chain_is_exact(axis_outer, axis_inner, biased):
            return Refusal(
                "the outer convolution's padding would see "
                + ("the inner bias" if biased else "values the inner convolution computes")
            )
        axes.append(_compose_axes(axis_outer, axis_inner))
    return _map(tuple(axes), band, False, inner.padding_mode)


def _compose_axes(outer: Axis, inner: Axis) -> Axis:
    reach = inner.reach + inner.stride * outer.reach
    step = math.gcd(
        inner.dilation if inner.kernel > 1 else 0,
        inner.stride * outer.dilation if outer.kernel > 1 else 0,
    )
    return Axis(
        kernel=reach // step + 1 if step else 1,
        stride=inner.stride * outer.stride,
        low=inner.low + inner.stride * outer.low,
        high=inner.high + inner.stride * outer.high,
        dilation=step or 1,
    )


def _chain_is_exact(outer: Axis, inner: Axis, biased: bool) -> bool:
    """Whether the outer padding reads only positions where the inner map would give zero.

    The inner map, continued past its ends, reads real inputs within ``reach`` of its padding; the
    original reads zeros there instead.
    """
    if outer.low > 0:
        nearest = min(e for j in range(outer.kernel) if (e := _nearest_padding(outer, j)) > 0)
        if biased or inner.reach >= nearest * inner.stride + inner.low:
            return False
    return not (outer.high > 0 and (biased or inner.high < inner.reach))


def _nearest_padding(axis: Axis, tap: int) -> int:
    """How far before the input's start `tap` reads nearest to it; 0 if it never does."""
    before = axis.low - tap * axis.dilation
    return (before - 1) % axis.stride + 1 if before > 0 else 0


def add(maps: Sequence[Linear]) -> Linear | Refusal:
    """The shape of ``sum(map(x) for map in maps)``, or why that is no single map.

    All kernels are laid on one grid, whose step is the greatest common divisor of the dilations
    and of the differences of the low paddings. The sizes of the branches agree for every input
    size iff padding less reach agrees, per axis.
    """
    full = [m for m in maps if isinstance(m, Map)]
    if not full:
        return _add_diagonals([m for m in maps if isinstance(m, Diagonal)])
    lifted: list[Map] = []
    for each in maps:
        term = _lift(each, full[0]) if isinstance(each, Diagonal) else each
        if isinstance(term, Refusal):
            return term
        lifted.append(term)
    return _add_maps(lifted)


def _add_diagonals(diagonals: Sequence[Diagonal]) -> Diagonal | Refusal:
    total = IDENTITY
    for each in diagonals:
        answer = _compose_diagonals(total, each)
        if isinstance(answer, Refusal):
            return answer
        total = answer
    return total


def _add_maps(maps: Sequence[Map]) -> Map | Refusal:
    first = maps[0]
    for each in maps[1:]:
        for what, a, b in (
            ("rank", len(first.axes), len(each.axes)),
            ("input channels", first.inputs, each.inputs),
            ("output channels", first.outputs, each.outputs),
        ):
            if a != b:
                return Refusal(f"branches differ in {what}: {a} and {b}")
    if len({m.transposed for m in maps}) > 1:
        return Refusal("a transposed convolution is added to one that is not")
    modes = {m.padding_mode for m in maps if m.padded}
    if len(modes) > 1:
        return Refusal(f"branches differ in padding mode: {' and '.join(sorted(modes))}")
    axes = []
    for column in zip(*(m.axes for m in maps), strict=True):
        axis = _add_axes(column)
        if isinstance(axis, Refusal):
            return axis
        axes.append(axis)
    mode = modes.pop() if modes else "zeros"
    return _map(tuple(axes), _hull([m.band for m in maps]), first.transposed, mode)


def _add_axes(axes: Sequence[Axis]) -> Axis | Refusal:
    first = axes[0]
    for each in axes[1:]:
        if each.stride != first.stride:
            return Refusal(f"branches differ in stride: {first.stride} and {each.stride}")
        if each.excess != first.excess:
            return Refusal(
                "branches give different output sizes: padding less kernel reach is "
                f"{first.excess} and {each.excess}"
            )
    low = max(a.low for a in axes)
    reach = max(a.reach - a.low for a in axes) + low
    step = math.gcd(*(a.dilation for a in axes if a.kernel > 1), *(low - a.low for a in axes))
    return Axis(
        kernel=reach // step + 1 if step else 1,
        stride=first.stride,
        low=low,
        high=first.excess + reach - low,
        dilation=step or 1,
    )


def unavailable(shape: Map) -> Refusal | None:
    """Why no layer computes this map, or None if one does."""
    if shape.transposed:
        for axis in shape.axes:
            extra = axis.low - axis.high
            if axis.low < 0 or not 0 <= extra < max(axis.stride, axis.dilation, 1) + (extra == 0):
                return Refusal(
                    f"no transposed convolution has padding {axis.low} and output padding {extra}"
                )
    elif shape.padding_mode != "zeros" and any(a.low < 0 or a.high < 0 for a in shape.axes):
        return Refusal(f"no convolution crops one side and pads another by {shape.padding_mode}")
    return None
