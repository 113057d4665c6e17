"""The steps of a walk: from values that are affine in their operands to these operands.

A step takes the latest value of the frontier; if that is affine in its operands, they replace it
there, their maps composed with the paths that led to it. A walk that may move operations also steps
over those that commute with all that it has passed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from fxrep.algebra import composition, weights
from fxrep.algebra.maps import IDENTITY, Band, Diagonal, Linear, Map
from fxrep.algebra.recipe import Call, Expr
from fxrep.planning.paths import Path, extended, mapped_bias, merged, merged_but_paddings
from fxrep.planning.walk import Bias, BorderBias, Passed, Shared, Walk, is_structure, unread
from fxrep.reading.commuting import Commuter, commuter
from fxrep.reading.view import Affine, Operation, Term, View
from fxrep.refusal import Refusal

# How many values one walk passes at the most: longer affine regions are merged part by part, so
# that the time stays linear in their length.
LONGEST_WALK = 128

# How many sources a plan may have to be considered on the way.
WIDEST_FRONTIER = 24

# Whether a walk may pass an operation.
Passes = Callable[[Affine], bool]


def start(view: View, root: fx.Node, *, moves: bool = False, maps: int = 0) -> Walk:
    """A walk that has not gone anywhere yet."""
    walk = Walk(view, root, moves, maps)
    found = commuter(view, root) if moves else None
    if found is not None and found.shrinks:
        walk.before = found
        walk.expanded[root] = Passed(IDENTITY, ())
        walk.frontier[found.source] = [Path(IDENTITY)]
    else:
        walk.frontier[root] = [Path(IDENTITY)]
    return walk


def steps(
    walk: Walk, passes: Passes, *, shared: bool = False, one_join: bool = False
) -> Iterator[None]:
    """Pass one value after the other; yields whenever the frontier may amount to a plan.

    Args:
        walk: as it was started.
        passes: whether an operation may be passed.
        shared: pass values that other operations read, too, as long as one source remains.
        one_join: pass the first sum or concatenation only.
    """

    def allowed(reading: Affine) -> bool:
        return passes(reading) and not (one_join and walk.joins and len(reading.terms) > 1)

    too_wide = False
    while len(walk.expanded) < LONGEST_WALK:
        open_nodes = [node for node in walk.frontier if node not in walk.frozen]
        if not open_nodes:
            break
        node = max(open_nodes)
        step = _step(walk, node, allowed, shared)
        if step is None or isinstance(step, Refusal):
            walk.frozen[node] = step
            if shared and len(walk.frontier) > 1:
                return  # an earlier value can never lead back to a later one
            continue
        step.take(walk)
        # A plan costs the width of the frontier: wide ones are considered once, at the end.
        too_wide = len(walk.frontier) > WIDEST_FRONTIER
        if not too_wide and (not shared or len(walk.frontier) == 1):
            yield
    if too_wide and not shared:
        yield


# --- a step ---------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Expansion:
    """A step from an affine value to its operands.

    Attributes:
        node: the value.
        reading: how it is computed.
        outers: the paths from the value to the root.
        paths: the paths from its operands to the root.
        biases: the constants that the step adds to the root.
        borders: all borders to be corrected after the step.
    """

    node: fx.Node
    reading: Affine
    outers: list[Path]
    paths: list[tuple[Term, Path]] = field(default_factory=list)
    biases: list[Bias] = field(default_factory=list)
    borders: list[BorderBias] = field(default_factory=list)

    def take(self, walk: Walk) -> None:
        """Replace the value in the frontier by its operands."""
        reading, outer = self.reading, self.outers[-1]
        if len({term.operand for term in reading.terms}) > 1:
            walk.joins += 1
            may_broadcast = reading.operation is not Operation.CONCATENATION
            if may_broadcast and not all(each.map.pointwise for each in self.outers):
                walk.needs_one_source = True
        walk.has_structure = walk.has_structure or is_structure(reading)
        first_operand = self.paths[-len(reading.terms)][1]
        passed = Passed(outer.map, walk.crossed, first_operand.map)
        walk.expanded.update(dict.fromkeys((self.node, *reading.absorbed), passed))
        del walk.frontier[self.node]
        for term, path in self.paths:
            walk.frontier.setdefault(term.operand, []).append(path)
        walk.biases += self.biases
        walk.borders = self.borders


@dataclass(frozen=True, eq=False)
class _Crossing:
    """A step over an operation that commutes with all operations passed: it comes last instead."""

    found: Commuter
    outer: Path

    def take(self, walk: Walk) -> None:
        """Apply the operation to the result instead, and go on from its operand."""
        found, outer = self.found, self.outer
        del walk.frontier[found.node]
        walk.expanded[found.node] = Passed(outer.map, walk.crossed)
        if found.spread > 1:
            outer = _spread(outer, found.spread)
            walk.biases = [
                Bias(Call(weights.spread, (bias.expr, found.spread))) for bias in walk.biases
            ]
        walk.after.append(found)
        walk.frontier[found.source] = [outer]


def _step(
    walk: Walk, node: fx.Node, passes: Passes, shared: bool
) -> _Expansion | _Crossing | Refusal | None:
    """The step over a value of the frontier, the reason why there is none, or None.

    Args:
        walk: stays as it is.
        node: a value of the frontier.
        passes: whether an operation may be passed.
        shared: values that other operations read may be passed.
    """
    view = walk.view
    reading = view.read(node)
    if not isinstance(reading, Affine) or walk.moves:
        crossing = _crossing(walk, node)
        if crossing is not None:
            return crossing
    if not isinstance(reading, Affine):
        return reading
    if node is not walk.root:
        if not passes(reading):
            return None
        if view.aliasing.pinned(node) and not reading.includes_writes:
            return Refusal("its value is written in place while others still read it")
    outers = merged_but_paddings(walk.frontier[node])
    if isinstance(outers, Refusal):
        return outers
    if not shared and node is not walk.root:
        refusal = _other_readers(walk, node, reading, outers)
        if refusal is not None:
            return refusal
    return _expansion(walk, node, reading, outers)


def _other_readers(walk: Walk, node: fx.Node, reading: Affine, outers: list[Path]) -> Shared | None:
    """Why a value must stay, if operations outside the walk read it."""
    gone = {*walk.expanded, *reading.absorbed}
    if all(unread(walk.view, node, Passed(outer.map, walk.crossed), gone) for outer in outers):
        return None
    others = sum(user not in gone for user in node.users)
    return Shared(f"its output is read by {others} other operation{'s' * (others > 1)}")


def _expansion(
    walk: Walk, node: fx.Node, reading: Affine, outers: list[Path]
) -> _Expansion | Refusal | None:
    """The step over an affine value, if its maps compose with the paths from it to the root."""
    step = _Expansion(node, reading, outers)
    for outer in outers:
        if outer.padding is not None and len(reading.terms) > 1:
            # Each operand would contribute to the values that the padding pads with.
            return Refusal("it pads a sum with values of its own")
        missing_border: Refusal | None = None
        shapes = _composed(walk, reading, outer, biased=reading.bias is not None)
        if isinstance(shapes, Refusal) and _border_can_be_corrected(outer, reading):
            missing_border = shapes
            shapes = _composed(walk, reading, outer, biased=False)
        if shapes is None or isinstance(shapes, Refusal):
            return shapes
        for i, (term, shape) in enumerate(zip(reading.terms, shapes, strict=True)):
            step.paths.append((term, extended(walk.view, outer, node, reading, i, shape)))
        if missing_border is not None:
            step.borders.append(_border_bias(reading, outer, missing_border.reason))
        elif reading.bias is not None:
            step.biases.append(_root_bias(outer, reading.bias))
    borders = _borders_before(walk, node, reading)
    if isinstance(borders, Refusal):
        return borders
    step.borders = borders + step.borders
    return step


def _composed(
    walk: Walk, reading: Affine, outer: Path, *, biased: bool
) -> list[Linear] | Refusal | None:
    """The map from each operand to the root; None if `walk.before` does not commute with it."""
    shapes: list[Linear] = []
    for term in reading.terms:
        shape = composition.compose(outer.map, term.map, biased=biased)
        if isinstance(shape, Refusal):
            return shape
        if walk.before is not None and not _stays_above(walk.before, shape):
            return None
        shapes.append(shape)
    return shapes


def _root_bias(outer: Path, bias: Expr) -> Bias:
    """A bias on the way as one of the root."""
    band = outer.map.channelwise if isinstance(outer.map, Map) else None
    return Bias(mapped_bias(outer.map, outer.weight, bias), None if band is None else band.rows)


# --- borders --------------------------------------------------------------------------------------


def _border_can_be_corrected(outer: Path, reading: Affine) -> bool:
    """Whether the bias could be added by a map of an image of ones that has its operand's size."""
    if reading.bias is None or len(reading.terms) > 1 or not reading.terms[0].map.pointwise:
        return False
    shape = outer.map
    if not isinstance(shape, Map) or shape.channelwise is None or shape.transposed:
        return False
    return outer.padding is None and shape.padding_mode == "zeros" and shape.band.rows is None


def _border_bias(reading: Affine, outer: Path, reason: str) -> BorderBias:
    """The bias of a reading as a map of an image of ones."""
    assert isinstance(outer.map, Map) and reading.bias is not None
    one_input = Band(torch.zeros(outer.map.outputs).long(), 1, 1)
    shape = replace(outer.map, channelwise=one_input)
    weight = Call(weights.frame, (outer.map, outer.weight, reading.bias))
    return BorderBias(reading.terms[0].operand, shape, weight, reason)


def _borders_before(walk: Walk, node: fx.Node, reading: Affine) -> list[BorderBias] | Refusal:
    """The walk's borders, where images of the size of `node` get that of its operand if equal."""
    if all(border.node is not node for border in walk.borders):
        return walk.borders
    terms = reading.terms
    if len(terms) > 1 and reading.operation is not Operation.CONCATENATION:
        return Refusal("a border would have to be corrected for a sum, which may broadcast")
    shape = terms[0].map
    if isinstance(shape, Map) and not shape.keeps_size:
        return Refusal("a border would have to be corrected for a value of another size")
    return [
        replace(border, node=terms[0].operand) if border.node is node else border
        for border in walk.borders
    ]


# --- operations that commute ----------------------------------------------------------------------


def _crossing(walk: Walk, node: fx.Node) -> _Crossing | None:
    """The step over an operation that commutes with all operations passed, if it is one."""
    if not walk.moves or node is walk.root or walk.before is not None:
        return None
    if len(walk.frontier) > 1 or walk.borders:
        return None
    found = commuter(walk.view, node)
    if found is None:
        return None
    outer = merged(walk.frontier[node])
    if isinstance(outer, Refusal) or not _goes_below(walk.view, found, outer):
        return None
    passed = Passed(outer.map, walk.crossed)
    if walk.view.aliasing.pinned(node) or not unread(walk.view, node, passed, walk.expanded):
        return None
    return _Crossing(found, outer)


def _goes_below(view: View, found: Commuter, outer: Path) -> bool:
    """Whether a map after an operation may be applied before it."""
    if isinstance(outer.map, Diagonal):
        if outer.map.axis not in (None, -found.spatial - 1):
            return False
        if found.keeps_order_only and outer.weight is not None:
            return bool((view.value(outer.weight) > 0).all())
        return True
    if not found.allows_mixing or not outer.map.pointwise or outer.padding is not None:
        return False
    # Before a mean over all positions a layer would run at an unknown number of them.
    return len(outer.map.axes) == found.spatial and bool(found.axes or found.factors)


def _stays_above(found: Commuter, shape: Linear) -> bool:
    """Whether a map before an operation may be applied after it."""
    if isinstance(shape, Diagonal):
        return shape.axis in (None, -found.spatial - 1)
    return shape.pointwise and len(shape.axes) == found.spatial


def _spread(path: Path, times: int) -> Path:
    """The map before a pixel shuffle that does what this map of single channels does after it."""
    assert isinstance(path.map, Diagonal)
    channels = None if path.map.channels is None else path.map.channels * times
    weight = None if path.weight is None else Call(weights.spread, (path.weight, times))
    shape = Diagonal(channels, path.map.axis)
    return replace(path, map=shape, weight=weight, channels_checked=False)
