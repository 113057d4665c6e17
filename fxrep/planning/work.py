"""The work of an operation at several sizes of the root's result, from shapes alone."""

from __future__ import annotations

import math
from dataclasses import replace

from fxrep.algebra.maps import IDENTITY, Diagonal, Linear, Map, points, symmetric
from fxrep.planning.cost import SIZES, Work
from fxrep.planning.walk import Seen
from fxrep.reading.commuting import Mover
from fxrep.reading.view import Affine

# Operations that give a view of what they read.
_VIEWS = ("slice", "chunk")


def positions(outer: Linear, rank: int, crossed: tuple[Mover, ...]) -> tuple[int, ...]:
    """Positions of a value that the root needs, at each root size."""
    return tuple(_positions(outer, _below((size,) * rank, crossed)) for size in SIZES)


def touched(whole: Linear, rank: int, crossed: tuple[Mover, ...]) -> tuple[int, ...]:
    """Positions of an operand that are read: a stride beyond the kernel passes over some."""
    if isinstance(whole, Diagonal) or whole.transposed:
        return positions(whole, rank, crossed)
    axes = points(rank - len(whole.axes)) + whole.axes
    return tuple(
        math.prod(
            min(a.needed(n), a.kernel * n)
            for a, n in zip(axes, _below((size,) * rank, crossed), strict=True)
        )
        for size in SIZES
    )


def _below(sizes: tuple[int, ...], crossed: tuple[Mover, ...]) -> tuple[int, ...]:
    for each in crossed:
        if each.spatial == len(sizes):
            sizes = each.below(sizes)
    return sizes


def _positions(outer: Linear, sizes: tuple[int, ...]) -> int:
    if isinstance(outer, Diagonal):
        return math.prod(sizes)
    axes = points(len(sizes) - len(outer.axes)) + outer.axes
    if outer.transposed:
        return math.prod(-(-n // a.stride) for n, a in zip(sizes, axes, strict=True))
    return math.prod(a.needed(n) for n, a in zip(sizes, axes, strict=True))


def of(reading: Affine, seen: Seen, outputs: int, rank: int) -> Work:
    """The work of one operation on the way to the root."""
    shape, outer, crossed = reading.terms[0].map, seen.map, seen.crossed
    width = outer.inputs if isinstance(outer, Map) and outer.channelwise is not None else outputs
    if isinstance(shape, Map) and reading.is_layer:
        biased = reading.bias is not None
        return layer(shape, outer, rank, biased, crossed, whole=seen.whole)
    if reading.kind == "identity":
        return Work()
    if reading.kind in _VIEWS:
        return Work(operations=1)
    if isinstance(shape, Map):
        return _structure(reading, shape, seen, width, rank)
    vectors = (reading.bias is not None) + (reading.terms[0].weight is not None)
    if reading.kind == "batch_norm":
        vectors = 4
    work = elementwise(len(reading.terms), width, outer, rank, crossed)
    return replace(work, parameters=vectors * width if shape.channels else 0)


def layer(
    shape: Map, outer: Linear, rank: int, biased: bool, crossed: tuple[Mover, ...] = (),
    *, whole: Linear | None = None, ones: bool = False,
) -> Work:  # fmt: skip
    """The work of a convolution or linear layer, the padding it needs before it included.

    Args:
        shape: what it computes.
        outer: the map from its result to the root.
        rank: spatial axes.
        biased: it has a bias.
        crossed: operations between it and the root that other sizes are counted through.
        whole: the map from its operand to the root; None if it is the root.
        ones: its last input is a channel of ones that has to be added first.
    """
    written = positions(outer, rank, crossed)
    read = touched(shape if whole is None else whole, rank, crossed)
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
    """Operations of circular padding but for one: it is put together side by side."""
    if shape.padding_mode != "circular" or not shape.padded:
        return 0
    return 4 * len(shape.axes)


def elementwise(
    terms: int, width: int, outer: Linear, rank: int, crossed: tuple[Mover, ...] = ()
) -> Work:
    """The work of a sum or scale."""
    count = positions(outer, rank, crossed)
    return Work(
        macs=tuple(width * n for n in count),
        traffic=tuple((terms + 1) * width * n for n in count),
        operations=1,
    )


def joined(width: int, rank: int, crossed: tuple[Mover, ...] = ()) -> Work:
    """The work of a concatenation: everything is copied."""
    count = positions(IDENTITY, rank, crossed)
    return Work(traffic=tuple(2 * width * n for n in count), operations=1)


def moved(found: Mover, width: int, rank: int, crossed: tuple[Mover, ...]) -> Work:
    """The work of an operation that something is moved over, on so many channels."""
    above = positions(IDENTITY, rank, crossed)
    below = positions(IDENTITY, rank, (*crossed, found))
    return Work(
        traffic=tuple(width * (a + b) for a, b in zip(above, below, strict=True)), operations=1
    )


def _structure(reading: Affine, shape: Map, seen: Seen, width: int, rank: int) -> Work:
    """Pooling, padding, concatenation: every element is read and written."""
    written = positions(seen.map, rank, seen.crossed)
    read = touched(seen.whole, rank, seen.crossed)
    inputs = width if reading.kind == "cat" or shape.channelwise is None else shape.inputs
    return Work(
        traffic=tuple(inputs * a + width * b for a, b in zip(read, written, strict=True)),
        operations=1 + _circular(shape),
        poolings=int(reading.kind == "avg_pool"),
    )
