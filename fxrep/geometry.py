"""Shapes of affine convolution maps: how they compose and add, without their weights.

Everything linear that fxrep rewrites is one map ``y = M(x) + b``. Per spatial axis M has a kernel
size k, stride s, zero padding on the low and the high side and dilation d: output i reads the
inputs ``i*s - low + j*d`` for j in 0..k-1. Over channels output o reads an interval of the
inputs (a `Band`), so that dense, grouped and depthwise convolutions, channel slices and
concatenations are all the same thing: an operand of a concatenation is a map whose other outputs
read nothing. ``Linear`` is the map with no spatial axis. Pooling and padding treat every channel
alike, however many there are: a map without a band.

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
    """Why something that looks like a rewrite is not one: the answer a user reads.

    Attributes:
        reason: in words.
        kind: "shared" if others need a value, or the operation that could not be read where it
            is no layer or BatchNorm.
    """

    reason: str
    kind: str = ""


@dataclass(frozen=True, slots=True)
class Axis:
    """One spatial axis of a map; a negative padding is a crop.

    ``rest`` bounds what the last window leaves unread of the padded input, where the graph says
    more than ``stride - 1``: a pixel_unshuffle, which raises otherwise, leaves 0.
    """

    kernel: int = 1
    stride: int = 1
    low: int = 0
    high: int = 0
    dilation: int = 1
    rest: int | None = None

    @property
    def slack(self) -> int:
        """The most positions of the padded input that the last window may leave unread."""
        return self.stride - 1 if self.rest is None else self.rest

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


def points(count: int) -> tuple[Axis, ...]:
    """Axes on which nothing happens."""
    return (POINT,) * count


@dataclass(frozen=True, eq=False)
class Band:
    """Which input channels each output channel reads: ``start[o] <= i < start[o] + width``.

    Outputs outside ``rows`` (first, past the last) read nothing; None stands for all of them. With
    ``holes`` some between them read nothing either: their weights are zeros.
    """

    starts: Tensor  # (O,) int64, on the CPU
    width: int
    inputs: int
    rows: tuple[int, int] | None = None
    holes: bool = False

    @property
    def outputs(self) -> int:
        """Number of output channels."""
        return self.starts.shape[0]

    @property
    def live(self) -> slice:
        """The outputs that read something."""
        return slice(*self.rows) if self.rows is not None else slice(0, self.outputs)

    @cached_property
    def narrowed(self) -> Band:
        """The outputs that read something, alone."""
        if self.rows is None:
            return self
        return Band(self.starts[self.live], self.width, self.inputs, holes=self.holes)

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
        first = (torch.arange(self.outputs) // (self.outputs // groups) * block)[self.live]
        starts = self.starts[self.live]
        return bool(((starts >= first) & (starts + self.width <= first + block)).all())

    @cached_property
    def is_diagonal(self) -> bool:
        """Output o reads input o and nothing else."""
        return (
            self.width == 1
            and self.rows is None
            and not self.holes
            and self.outputs == self.inputs
            and bool((self.starts == torch.arange(self.outputs)).all())
        )

    @cached_property
    def ends(self) -> tuple[Tensor, Tensor]:
        """The first input each output reads and the one past the last; (inputs, 0) for none."""
        low, high = self.starts, self.starts + self.width
        if self.rows is not None:
            index = torch.arange(self.outputs)
            dead = (index < self.rows[0]) | (index >= self.rows[1])
            low, high = low.masked_fill(dead, self.inputs), high.masked_fill(dead, 0)
        return low, high


@lru_cache(maxsize=512)
def grouped_band(outputs: int, inputs: int, groups: int) -> Band:
    """The band of a convolution with `groups` groups."""
    block = inputs // groups
    starts = torch.arange(groups).repeat_interleave(outputs // groups) * block
    return Band(starts, block, inputs)


def selection_band(starts: Sequence[int] | Tensor, inputs: int) -> Band:
    """Each output is one input channel: a channel slice or permutation."""
    return Band(torch.as_tensor(starts, dtype=torch.int64), 1, inputs)


def placement_band(first: int, channels: int, outputs: int) -> Band:
    """Outputs ``first ... first + channels`` are the inputs: an operand of a concatenation."""
    starts = (torch.arange(outputs) - first).clamp(0, channels - 1)
    rows = (first, first + channels)
    return Band(starts, 1, channels, None if rows == (0, outputs) else rows)


def _compose_bands(outer: Band | None, inner: Band | None) -> Band | None:
    """The hull of the inner intervals that each outer interval covers."""
    if inner is None or inner.is_diagonal:
        return outer if outer is not None else inner
    if outer is None or outer.is_diagonal:
        return inner
    low, high = inner.ends
    if outer.width == 1:
        low, high = low[outer.starts], high[outer.starts]
    else:
        distinct, where = torch.unique(outer.starts, return_inverse=True)
        low = low.unfold(0, outer.width, 1)[distinct].amin(1)[where]
        high = high.unfold(0, outer.width, 1)[distinct].amax(1)[where]
    return _band(low, high, inner.inputs, outer.rows)


def _hull(bands: Sequence[Band]) -> Band:
    """The smallest band that holds all of them."""
    if all(band is bands[0] for band in bands):
        return bands[0]
    ends = [band.ends for band in bands]
    low, high = torch.stack([low for low, _ in ends]), torch.stack([high for _, high in ends])
    return _band(low.amin(0), high.amax(0), bands[0].inputs, None)


def _band(low: Tensor, high: Tensor, inputs: int, rows: tuple[int, int] | None) -> Band:
    """The band of these ends, of which the outputs outside `rows` count as reading nothing."""
    reads = low < high
    if rows is not None:
        reads[: rows[0]] = False
        reads[rows[1] :] = False
    holes = False
    if not bool(reads.all()):
        index = reads.nonzero()
        rows = (int(index[0]), int(index[-1]) + 1) if len(index) else (0, 0)
        holes = len(index) < rows[1] - rows[0]
        low, high = low.masked_fill(~reads, 0), high.masked_fill(~reads, 0)
    else:
        rows = None
    width = max(1, int((high - low).max()))
    return Band(low.clamp(max=inputs - width), width, inputs, rows, holes)


@dataclass(frozen=True, eq=False)
class Map:
    """The shape of one affine convolution map (its weight is ``(O, band.width, *kernel)``).

    Without a band it does the same to every channel, however many: its weight is ``(1, 1,
    *kernel)``. The padding mode "constant" pads with values other than zero, one per channel.
    """

    axes: tuple[Axis, ...]
    channelwise: Band | None
    transposed: bool = False
    padding_mode: str = "zeros"

    @property
    def band(self) -> Band:
        """Which channels it reads, where their number is known."""
        assert self.channelwise is not None
        return self.channelwise

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
        band = self.band.narrowed
        return band.outputs * (band.inputs // band.groups) * math.prod(self.kernel)

    @property
    def selects(self) -> bool:
        """It only picks channels and pixels: with a weight of ones it needs no arithmetic."""
        single = self.channelwise is None or self.channelwise.width == 1
        return single and not self.transposed and all(axis.kernel == 1 for axis in self.axes)

    @property
    def keeps_size(self) -> bool:
        """Its result has the spatial size of its operand, whatever that is."""
        return not self.transposed and all(a.stride == 1 and a.excess == 0 for a in self.axes)


def beside(shape: Map, inputs: int, first: int) -> Map:
    """The same map as part of one of `inputs` channels, of which its own start at `first`."""
    band = shape.band
    moved = replace(band, starts=band.starts + first, inputs=inputs)
    return replace(shape, channelwise=moved)


def stacked(maps: Sequence[Map]) -> Map:
    """Maps of one source and one geometry without groups, their outputs one after the other."""
    starts = torch.cat([m.band.starts for m in maps])
    return replace(maps[0], channelwise=Band(starts, maps[0].band.width, maps[0].inputs))


def has_holes(shape: Linear) -> bool:
    """Whether outputs among those that read something read nothing."""
    return isinstance(shape, Map) and shape.channelwise is not None and shape.channelwise.holes


def unbanded(shape: Map) -> Map:
    """The same map where outputs that read nothing are ordinary ones, with weights of zero."""
    return replace(shape, channelwise=replace(shape.band, rows=None))


def places(shape: Map) -> bool:
    """Whether a map gives its operand as it is, as some or all of the outputs."""
    return shape.channelwise is not None and shape.pointwise and shape.band.narrowed.is_diagonal


def narrowed(shape: Map) -> Map:
    """The map of the outputs that read something, alone."""
    return replace(shape, channelwise=shape.band.narrowed)


def lifted(shape: Map, channels: int) -> Map:
    """A map that does the same to every channel, for this many of them."""
    if shape.channelwise is not None:
        return shape
    return replace(shape, channelwise=grouped_band(channels, channels, channels))


def aligned(maps: Sequence[Map]) -> list[Map]:
    """Maps of one rank: what treats all channels alike does nothing on axes it does not name."""
    rank = max(len(m.axes) for m in maps)
    return [
        m
        if m.channelwise is not None
        else replace(m, axes=(POINT,) * (rank - len(m.axes)) + m.axes)
        for m in maps
    ]


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


def channel_map(axes: Sequence[Axis], padding_mode: str = "zeros") -> Map:
    """The map of a pooling, a padding or a crop: the same for every channel."""
    return _map(tuple(axes), None, False, padding_mode)


def _map(axes: tuple[Axis, ...], band: Band | None, transposed: bool, padding_mode: str) -> Map:
    padded = any(axis.padded for axis in axes)
    return Map(axes, band, transposed, padding_mode if padded else "zeros")


def _lift(diagonal: Diagonal, like: Map) -> Map | Refusal:
    """A diagonal map written as a convolution of the rank and channels of `like`."""
    points = tuple(POINT for _ in like.axes)
    if like.channelwise is None:
        if diagonal.channels is None:
            return Map(points, None)
        refusal = _meets(diagonal, diagonal.channels, like.channel_axis)
        return refusal or lifted(Map(points, None), diagonal.channels)
    refusal = _meets(diagonal, like.outputs, like.channel_axis)
    if refusal is not None:
        return refusal
    if like.inputs != like.outputs:
        return Refusal(
            f"a branch of {like.outputs} channels is added to one of {like.inputs} channels"
        )
    return lifted(Map(points, None), like.outputs)


def _meets(diagonal: Diagonal, channels: int | None, axis: int) -> Refusal | None:
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
        if inner.channelwise is None and outer.channels is not None:
            inner = lifted(inner, outer.channels)
        outputs = None if inner.channelwise is None else inner.outputs
        return _meets(outer, outputs, inner.channel_axis) or inner
    if isinstance(inner, Diagonal):
        if outer.channelwise is None and inner.channels is not None:
            outer = lifted(outer, inner.channels)
        inputs = None if outer.channelwise is None else outer.inputs
        refusal = _meets(inner, inputs, outer.channel_axis)
        # Reflected or repeated values carry the bias with them; zeros do not. What constants are
        # worth below the bias is for the caller to see.
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
    outer, inner = aligned((outer, inner))
    if len(outer.axes) != len(inner.axes):
        return Refusal(f"a {len(outer.axes)}-d map follows a {len(inner.axes)}-d one")
    if outer.channelwise is not None and inner.channelwise is not None:
        if outer.inputs != inner.outputs:
            return Refusal(f"{inner.outputs} channels feed a map of {outer.inputs}")
    elif outer.channelwise is not None:
        inner = lifted(inner, outer.inputs)
    elif inner.channelwise is not None:
        outer = lifted(outer, inner.outputs)
    band = _compose_bands(outer.channelwise, inner.channelwise)
    if outer.transposed or inner.transposed:
        if outer.pointwise:
            return replace(inner, channelwise=band)
        if inner.pointwise and not biased:
            return replace(outer, channelwise=band)
        if inner.pointwise:
            return Refusal("a transposed convolution after it spreads its bias unevenly")
        return Refusal("a transposed convolution composes with pointwise maps only")
    if inner.pointwise and outer.padding_mode != "zeros":
        return replace(outer, channelwise=band)
    if outer.padding_mode == "constant":
        return Refusal("padding by a constant between two convolutions")
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
        rest=None
        if inner.rest is None and outer.rest is None
        else inner.stride * outer.slack + inner.slack,
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
    # The first position past the inner map's end starts `stride` after its last window.
    beyond = inner.high + inner.stride - 1 - inner.slack
    return not (outer.high > 0 and (biased or beyond < inner.reach))


def _nearest_padding(axis: Axis, tap: int) -> int:
    """How far before the input's start `tap` reads nearest to it; 0 if it never does."""
    before = axis.low - tap * axis.dilation
    return (before - 1) % axis.stride + 1 if before > 0 else 0


def add(maps: Sequence[Linear], *, same_size: bool = False) -> Linear | Refusal:
    """The shape of ``sum(map(x) for map in maps)``, or why that is no single map.

    All kernels are laid on one grid, whose step is the greatest common divisor of the dilations
    and of the differences of the low paddings. The sizes of the branches agree for every input
    size iff padding less reach agrees, per axis.

    Args:
        maps: the branches.
        same_size: they have one size, or the original raises: they meet in a concatenation.
    """
    full = [m for m in maps if isinstance(m, Map)]
    if not full:
        return _add_diagonals([m for m in maps if isinstance(m, Diagonal)])
    full.sort(key=lambda m: m.channelwise is None)
    like = full[0]
    if like.channelwise is None:
        known = {m.channels for m in maps if isinstance(m, Diagonal) and m.channels is not None}
        like = lifted(like, known.pop()) if known else like
    terms: list[Map] = []
    for each in maps:
        term = _lift(each, like) if isinstance(each, Diagonal) else each
        if isinstance(term, Refusal):
            return term
        if term.channelwise is None and like.channelwise is not None:
            if like.inputs != like.outputs:
                return Refusal(
                    f"a branch of {like.outputs} channels is added to one of {like.inputs} channels"
                )
            term = lifted(term, like.outputs)
        terms.append(term)
    return _add_maps(terms, same_size)


def _add_diagonals(diagonals: Sequence[Diagonal]) -> Diagonal | Refusal:
    total = IDENTITY
    for each in diagonals:
        answer = _compose_diagonals(total, each)
        if isinstance(answer, Refusal):
            return answer
        total = answer
    return total


def _add_maps(maps: Sequence[Map], same_size: bool) -> Map | Refusal:
    maps = aligned(maps)
    first = maps[0]
    for each in maps[1:]:
        if len(first.axes) != len(each.axes):
            return Refusal(f"branches differ in rank: {len(first.axes)} and {len(each.axes)}")
        if first.channelwise is None:
            continue
        for what, a, b in (
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
    if "constant" in modes:
        return Refusal("branches padded with constants")
    axes = []
    for column in zip(*(m.axes for m in maps), strict=True):
        axis = _add_axes(column, same_size)
        if isinstance(axis, Refusal):
            return axis
        axes.append(axis)
    mode = modes.pop() if modes else "zeros"
    band = None if first.channelwise is None else _hull([m.band for m in maps])
    if band is not None and band.rows == (0, 0):
        return Refusal("a sum without channels")
    return _map(tuple(axes), band, first.transposed, mode)


def _add_axes(axes: Sequence[Axis], same_size: bool) -> Axis | Refusal:
    first = axes[0]
    for each in axes[1:]:
        if each.stride != first.stride:
            return Refusal(f"branches differ in stride: {first.stride} and {each.stride}")
        if each.excess != first.excess and not same_size:
            return Refusal(
                "branches give different output sizes: padding less kernel reach is "
                f"{first.excess} and {each.excess}"
            )
    low = max(a.low for a in axes)
    reach = max(a.reach - a.low for a in axes) + low
    step = math.gcd(*(a.dilation for a in axes if a.kernel > 1), *(low - a.low for a in axes))
    least = min(a.excess for a in axes)
    # Where sizes agree although the excess does not, the one with least leaves less unread.
    rest = max(0, min(a.slack - (a.excess - least) for a in axes))
    return Axis(
        kernel=reach // step + 1 if step else 1,
        stride=first.stride,
        low=low,
        high=least + reach - low,
        dilation=step or 1,
        rest=rest if rest < first.stride - 1 else None,
    )


def symmetric(shape: Map) -> Map:
    """The same map with equal padding on both sides, where what is read stays the same.

    More zeros behind the input change nothing as long as they are not enough for one more window.
    """
    if shape.transposed or shape.padding_mode != "zeros":
        return shape
    axes = tuple(
        replace(a, high=a.low)
        if a.low > a.high >= 0 and a.low - a.high <= a.stride - 1 - a.slack
        else a
        for a in shape.axes
    )
    return replace(shape, axes=axes)


def unavailable(shape: Map) -> Refusal | None:
    """Why no layer computes this map, or None if one does."""
    if shape.transposed:
        for axis in shape.axes:
            extra = axis.low - axis.high
            if axis.low < 0 or not 0 <= extra < max(axis.stride, axis.dilation, 1) + (extra == 0):
                return Refusal(
                    f"no transposed convolution has padding {axis.low} and output padding {extra}"
                )
    elif any(a.needed(1) + min(a.low, 0) + min(a.high, 0) < 1 for a in shape.axes):
        return Refusal("it crops more than the smallest inputs have, before it pads")
    elif shape.padding_mode == "constant":
        return Refusal("it pads with values that are not what its source gives for zeros")
    elif shape.padding_mode != "zeros" and any(a.low < 0 or a.high < 0 for a in shape.axes):
        return Refusal(f"no convolution crops one side and pads another by {shape.padding_mode}")
    return None
