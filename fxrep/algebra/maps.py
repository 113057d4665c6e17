"""Shapes of affine convolution maps: all but their weights.

Every linear operation that fxrep rewrites is a map ``y = M(x) + b``. Per spatial axis M has a
kernel size k, a stride s, zero padding on the low and the high side and a dilation d: output i
reads the inputs ``i*s - low + j*d`` for j in 0..k-1 (the taps). Over channels, output o reads an
interval of the inputs (a `Band`). Dense, grouped and depthwise convolutions, channel slices and
concatenations so have one form: an operand of a concatenation is a map whose other outputs read
nothing. ``nn.Linear`` is the map without spatial axes. Pooling and padding do the same to every
channel, however many there are: they are maps without a band.

A transposed convolution has the same fields with the roles of input and output exchanged: input i
writes the outputs ``i*s - low + j*d``, and ``high`` is its padding less its output_padding.

Planning works on these objects alone; `fxrep.algebra.weights` computes their weights. Recipes hold
maps, and so do the pickles of users: fields keep their names.
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
    """One spatial axis of a map.

    Attributes:
        kernel: number of taps.
        stride: distance between the windows of neighbouring outputs.
        low: padding before the first input; a negative one is a crop.
        high: the same behind the last input.
        dilation: distance between neighbouring taps.
        rest: at most so many positions of the padded input stay unread behind the last window;
            None for the bound that always holds, ``stride - 1``. A pixel_unshuffle has 0: it
            raises if a position would stay unread.
    """

    kernel: int = 1
    stride: int = 1
    low: int = 0
    high: int = 0
    dilation: int = 1
    rest: int | None = None

    @property
    def slack(self) -> int:
        """The most positions of the padded input that may stay unread behind the last window."""
        return self.stride - 1 if self.rest is None else self.rest

    @property
    def reach(self) -> int:
        """Distance between the first and the last tap."""
        return self.dilation * (self.kernel - 1)

    @property
    def excess(self) -> int:
        """Padding less reach: maps of equal stride give equal sizes iff their excess is equal."""
        return self.low + self.high - self.reach

    @property
    def pointwise(self) -> bool:
        """Whether output i reads input i and nothing else."""
        return self.kernel == 1 and self.stride == 1 and self.low == 0 and self.high == 0

    @property
    def padded(self) -> bool:
        """Whether some output reads beyond an end of the input."""
        return self.low > 0 or self.high > 0

    def needed(self, outputs: int) -> int:
        """The smallest input size that gives `outputs` positions."""
        return max(1, self.stride * (outputs - 1) + 1 - self.excess)


POINTWISE = Axis()


def pointwise_axes(count: int) -> tuple[Axis, ...]:
    """Axes on which output i reads input i and nothing else."""
    return (POINTWISE,) * count


@dataclass(frozen=True, eq=False)
class Band:
    """Which input channels each output channel reads: ``starts[o] <= i < starts[o] + width``.

    The name is that of a banded matrix, whose rows are the outputs.

    Attributes:
        starts: the first input that each output reads.
        width: how many inputs each output reads.
        inputs: number of input channels.
        rows: the first output that reads an input, and the output past the last such; None if all
            outputs do.
        holes: some outputs within `rows` read nothing either: their weights are zeros.
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
        """The outputs that read inputs."""
        return slice(*self.rows) if self.rows is not None else slice(0, self.outputs)

    @cached_property
    def narrowed(self) -> Band:
        """The band of the outputs that read inputs, alone."""
        if self.rows is None:
            return self
        return Band(self.starts[self.live], self.width, self.inputs, holes=self.holes)

    @cached_property
    def groups(self) -> int:
        """The largest number of groups for which every interval lies inside one group's inputs."""
        common = math.gcd(self.outputs, self.inputs)
        for groups in range(min(common, self.inputs // self.width), 1, -1):
            if common % groups == 0 and self.fits(groups):
                return groups
        return 1

    def fits(self, groups: int) -> bool:
        """Whether every interval lies inside the inputs of its output's group."""
        block = self.inputs // groups
        first = (torch.arange(self.outputs) // (self.outputs // groups) * block)[self.live]
        starts = self.starts[self.live]
        return bool(((starts >= first) & (starts + self.width <= first + block)).all())

    @cached_property
    def is_diagonal(self) -> bool:
        """Whether output o reads input o and nothing else."""
        return (
            self.width == 1
            and self.rows is None
            and not self.holes
            and self.outputs == self.inputs
            and bool((self.starts == torch.arange(self.outputs)).all())
        )

    @cached_property
    def ends(self) -> tuple[Tensor, Tensor]:
        """The first input that each output reads and the input past its last, (O,) each.

        An output that reads nothing has (inputs, 0).
        """
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
    """Outputs ``first`` to ``first + channels`` are the inputs: an operand of a concatenation."""
    starts = (torch.arange(outputs) - first).clamp(0, channels - 1)
    rows = (first, first + channels)
    return Band(starts, 1, channels, None if rows == (0, outputs) else rows)


@dataclass(frozen=True, eq=False)
class Map:
    """The shape of one affine convolution map; its weight is ``(O, band.width, *kernel)``.

    Attributes:
        axes: the spatial axes, first to last.
        channelwise: which inputs each output reads; None for a map that does the same to every
            channel, however many there are. Its weight is then ``(1, 1, *kernel)``.
        transposed: whether the map is a transposed convolution.
        padding_mode: as in nn.Conv2d, or "constant": values other than zero, one per channel.
    """

    axes: tuple[Axis, ...]
    channelwise: Band | None
    transposed: bool = False
    padding_mode: str = "zeros"

    @property
    def band(self) -> Band:
        """The band of a map that has one."""
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
        """The channel dimension, counted from the last: -1 for Linear, -3 for Conv2d."""
        return -len(self.axes) - 1

    @property
    def kernel(self) -> tuple[int, ...]:
        """Kernel size per axis."""
        return tuple(axis.kernel for axis in self.axes)

    @property
    def pointwise(self) -> bool:
        """Whether output position i depends on input position i alone."""
        return not self.transposed and all(axis.pointwise for axis in self.axes)

    @property
    def padded(self) -> bool:
        """Whether some output reads beyond an end of the input, on some axis."""
        return any(axis.padded for axis in self.axes)

    @property
    def symmetric(self) -> bool:
        """Whether a layer can do this padding itself; otherwise an F.pad comes before the layer."""
        return self.transposed or all(a.low == a.high and a.low >= 0 for a in self.axes)

    @property
    def weights(self) -> int:
        """Elements of the weight of a convolution that computes this map."""
        band = self.band.narrowed
        return band.outputs * (band.inputs // band.groups) * math.prod(self.kernel)

    @property
    def selects(self) -> bool:
        """Whether each output value is one input value, at most scaled."""
        single = self.channelwise is None or self.channelwise.width == 1
        return single and not self.transposed and all(axis.kernel == 1 for axis in self.axes)

    @property
    def keeps_size(self) -> bool:
        """Whether the result always has the spatial size of the operand."""
        return not self.transposed and all(a.stride == 1 and a.excess == 0 for a in self.axes)


def with_more_inputs(shape: Map, inputs: int, first: int) -> Map:
    """The same map of an operand of `inputs` channels, which has the map's own from `first` on."""
    band = shape.band
    moved = replace(band, starts=band.starts + first, inputs=inputs)
    return replace(shape, channelwise=moved)


def stacked(maps: Sequence[Map]) -> Map:
    """Maps without groups that have one source and equal axes: their outputs, concatenated."""
    starts = torch.cat([m.band.starts for m in maps])
    return replace(maps[0], channelwise=Band(starts, maps[0].band.width, maps[0].inputs))


def has_holes(shape: Linear) -> bool:
    """Whether an output between two that read inputs reads none."""
    return isinstance(shape, Map) and shape.channelwise is not None and shape.channelwise.holes


def with_all_rows(shape: Map) -> Map:
    """The same map where outputs that read nothing count as reading, with weights of zero."""
    return replace(shape, channelwise=replace(shape.band, rows=None))


def is_placement(shape: Map) -> bool:
    """Whether the outputs that read inputs are the operand itself, in order, at most scaled."""
    return shape.channelwise is not None and shape.pointwise and shape.band.narrowed.is_diagonal


def narrowed(shape: Map) -> Map:
    """The map of the outputs that read inputs, alone."""
    return replace(shape, channelwise=shape.band.narrowed)


def with_channels(shape: Map, channels: int) -> Map:
    """A map that does the same to every channel, with a band for so many channels."""
    if shape.channelwise is not None:
        return shape
    return replace(shape, channelwise=grouped_band(channels, channels, channels))


def with_equal_rank(maps: Sequence[Map]) -> list[Map]:
    """Maps with equally many axes: those without a band get pointwise axes before their own."""
    rank = max(len(m.axes) for m in maps)
    return [
        m
        if m.channelwise is not None
        else replace(m, axes=pointwise_axes(rank - len(m.axes)) + m.axes)
        for m in maps
    ]


@dataclass(frozen=True)
class Diagonal:
    """A map that scales each channel, of a value of any rank.

    Attributes:
        channels: number of channels; None if any number will do.
        axis: the channel dimension, counted from the last; None for one scale for all elements.
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
    """The map of a convolution layer; ``axes=()`` is an nn.Linear."""
    # With one tap the dilation means nothing: 1 stands for that.
    axes = tuple(replace(a, dilation=1) if a.kernel == 1 else a for a in axes)
    return map_of(tuple(axes), grouped_band(outputs, inputs, groups), transposed, padding_mode)


def channel_map(axes: Sequence[Axis], padding_mode: str = "zeros") -> Map:
    """The map of a pooling, a padding or a crop: the same for every channel."""
    return map_of(tuple(axes), None, False, padding_mode)


def map_of(axes: tuple[Axis, ...], band: Band | None, transposed: bool, padding_mode: str) -> Map:
    """A map, whose padding mode is "zeros" if it pads nothing."""
    padded = any(axis.padded for axis in axes)
    return Map(axes, band, transposed, padding_mode if padded else "zeros")


def symmetric(shape: Map) -> Map:
    """The same map with equal padding on both sides of each axis where that is possible.

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


def why_no_layer(shape: Map) -> Refusal | None:
    """Why no layer of torch.nn computes this map, or None if a layer does."""
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
