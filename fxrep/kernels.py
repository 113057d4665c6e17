"""Weights of affine convolution maps: tensors in, tensors out, in float64.

A `Map` has a weight ``(O, width, *kernel)``: output channel o reads ``width`` inputs from its
band's start on. A `Diagonal` has a weight ``()`` or ``(C,)``, or None for ones. A bias is ``()``
or ``(O,)``. Nothing here knows of graphs, and no function changes its arguments.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fxrep.geometry import POINT, Axis, Diagonal, Linear, Map

Weight = Tensor | None


def from_convolution(weight: Tensor, groups: int, transposed: bool) -> Tensor:
    """A layer's weight as a map's: ``(O, I/g, *k)``, or ``(I, O/g, *k)`` transposed."""
    if not transposed or weight.dim() < 3:
        return weight
    inputs, outputs, *kernel = weight.shape
    blocks = weight.reshape(groups, inputs // groups, outputs, *kernel).transpose(1, 2)
    return blocks.reshape(groups * outputs, inputs // groups, *kernel)


def to_convolution(weight: Weight, shape: Map) -> Tensor:
    """A map's weight as a layer's with ``shape.band.groups`` groups."""
    assert weight is not None
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
    """The weight of ``geometry.compose(outer, inner)``, which is `shape`."""
    if outer_weight is None or inner_weight is None:
        return inner_weight if outer_weight is None else outer_weight
    if isinstance(outer, Diagonal):
        return _per_output(outer_weight, inner_weight, inner)
    if isinstance(inner, Diagonal):
        return outer_weight * _per_input(inner_weight, outer)
    if inner.band.is_diagonal and inner.pointwise:
        return outer_weight * _per_input(inner_weight.reshape(-1), outer)
    if outer.band.is_diagonal and outer.pointwise:
        return _per_output(outer_weight.reshape(-1), inner_weight, inner)
    assert isinstance(shape, Map)
    return _convolve(shape, outer, inner, outer_weight, inner_weight)


def compose_bias(outer: Linear, outer_weight: Weight, bias: Tensor) -> Tensor:
    """What a constant ``bias`` added before the map adds after it: ``sum_j W_j b``, (O,) or ().

    True at borders only where `geometry.compose` allows a bias.
    """
    if outer_weight is None:
        return bias
    if isinstance(outer, Diagonal):
        return outer_weight * bias
    total = outer_weight.reshape(*outer_weight.shape[:2], -1).sum(2)  # (O, width)
    if bias.dim() == 0:
        return total.sum(1) * bias
    return (total * bias[_inputs_read(outer)]).sum(1)


def add(shape: Linear, shapes: Sequence[Linear], *weights: Weight) -> Weight:
    """The weight of ``geometry.add(shapes)``, which is `shape`."""
    if isinstance(shape, Diagonal):
        return _add_diagonals(weights)
    like = next(w for w in weights if w is not None)
    size = (shape.outputs, shape.band.width, *shape.kernel)
    total = torch.zeros(size, dtype=like.dtype, device=like.device)
    for each, weight in zip(shapes, weights, strict=True):
        full, starts = _as_map(each, weight, shape, like)
        window = total
        for dim, (axis, tap) in enumerate(zip(shape.axes, _axes(each, shape), strict=True), 2):
            step = tap.dilation // axis.dilation if tap.kernel > 1 else 1
            first = (axis.low - tap.low) // axis.dilation
            last = first + step * (tap.kernel - 1)
            window = window[(slice(None),) * dim + (slice(first, last + 1, step),)]
        _accumulate(window, full, starts - shape.band.starts)
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


def _add_diagonals(weights: Sequence[Weight]) -> Weight:
    like = next((w for w in weights if w is not None), None)
    ones = torch.ones((), dtype=torch.float64, device=None if like is None else like.device)
    return add_biases(*(ones if w is None else w for w in weights))


def _as_map(each: Linear, weight: Weight, shape: Map, like: Tensor) -> tuple[Tensor, Tensor]:
    """The weight of a branch as (O, width, *kernel), and the first input of each output."""
    if isinstance(each, Map):
        assert weight is not None
        return weight, each.band.starts
    if weight is None:
        weight = torch.ones((), dtype=like.dtype, device=like.device)
    column = weight.expand(shape.outputs).reshape(-1, 1, *(1 for _ in shape.axes))
    return column, torch.arange(shape.outputs)


def _axes(each: Linear, shape: Map) -> tuple[Axis, ...]:
    return each.axes if isinstance(each, Map) else (POINT,) * len(shape.axes)


def _accumulate(target: Tensor, weight: Tensor, offsets: Tensor) -> None:
    """Add ``weight[o]`` to ``target[o]`` at the input channel ``offsets[o]``, in place."""
    first = int(offsets[0])
    if bool((offsets == first).all()):
        target[:, first : first + weight.shape[1]] += weight
        return
    rows, columns = _columns(offsets, weight.shape[1])
    target[rows, columns] += weight


def _columns(offsets: Tensor, width: int) -> tuple[Tensor, Tensor]:
    return torch.arange(len(offsets))[:, None], offsets[:, None] + torch.arange(width)


def _widen(weight: Tensor, offsets: Tensor, width: int) -> Tensor:
    if width == weight.shape[1]:
        return weight
    full = weight.new_zeros(weight.shape[0], width, *weight.shape[2:])
    _accumulate(full, weight, offsets)
    return full


def _inputs_read(shape: Map) -> Tensor:
    """(O, width): the input channels each output reads."""
    return shape.band.starts[:, None] + torch.arange(shape.band.width)


def _per_output(scale: Tensor, weight: Tensor, shape: Map | Diagonal) -> Tensor:
    if scale.dim() == 0 or weight.dim() == 0 or isinstance(shape, Diagonal):
        return scale * weight
    return scale.reshape(-1, *(1 for _ in weight.shape[1:])) * weight


def _per_input(scale: Tensor, shape: Map) -> Tensor:
    """A scale of the inputs, broadcast over the weight of `shape`."""
    if scale.dim() == 0:
        return scale
    return scale[_inputs_read(shape)].reshape(
        shape.outputs, shape.band.width, *(1 for _ in shape.axes)
    )


def _convolve(
    shape: Map, outer: Map, inner: Map, outer_weight: Tensor, inner_weight: Tensor
) -> Tensor:
    """Every tap of the outer map places the whole inner kernel: a matmul per outer tap."""
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
    return full[_columns(shape.band.starts - starts, shape.band.width)]


def _blocks(shape: Map, weight: Tensor, groups: int) -> Tensor:
    """The weight as (g, O/g, I/g, *k) with zeros outside the band."""
    block = shape.inputs // groups
    first = torch.arange(groups).repeat_interleave(shape.outputs // groups) * block
    full = _widen(weight, shape.band.starts - first, block)
    return full.reshape(groups, shape.outputs // groups, block, *shape.kernel)
