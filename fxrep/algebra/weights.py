"""Weights of affine convolution maps: tensors in, tensors out, in float64.

A `Map` has a weight ``(O, width, *kernel)``: output channel o reads ``width`` inputs from its
band's start on, zeros for an output that reads nothing. Without a band the weight is ``(1, 1,
*kernel)``. A `Diagonal` has a weight ``()`` or ``(C,)``. A weight ``()`` is the same everywhere,
and None stands for ones. A bias is ``()`` or ``(O,)``. Nothing here knows of graphs, and no
function changes its arguments.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fxrep.algebra.maps import (
    Band,
    Diagonal,
    Linear,
    Map,
    has_holes,
    narrowed,
    pointwise_axes,
    with_channels,
    with_equal_rank,
)

Weight = Tensor | None


def from_convolution(weight: Tensor, groups: int, transposed: bool) -> Tensor:
    """The weight of a map from a layer's: ``(O, I/g, *k)``, or ``(I, O/g, *k)`` transposed."""
    if not transposed or weight.dim() < 3:
        return weight
    inputs, outputs, *kernel = weight.shape
    blocks = weight.reshape(groups, inputs // groups, outputs, *kernel).transpose(1, 2)
    return blocks.reshape(groups * outputs, inputs // groups, *kernel)


def to_convolution(weight: Weight, shape: Map) -> Tensor:
    """The weight of a layer with ``shape.band.groups`` groups from a map's."""
    weight = _filled(shape, weight, _device(weight))
    if shape.band.rows is not None:
        weight, shape = weight[shape.band.live], narrowed(shape)
    groups, band = shape.band.groups, shape.band
    block = band.inputs // groups
    first = torch.arange(groups).repeat_interleave(band.outputs // groups) * block
    full = _widen(weight, band.starts - first, block)
    if not shape.transposed:
        return full
    blocks = full.reshape(groups, band.outputs // groups, block, *shape.kernel).transpose(1, 2)
    return blocks.reshape(band.inputs, band.outputs // groups, *shape.kernel)


def batchnorm_scale(variance: Tensor, eps: float, weight: Tensor | None) -> Tensor:
    """``weight / sqrt(variance + eps)``, shape (C,)."""
    scale = (variance + eps).rsqrt()
    return scale if weight is None else weight * scale


def batchnorm_shift(scale: Tensor, mean: Tensor, bias: Tensor | None) -> Tensor:
    """``bias - mean * scale``, shape (C,)."""
    shift = -mean * scale
    return shift if bias is None else bias + shift


def compose(
    shape: Linear, outer: Linear, inner: Linear, outer_weight: Weight, inner_weight: Weight
) -> Weight:
    """The weight of ``composition.compose(outer, inner)``, which is `shape`."""
    if isinstance(outer, Diagonal) and (outer_weight is None or isinstance(inner, Diagonal)):
        return _product(outer_weight, inner_weight)
    if isinstance(inner, Diagonal) and inner_weight is None:
        return outer_weight
    ones = outer_weight is None and inner_weight is None and outer.selects and inner.selects
    if ones and not has_holes(shape):
        return None
    assert isinstance(shape, Map)
    device = _device(outer_weight, inner_weight)
    if shape.channelwise is None:
        shape = with_channels(shape, 1)
    if isinstance(inner, Diagonal):
        assert isinstance(outer, Map) and inner_weight is not None
        outer = with_channels(outer, shape.inputs)
        return _filled(outer, outer_weight, device) * _per_input(inner_weight, outer)
    if isinstance(outer, Diagonal):
        assert outer_weight is not None
        inner = with_channels(inner, shape.outputs)
        return _per_output(outer_weight, _filled(inner, inner_weight, device))
    outer, inner = with_equal_rank((outer, inner))
    middle = inner.outputs if inner.channelwise is not None else None
    outer = with_channels(outer, middle or shape.outputs)
    inner = with_channels(inner, outer.inputs)
    one, two = (_filled(m, w, device) for m, w in ((inner, inner_weight), (outer, outer_weight)))
    if inner.band.is_diagonal and inner.pointwise:
        return two * _per_input(one.reshape(-1), outer)
    if outer.band.is_diagonal and outer.pointwise:
        return _per_output(two.reshape(-1), one)
    if inner.selects:
        return _pick_inputs(shape, outer, inner, two, one)
    if outer.selects:
        return _pick_outputs(shape, outer, inner, two, one)
    return _convolve(shape, outer, inner, two, one)


def compose_bias(outer: Linear, outer_weight: Weight, bias: Tensor) -> Tensor:
    """The image of a constant ``bias`` under the map, ``sum_j W_j b``: (O,) or ().

    Holds at borders only where `composition.compose` allows a bias.
    """
    if isinstance(outer, Diagonal):
        return bias if outer_weight is None else outer_weight * bias
    if outer.channelwise is None and bias.dim():
        outer = with_channels(outer, len(bias))
    if outer.channelwise is None:
        return (
            _filled(with_channels(outer, 1), outer_weight, _device(outer_weight, bias)).sum() * bias
        )
    weight = _filled(outer, outer_weight, _device(outer_weight, bias))
    total = weight.reshape(*weight.shape[:2], -1).sum(2)  # (O, width)
    if bias.dim() == 0:
        return total.sum(1) * bias
    return (total * bias[_inputs_read(outer)]).sum(1)


def frame(outer: Map, outer_weight: Weight, bias: Tensor) -> Tensor:
    """The weight (O, 1, *kernel) by which ``outer(b)`` is a map of an image of ones."""
    weight = _filled(outer, outer_weight, _device(outer_weight, bias))
    return (weight * _per_input(bias, outer)).sum(1, keepdim=True)


def add(shape: Linear, shapes: Sequence[Linear], *weights: Weight) -> Weight:
    """The weight of ``composition.add(shapes)``, which is `shape`."""
    if isinstance(shape, Diagonal):
        return _add_diagonals(weights)
    if shape.channelwise is None:
        shape = with_channels(shape, 1)
    device = _device(*weights)
    size = (shape.outputs, shape.band.width, *shape.kernel)
    total = torch.zeros(size, dtype=torch.float64, device=device)
    axes = pointwise_axes(len(shape.axes))
    for each, weight in zip(shapes, weights, strict=True):
        if isinstance(each, Diagonal):
            each = Map(axes, None)
            if weight is not None and weight.dim():
                weight = weight.reshape(-1, 1, *(1 for _ in axes))
        each = with_channels(with_equal_rank((each, shape))[0], shape.outputs)
        full = _filled(each, weight, device)
        window = total
        for dim, (axis, tap) in enumerate(zip(shape.axes, each.axes, strict=True), 2):
            step = tap.dilation // axis.dilation if tap.kernel > 1 else 1
            first = (axis.low - tap.low) // axis.dilation
            last = first + step * (tap.kernel - 1)
            window = window[(slice(None),) * dim + (slice(first, last + 1, step),)]
        rows = each.band.live
        _accumulate(window[rows], full[rows], (each.band.starts - shape.band.starts)[rows])
    return total


def add_biases(*biases: Tensor) -> Tensor:
    """The sum of biases, each (O,) or ()."""
    total = biases[0]
    for bias in biases[1:]:
        total = total + bias
    return total


def full_bias(bias: Tensor, outputs: int) -> Tensor:
    """A bias () or (O,) as (O,)."""
    return bias.expand(outputs).contiguous()


def stack(*weights: Tensor) -> Tensor:
    """Weights of one shape but for the outputs, (O, width, *kernel), concatenated over outputs."""
    return torch.cat(weights)


def stack_biases(outputs: Sequence[int], *biases: Weight) -> Tensor:
    """Biases of so many outputs each, concatenated, with zeros for None."""
    device = _device(*biases)
    zero = torch.zeros((), dtype=torch.float64, device=device)
    return torch.cat(
        [
            (zero if b is None else b.to(device)).expand(n)
            for n, b in zip(outputs, biases, strict=True)
        ]
    )


def rows(tensor: Tensor, first: int, last: int) -> Tensor:
    """The outputs from `first` up to `last` of a weight or bias."""
    return tensor[first:last]


def spread(tensor: Tensor, times: int) -> Tensor:
    """(C,) with each value repeated, for the `times` channels that a pixel shuffle makes one of."""
    return tensor.repeat_interleave(times) if tensor.dim() else tensor


def one_hot(outputs: int, kernel: Sequence[int]) -> Tensor:
    """The weight of a pixel_unshuffle: output o reads tap ``o mod taps`` and nothing else."""
    taps = math.prod(kernel)
    weight = torch.zeros(outputs, taps, dtype=torch.float64)
    weight[torch.arange(outputs), torch.arange(outputs) % taps] = 1
    return weight.reshape(outputs, 1, *kernel)


def _product(a: Weight, b: Weight) -> Weight:
    if a is None or b is None:
        return b if a is None else a
    return _per_output(a, b)


def _add_diagonals(weights: Sequence[Weight]) -> Weight:
    ones = torch.ones((), dtype=torch.float64, device=_device(*weights))
    return add_biases(*(ones if w is None else w for w in weights))


def _device(*tensors: Weight) -> torch.device:
    """The device of the tensors that are not on the CPU, where numbers are; else the CPU."""
    devices = [t.device for t in tensors if t is not None]
    return next((d for d in devices if d.type != "cpu"), torch.device("cpu"))


def _filled(shape: Map, weight: Weight, device: torch.device) -> Tensor:
    """The weight of a map in full: (O, width, *kernel)."""
    size = (shape.outputs, shape.band.width, *shape.kernel)
    if weight is not None and weight.dim():
        weight = weight.to(device).reshape(*weight.shape[:2], *shape.kernel)
        return weight if weight.shape[0] == shape.outputs else weight.expand(size)
    full = torch.zeros(size, dtype=torch.float64, device=device)
    full[shape.band.live] = 1 if weight is None else weight.to(device)
    return full


def _accumulate(target: Tensor, weight: Tensor, offsets: Tensor) -> None:
    """Add ``weight[o]`` to ``target[o]`` at the input channel ``offsets[o]``, in place."""
    if not len(offsets):
        return
    first = int(offsets[0])
    if bool((offsets == first).all()):
        target[:, first : first + weight.shape[1]] += weight
        return
    rows, columns = _columns(offsets, weight.shape[1])
    target[rows, columns] += weight


def _offsets(band: Band, first: Tensor) -> Tensor:
    """Where each output's interval starts in its group's inputs; 0 if the output reads nothing."""
    offsets = torch.zeros_like(band.starts)
    offsets[band.live] = (band.starts - first)[band.live]
    return offsets


def _columns(offsets: Tensor, width: int) -> tuple[Tensor, Tensor]:
    return torch.arange(len(offsets))[:, None], offsets[:, None] + torch.arange(width)


def _widen(weight: Tensor, offsets: Tensor, width: int) -> Tensor:
    if width == weight.shape[1]:
        return weight
    full = weight.new_zeros(weight.shape[0], width, *weight.shape[2:])
    _accumulate(full, weight, offsets)
    return full


def _inputs_read(shape: Map) -> Tensor:
    """The input channels that each output reads: (O, width)."""
    return shape.band.starts[:, None] + torch.arange(shape.band.width)


def _per_output(scale: Tensor, weight: Tensor) -> Tensor:
    if scale.dim() == 0 or weight.dim() == 0:
        return scale * weight
    return scale.reshape(-1, *(1 for _ in weight.shape[1:])) * weight


def _per_input(scale: Tensor, shape: Map) -> Tensor:
    """A scale of the inputs, broadcast over the weight of `shape`."""
    if scale.dim() == 0:
        return scale
    return scale[_inputs_read(shape)].reshape(
        shape.outputs, shape.band.width, *(1 for _ in shape.axes)
    )


def _pick_inputs(
    shape: Map, outer: Map, inner: Map, outer_weight: Tensor, inner_weight: Tensor
) -> Tensor:
    """The inner map only picks channels and pixels: the taps stay, their inputs change."""
    read = _inputs_read(outer)  # (O, width of the outer)
    live = torch.zeros(inner.outputs, dtype=torch.bool)
    live[inner.band.live] = True
    columns = (inner.band.starts[read] - shape.band.starts[:, None]).masked_fill(~live[read], 0)
    weight = outer_weight * _per_input(inner_weight.reshape(-1), outer)
    if outer.band.rows is not None:  # outputs that read nothing have zeros: any column will do
        columns[: outer.band.live.start], columns[outer.band.live.stop :] = 0, 0
    full = weight.new_zeros(shape.outputs, shape.band.width, *shape.kernel)
    index = torch.arange(shape.outputs)[:, None].expand_as(columns)
    full.index_put_(
        (index.to(full.device), columns.to(full.device)),
        weight.reshape(*columns.shape, *shape.kernel),
        accumulate=True,
    )
    return full


def _pick_outputs(
    shape: Map, outer: Map, inner: Map, outer_weight: Tensor, inner_weight: Tensor
) -> Tensor:
    """The outer map only picks channels and pixels: the weight is rows of the inner weight."""
    rows = outer.band.live
    starts = outer.band.starts[rows]
    picked = _per_output(outer_weight.reshape(-1)[rows], inner_weight[starts])
    size = (shape.outputs, shape.band.width, *shape.kernel)
    if shape.band.rows == (0, 0):  # nothing of the inner map is picked
        return picked.new_zeros(size)
    live = torch.zeros(inner.outputs, dtype=torch.bool)
    live[inner.band.live] = True
    offsets = inner.band.starts[starts] - shape.band.starts[rows]
    full = picked.new_zeros(size)
    _accumulate(full[rows], picked, offsets.masked_fill(~live[starts], 0))
    return full


def _convolve(
    shape: Map, outer: Map, inner: Map, outer_weight: Tensor, inner_weight: Tensor
) -> Tensor:
    """Every tap of the outer map adds the whole inner kernel at an offset: a matmul per tap."""
    groups = math.gcd(shape.band.groups, inner.outputs)
    while not (outer.band.fits(groups) and inner.band.fits(groups)):
        groups = next(g for g in range(groups - 1, 0, -1) if groups % g == 0)
    a = _blocks(outer, outer_weight, groups)  # (g, O/g, M/g, *k2)
    b = _blocks(inner, inner_weight, groups)  # (g, M/g, I/g, *k1)
    result = a.new_zeros(groups, a.shape[1], b.shape[2], *shape.kernel)
    flat = b.reshape(groups, b.shape[1], -1)
    for taps in itertools.product(*(range(k) for k in outer.kernel)):
        window = result
        for dim, (tap, axis, one, two) in enumerate(
            zip(taps, shape.axes, inner.axes, outer.axes, strict=True), 3
        ):
            scale = 1 if outer.transposed or inner.transposed else one.stride
            first = tap * scale * two.dilation // axis.dilation
            step = one.dilation // axis.dilation if one.kernel > 1 else 1
            last = first + step * (one.kernel - 1)
            window = window[(slice(None),) * dim + (slice(first, last + 1, step),)]
        product = torch.bmm(a[(slice(None),) * 3 + taps], flat)
        window += product.reshape(groups, a.shape[1], *b.shape[2:])
    full = result.reshape(shape.outputs, b.shape[2], *shape.kernel)
    if shape.band.width == full.shape[1]:
        return full
    starts = torch.arange(groups).repeat_interleave(shape.outputs // groups) * full.shape[1]
    return full[_columns(_offsets(shape.band, starts), shape.band.width)]


def _blocks(shape: Map, weight: Tensor, groups: int) -> Tensor:
    """The weight as (g, O/g, I/g, *k) with zeros outside the band."""
    block = shape.inputs // groups
    first = torch.arange(groups).repeat_interleave(shape.outputs // groups) * block
    full = _widen(weight, _offsets(shape.band, first), block)
    return full.reshape(groups, shape.outputs // groups, block, *shape.kernel)
