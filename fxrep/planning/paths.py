"""Paths: the ways from a value to the root of a walk, and how they compose and add up.

Only shapes are computed here; a weight is an expression, evaluated once for the plan that is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from fxrep.algebra import composition, weights
from fxrep.algebra.maps import IDENTITY, Diagonal, Linear, Map, has_holes, is_placement
from fxrep.algebra.recipe import Call, Expr
from fxrep.reading.view import Affine, Operation, Term, View
from fxrep.refusal import Refusal

# How far apart two values computed in float64 may be and count as one.
SAME_VALUE = 1e-12


@dataclass(frozen=True, eq=False)
class Padding:
    """A padding with values other than zero, met on a path.

    Attributes:
        value: (C,) or (), what the padding adds around the padded value.
        map: from the end of the path to the padded value.
        weight: the weight of that map.
        biases: the biases between the end of the path and the padded value. Once they add up to
            `value`, padding the end of the path with zeros is the same.
    """

    value: Expr
    map: Linear = IDENTITY
    weight: Expr | None = None
    biases: tuple[Expr, ...] = ()


@dataclass(frozen=True, eq=False)
class Path:
    """One way from a value to the root.

    Attributes:
        map: the map of that way.
        weight: the weight of the map, None for ones.
        root_terms: the terms of the root's reading by which the path enters the root.
        channels_checked: the value is known to have the channels of the map.
        zero: the weight is zero.
        layers: the convolution and linear layers on the way.
        concatenations: the concatenations on the way; paths through one of them have equal sizes
            there.
        padding: the padding on the way that pads with values other than zero.
    """

    map: Linear
    weight: Expr | None = None
    root_terms: frozenset[int] = frozenset()
    channels_checked: bool = False
    zero: bool = False
    layers: frozenset[fx.Node] = frozenset()
    concatenations: frozenset[fx.Node] = frozenset()
    padding: Padding | None = None


# --- one after the other --------------------------------------------------------------------------


def extended(
    view: View, outer: Path, node: fx.Node, reading: Affine, index: int, shape: Linear
) -> Path:
    """A path to `node` made longer by the term `index` of its reading, composed to `shape`."""
    term = reading.terms[index]
    concatenates = reading.operation is Operation.CONCATENATION
    path = Path(
        shape,
        _composed_weight(shape, outer.map, outer.weight, term),
        outer.root_terms or frozenset({index}),
        _checks_channels(reading, outer),
        outer.zero or _is_zero(view, reading, term),
        outer.layers | {node} if reading.is_layer else outer.layers,
        outer.concatenations | {node} if concatenates else outer.concatenations,
        _extended_padding(outer.padding, reading, term),
    )
    return _with_zero_padding(view, path)


def mapped_bias(shape: Linear, weight: Expr | None, bias: Expr) -> Expr:
    """The bias that a map makes of a bias before it."""
    if weight is None and isinstance(shape, Diagonal):
        return bias
    return Call(weights.compose_bias, (shape, weight, bias))


def _composed_weight(
    shape: Linear, outer: Linear, outer_weight: Expr | None, term: Term
) -> Expr | None:
    """The weight of `shape`, which is `outer` after the map of `term`."""
    if term.weight is None and isinstance(term.map, Diagonal):
        return outer_weight
    if outer_weight is None and isinstance(outer, Diagonal):
        return term.weight
    ones = outer_weight is None and term.weight is None and outer.selects and term.map.selects
    if ones and not has_holes(shape):
        return None
    return Call(weights.compose, (shape, outer, term.map, outer_weight, term.weight))


def _checks_channels(reading: Affine, outer: Path) -> bool:
    """Whether the operand must have the channels of the composite, or the original raises.

    A convolution or BatchNorm raises; a scale by a vector or an addition may broadcast instead.
    """
    if len(reading.terms) > 1:
        return False
    shape = reading.terms[0].map
    any_channels = shape.axis is None if isinstance(shape, Diagonal) else shape.channelwise is None
    return outer.channels_checked if any_channels else reading.checks_channels


def _is_zero(view: View, reading: Affine, term: Term) -> bool:
    """Whether a coefficient of zero switches a branch off."""
    if reading.operation is not Operation.PRODUCT or term.weight is None:
        return False
    return not bool(view.value(term.weight).any())


def _extended_padding(padding: Padding | None, reading: Affine, term: Term) -> Padding | None:
    """The padding of a path, seen from one operation further from the root."""
    if padding is None:
        return None if reading.pad_value is None else Padding(reading.pad_value)
    shape = composition.compose(padding.map, term.map, biased=False)
    assert not isinstance(shape, Refusal)  # pointwise, or the composition had been refused
    weight = _composed_weight(shape, padding.map, padding.weight, term)
    biases = padding.biases
    if reading.bias is not None:
        biases = (*biases, mapped_bias(padding.map, padding.weight, reading.bias))
    return Padding(padding.value, shape, weight, biases)


def _with_zero_padding(view: View, path: Path) -> Path:
    """The path with zero padding, if that gives the values that its padding pads with."""
    if path.padding is None:
        return path
    assert isinstance(path.map, Map)
    value = view.unrounded(path.padding.value).cpu()
    given = torch.zeros((), dtype=torch.float64)
    for bias in path.padding.biases:
        given = given + view.value(bias).cpu()
    if not _same_value(value, given):
        return path
    return replace(path, map=replace(path.map, padding_mode="zeros"), padding=None)


def _same_value(a: Tensor, b: Tensor) -> bool:
    """Equal in real arithmetic, as far as float64 can tell."""
    if a.dim() and b.dim() and a.shape != b.shape:
        return False
    return bool(((a - b).abs() <= SAME_VALUE * (a.abs() + b.abs())).all())


# --- beside each other ----------------------------------------------------------------------------


def merged(paths: Sequence[Path]) -> Path | Refusal:
    """Several paths from one value as one path."""
    if len(paths) == 1:
        return paths[0]
    if any(path.padding is not None for path in paths):
        return Refusal("a branch pads with values that its source does not give for zeros")
    shapes = tuple(path.map for path in paths)
    concatenations = frozenset.intersection(*(path.concatenations for path in paths))
    shape = composition.add(shapes, same_size=bool(concatenations))
    if isinstance(shape, Refusal):
        return shape
    alive = [path for path in paths if not path.zero]
    if 0 < len(alive) < len(paths):  # sizes agree, so that zeros need not be added
        return merged(alive)
    weight: Expr | None = None
    if not _gathers(shape, paths):
        weight = Call(weights.add, (shape, shapes, *(path.weight for path in paths)))
    return Path(
        shape,
        weight,
        frozenset[int]().union(*(path.root_terms for path in paths)),
        any(path.channels_checked for path in paths),
        not alive,
        frozenset[fx.Node]().union(*(path.layers for path in paths)),
        concatenations,
    )


def merged_but_paddings(paths: Sequence[Path]) -> list[Path] | Refusal:
    """Several paths from one value as one path, and those with a padding of their own apart."""
    plain = [path for path in paths if path.padding is None]
    apart = [path for path in paths if path.padding is not None]
    if not plain:
        return apart
    whole = merged(plain)
    return whole if isinstance(whole, Refusal) else [*apart, whole]


def _gathers(whole: Linear, paths: Sequence[Path]) -> bool:
    """Whether paths bring each channel of a value to a place of its own, in order and once."""
    if isinstance(whole, Diagonal) or not is_placement(whole):
        return False
    shapes = [path.map for path in paths if isinstance(path.map, Map) and path.weight is None]
    if len(shapes) < len(paths) or not all(shape.selects for shape in shapes):
        return False
    count = [len(s.band.narrowed.starts) for s in shapes if s.channelwise is not None]
    return len(count) == len(paths) and sum(count) == whole.band.narrowed.outputs
