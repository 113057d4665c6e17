"""Shapes of affine convolution maps: all but their weights.

Everything linear that fxrep rewrites is one map ``y = M(x) + b``. Per spatial axis M has a kernel
size k, stride s, zero padding on the low and the high side and dilation d: output i reads the
inputs ``i*s - low + j*d`` for j in 0..k-1. Over channels output o reads an interval of the
inputs (a `Band`), so that dense, grouped and depthwise convolutions, channel slices and
concatenations are all the same thing: an operand of a concatenation is a map whose other outputs
read nothing. ``Linear`` is the map with no spatial axis. Pooling and padding treat every channel
alike, however many there are: a map without a band.

A transposed convolution has the same fields with the roles of input and output exchanged: input i
writes the outputs ``i*s - low + j*d``, and ``high`` is its padding less its output_padding.

Planning works on these objects alone; `fxrep.algebra.weights` computes their weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from fxrep.refusal import Refusal


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

    @property
    def pointwise(self) -> bool:
        """See `Map.pointwise`."""
        return True

    @property
    def selects(self) -> bool:
        """See `Map.selects`: with a weight of ones it picks every channel."""
        return True


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
    return map_of(tuple(axes), grouped_band(outputs, inputs, groups), transposed, padding_mode)


def channel_map(axes: Sequence[Axis], padding_mode: str = "zeros") -> Map:
    """The map of a pooling, a padding or a crop: the same for every channel."""
    return map_of(tuple(axes), None, False, padding_mode)


def map_of(axes: tuple[Axis, ...], band: Band | None, transposed: bool, padding_mode: str) -> Map:
    """A map whose padding mode counts only where it pads."""
    padded = any(axis.padded for axis in axes)
    return Map(axes, band, transposed, padding_mode if padded else "zeros")


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
