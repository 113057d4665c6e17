"""The work of an operation at several sizes of the root's result, from shapes alone."""

from __future__ import annotations

import math
from dataclasses import replace

from fxrep.algebra.maps import IDENTITY, Diagonal, Linear, Map, pointwise_axes, symmetric
from fxrep.planning.cost import SIZES, Work
from fxrep.planning.walk import Passed
from fxrep.reading.commuting import Commuter
from fxrep.reading.view import Affine, Operation


def positions(outer: Linear, rank: int, crossed: tuple[Commuter, ...]) -> tuple[int, ...]:
    """Positions of a value that the root needs, at each root size."""
    return tuple(_positions(outer, _below((size,) * rank, crossed)) for size in SIZES)


def touched(whole: Linear, rank: int, crossed: tuple[Commuter, ...]) -> tuple[int, ...]:
    """Positions of an operand that are read: a stride beyond the kernel passes over some."""
    if isinstance(whole, Diagonal) or whole.transposed:
        return positions(whole, rank, crossed)
    axes = pointwise_axes(rank - len(whole.axes)) + whole.axes
    return tuple(
        math.prod(
            min(a.needed(n), a.kernel * n)
            for a, n in zip(axes, _below((size,) * rank, crossed), strict=True)
        )
        for size in SIZES
    )


def _below(sizes: tuple[int, ...], crossed: tuple[Commuter, ...]) -> tuple[int, ...]:
    for each in crossed:
        if each.spatial == len(sizes):
            sizes = each.operand_sizes(sizes)
    return sizes


def _positions(outer: Linear, sizes: tuple[int, ...]) -> int:
    if isinstance(outer, Diagonal):
        return math.prod(sizes)
    axes = pointwise_axes(len(sizes) - len(outer.axes)) + outer.axes
    if outer.transposed:
        return math.prod(-(-n // a.stride) for n, a in zip(sizes, axes, strict=True))
    return math.prod(a.needed(n) for n, a in zip(sizes, axes, strict=True))


def of(reading: Affine, passed: Passed, outputs: int, rank: int) -> Work:
    """The work of one operation that a walk has passed.

    Args:
        reading: the operation.
        passed: its place on the way to the root.
        outputs: channels of the root.
        rank: spatial axes.
    """
    shape, outer, crossed = reading.terms[0].map, passed.map, passed.crossed
    width = outer.inputs if isinstance(outer, Map) and outer.channelwise is not None else outputs
    if isinstance(shape, Map) and reading.is_layer:
        biased = reading.bias is not None
        return layer(shape, outer, rank, biased, crossed, operand_map=passed.operand_map)
    if reading.is_identity:
        return Work()
    if reading.operation is Operation.PART:
        return Work(operations=1)
    if isinstance(shape, Map):
        return _structure(reading, shape, passed, width, rank)
    vectors = (reading.bias is not None) + (reading.terms[0].weight is not None)
    if reading.operation is Operation.BATCHNORM:
        vectors = 4
    work = elementwise(len(reading.terms), width, outer, rank, crossed)
    return replace(work, parameters=vectors * width if shape.channels else 0)


def of_root(reading: Affine, outputs: int) -> Work:
    """The work of a pooling or layer whose result is the root, of `outputs` channels."""
    shape = reading.terms[0].map
    assert isinstance(shape, Map)
    return of(reading, Passed(IDENTITY, (), shape), outputs, len(shape.axes))


def layer(
    shape: Map, outer: Linear, rank: int, biased: bool, crossed: tuple[Commuter, ...] = (),
    *, operand_map: Linear | None = None, ones: bool = False,
) -> Work:  # fmt: skip
    """The work of a convolution or linear layer, including the padding that it needs before it.

    Args:
        shape: the map of the layer.
        outer: the map from its result to the root.
        rank: spatial axes.
        biased: the layer has a bias.
        crossed: operations between the layer and the root that change sizes.
        operand_map: the map from its operand to the root; None if the layer is the root.
        ones: the last input is a channel of ones that has to be added first.
    """
    written = positions(outer, rank, crossed)
    read = touched(shape if operand_map is None else operand_map, rank, crossed)
    computed = read if shape.transposed else written
    weights = shape.weights
    padded = symmetric(shape)
    copies = (not padded.symmetric or (padded.padded and padded.padding_mode != "zeros")) + ones
    return Work(
        macs=tuple(weights * n for n in computed),
        traffic=tuple(
            (1 + 2 * copies) * shape.inputs * a + shape.outputs * b
            for a, b in zip(read, written, strict=True)
        ),
        convolutions=1,
        operations=1 + copies + _circular(padded),
        parameters=weights + (shape.outputs if biased else 0),
    )


def _circular(shape: Map) -> int:
    """Operations of circular padding beyond the first: its sides are concatenated one by one."""
    if shape.padding_mode != "circular" or not shape.padded:
        return 0
    return 4 * len(shape.axes)


def elementwise(
    terms: int, width: int, outer: Linear, rank: int, crossed: tuple[Commuter, ...] = ()
) -> Work:
    """The work of a sum or scale."""
    count = positions(outer, rank, crossed)
    return Work(
        macs=tuple(width * n for n in count),
        traffic=tuple((terms + 1) * width * n for n in count),
        operations=1,
    )


def copied(width: int, rank: int, crossed: tuple[Commuter, ...] = ()) -> Work:
    """The work of a copy that another operation makes on its own."""
    count = positions(IDENTITY, rank, crossed)
    return Work(traffic=tuple(2 * width * n for n in count))


def joined(width: int, rank: int, crossed: tuple[Commuter, ...] = ()) -> Work:
    """The work of a concatenation, which copies all of its operands."""
    return replace(copied(width, rank, crossed), operations=1)


def moved(found: Commuter, width: int, rank: int, crossed: tuple[Commuter, ...]) -> Work:
    """The work of an operation that maps are moved over, on `width` channels."""
    above = positions(IDENTITY, rank, crossed)
    below = positions(IDENTITY, rank, (*crossed, found))
    return Work(
        traffic=tuple(width * (a + b) for a, b in zip(above, below, strict=True)), operations=1
    )


def _structure(reading: Affine, shape: Map, passed: Passed, width: int, rank: int) -> Work:
    """Pooling, padding, concatenation: every element is read and written."""
    written = positions(passed.map, rank, passed.crossed)
    read = touched(passed.operand_map, rank, passed.crossed)
    concatenates = reading.operation is Operation.CONCATENATION
    inputs = width if concatenates or shape.channelwise is None else shape.inputs
    return Work(
        traffic=tuple(inputs * a + width * b for a, b in zip(read, written, strict=True)),
        operations=1 + _circular(shape),
        poolings=int(reading.operation is Operation.POOLING),
    )
