"""The walk back from a root: which values it is an affine convolution map of.

The walk keeps a frontier of values and the map from each of them to the root. It takes the latest
value; if that is computed linearly, its operands replace it, their maps composed with its own.
Everything here works on shapes; weights are recorded as expressions and computed once, for the
plan that is taken (`fxrep.planning.plan`).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx

from fxrep.algebra import composition, weights
from fxrep.algebra.maps import IDENTITY, Band, Diagonal, Linear, Map, has_holes, places
from fxrep.algebra.recipe import Call, Expr
from fxrep.planning.cost import Work
from fxrep.reading.commuting import Mover, mover
from fxrep.reading.view import Affine, Term, View, scope
from fxrep.refusal import Refusal

# How many values one walk expands at the most: linear regions longer than this are merged part by
# part, so that the time stays linear in their length.
LONGEST_WALK = 128

# How many sources a plan may have to be considered on the way.
WIDEST_FRONTIER = 24

# How far apart two values computed in float64 may be and count as one.
SAME_VALUE = 1e-12

Rule = Callable[[Affine], bool]


@dataclass(frozen=True, eq=False)
class Outside:
    """What a path pads its operand with, seen from where it was padded.

    Attributes:
        value: (C,) or (), what the padded value has outside.
        map: from the operand to the padded value.
        weight: of that map.
        biases: what is added on that way; once they add up to `value`, the operand is padded with
            zeros.
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
        weight: its weight, None for ones.
        operands: bit i says that it enters the root by its term i.
        proven: the value is known to have the channels of the map.
        zero: its weight is zero.
        layers: the convolution and linear layers on the way.
        meets: the concatenations on the way; paths through one have equal sizes there.
        outside: what it pads its operand with, if that is not zero.
    """

    map: Linear
    weight: Expr | None = None
    operands: int = 0
    proven: bool = False
    zero: bool = False
    layers: frozenset[fx.Node] = frozenset()
    meets: frozenset[fx.Node] = frozenset()
    outside: Outside | None = None


@dataclass(frozen=True, eq=False)
class Bias:
    """A constant added to the root: (O,) or (), on some rows only if `rows` says so."""

    expr: Expr
    rows: tuple[int, int] | None = None


@dataclass(frozen=True, eq=False)
class Frame:
    """A bias that a padding after it does not see: a map of the image of ones of `node`'s size."""

    node: fx.Node
    map: Map
    weight: Expr
    reason: str  # why it is needed


@dataclass(frozen=True, eq=False)
class Seen:
    """An expanded value.

    Attributes:
        map: from it to the root.
        crossed: what was moved over when it was reached.
        whole: from its first operand to the root.
    """

    map: Linear
    crossed: tuple[Mover, ...]
    whole: Linear = IDENTITY


@dataclass(eq=False)
class Walk:
    """The state of one walk.

    Attributes:
        moves: operations that commute may be moved: over the root, or down to the sources.
        maps: how many operations other than scales and shifts a plan must replace.
        before: an operation at the root that is applied to the sources instead.
        after: operations met on the way that are applied to the result instead, outermost first.
        one_source: a spatial map was moved over an addition, which may broadcast.
        survivors: the walk stopped at a value that others read too.
        movers: it stopped at an operation that commutes.
        structure: it has passed a pooling, a pad, a slice or the like.
        joins: how many sums and concatenations of several values it has passed.
        works: of what was expanded, as far as a plan has asked.
    """

    view: View
    root: fx.Node
    moves: bool = False
    maps: int = 0
    frontier: dict[fx.Node, list[Path]] = field(default_factory=dict)
    expanded: dict[fx.Node, Seen] = field(default_factory=dict)
    frozen: dict[fx.Node, Refusal] = field(default_factory=dict)
    biases: list[Bias] = field(default_factory=list)
    frames: list[Frame] = field(default_factory=list)
    before: Mover | None = None
    after: list[Mover] = field(default_factory=list)
    one_source: bool = False
    survivors: bool = False
    movers: bool = False
    joins: int = 0
    structure: bool = False
    works: dict[fx.Node, Work] = field(default_factory=dict)

    @property
    def crossed(self) -> tuple[Mover, ...]:
        """What positions of a value are counted through."""
        return (*self.after, *((self.before,) if self.before is not None else ()))


def start(view: View, root: fx.Node, *, moves: bool = False, maps: int = 0) -> Walk:
    """A walk that has not gone anywhere yet."""
    walk = Walk(view, root, moves, maps)
    found = mover(view, root) if moves else None
    if found is not None and found.shrinks:
        walk.before = found
        walk.expanded[root] = Seen(IDENTITY, ())
        walk.frontier[found.source] = [Path(IDENTITY)]
    else:
        walk.frontier[root] = [Path(IDENTITY)]
    return walk


def steps(
    walk: Walk, reads: Rule, *, survivors: bool = False, one_join: bool = False
) -> Iterator[None]:
    """Expand one value after the other; yields after each at which the frontier may be a plan.

    Args:
        walk: as it was started.
        reads: which readings it may pass.
        survivors: pass values that others read too, as long as there is one source in the end.
        one_join: pass the first sum or concatenation only.
    """

    def passes(reading: Affine) -> bool:
        return reads(reading) and not (one_join and walk.joins and len(reading.terms) > 1)

    passed_over = False
    while len(walk.expanded) < LONGEST_WALK:
        open_nodes = [node for node in walk.frontier if node not in walk.frozen]
        if not open_nodes:
            break
        node = max(open_nodes)
        refusal = _expand(walk, node, passes, survivors)
        if refusal is not None:
            walk.frozen[node] = refusal
            if survivors and len(walk.frontier) > 1:
                return  # an earlier value can never lead back to a later one
            continue
        # Wide frontiers are looked at only once, at the end: each look costs their width.
        passed_over = len(walk.frontier) > WIDEST_FRONTIER
        if not passed_over and (not survivors or len(walk.frontier) == 1):
            yield
    if passed_over and not survivors:
        yield


def _expand(walk: Walk, node: fx.Node, reads: Rule, through_survivors: bool) -> Refusal | None:
    """Replace `node` in the frontier by what it is computed from."""
    view = walk.view
    reading = view.read(node)
    if not isinstance(reading, Affine) or walk.moves:
        refusal = _cross(walk, node)
        if refusal is None:
            return None
        if not isinstance(reading, Affine):
            return reading if isinstance(reading, Refusal) else refusal
    if node is not walk.root:
        if not reads(reading):
            return Refusal("")
        if view.aliasing.pinned(node) and not reading.settled:
            return Refusal("its value is written in place while others still read it")
    outers = _outers(walk.frontier[node])
    if isinstance(outers, Refusal):
        return outers
    if not through_survivors and node is not walk.root:
        gone = {*walk.expanded, *reading.inside}
        if not all(unread(view, node, Seen(o.map, walk.crossed), gone) for o in outers):
            walk.survivors = True
            others = sum(user not in gone for user in node.users)
            plural = "s" * (others > 1)
            return Refusal(f"its output is read by {others} other operation{plural}", "shared")
    step = _Step(node, reading)
    for outer in outers:
        refusal = _through(walk, step, outer)
        if refusal is not None:
            return refusal
    refusal = _move_frames(walk, step)
    if refusal is not None:
        return refusal
    several = len({term.operand for term in reading.terms}) > 1
    if several and reading.kind != "cat" and not all(_pointwise(outer.map) for outer in outers):
        walk.one_source = True
    walk.joins += several
    walk.structure = walk.structure or is_structure(reading)
    del walk.frontier[node]
    first = step.paths[-len(reading.terms)][1]
    seen = Seen(outers[-1].map, walk.crossed, first.map)
    walk.expanded.update(dict.fromkeys((node, *reading.inside), seen))
    for term, path in step.paths:
        walk.frontier.setdefault(term.operand, []).append(path)
    walk.biases += step.biases
    walk.frames += step.frames
    return None


@dataclass(eq=False)
class _Step:
    """What the expansion of one value adds to the walk, if it is legal."""

    node: fx.Node
    reading: Affine
    paths: list[tuple[Term, Path]] = field(default_factory=list)
    biases: list[Bias] = field(default_factory=list)
    frames: list[Frame] = field(default_factory=list)


def _outers(paths: Sequence[Path]) -> list[Path] | Refusal:
    """The ways to the root as one, but for those that pad with something of their own."""
    plain = [path for path in paths if path.outside is None]
    apart = [path for path in paths if path.outside is not None]
    if not plain:
        return apart
    whole = merged(plain)
    return whole if isinstance(whole, Refusal) else [*apart, whole]


def _through(walk: Walk, step: _Step, outer: Path) -> Refusal | None:
    """Compose one way to the root with what `step.node` computes."""
    reading = step.reading
    biased = reading.bias is not None
    if outer.outside is not None and len(reading.terms) > 1:
        return Refusal("it pads a sum with values of its own")  # each operand has a part in them
    framed: Refusal | None = None
    shapes: list[Linear] = []
    for term in reading.terms:
        shape = composition.compose(outer.map, term.map, biased=biased)
        if isinstance(shape, Refusal) and biased and _can_frame(outer, reading):
            framed, shape = shape, composition.compose(outer.map, term.map, biased=False)
        if isinstance(shape, Refusal):
            return shape
        if walk.before is not None and not _passes_below(walk.before, shape):
            return Refusal("")
        shapes.append(shape)
    for index, (term, shape) in enumerate(zip(reading.terms, shapes, strict=True)):
        path = Path(
            shape,
            _composed(shape, outer, term),
            outer.operands or 1 << index,
            _proven(reading, outer),
            outer.zero or _is_zero(walk.view, reading, term),
            outer.layers | {step.node} if reading.is_layer else outer.layers,
            outer.meets | {step.node} if reading.kind == "cat" else outer.meets,
            _outside(outer, reading, term),
        )
        step.paths.append((term, _settled(walk.view, path)))
    if reading.bias is None:
        return None
    if framed is not None:
        assert isinstance(outer.map, Map)
        outputs = outer.map.outputs
        ones = replace(outer.map, channelwise=Band(torch.zeros(outputs).long(), 1, 1))
        weight = Call(weights.frame, (outer.map, outer.weight, reading.bias))
        step.frames.append(Frame(reading.terms[0].operand, ones, weight, framed.reason))
        return None
    bias: Expr = reading.bias
    if outer.weight is not None or isinstance(outer.map, Map):
        bias = Call(weights.compose_bias, (outer.map, outer.weight, bias))
    band = outer.map.channelwise if isinstance(outer.map, Map) else None
    step.biases.append(Bias(bias, None if band is None else band.rows))
    return None


def _passes_below(found: Mover, shape: Linear) -> bool:
    """Whether a map above `found` may be applied after it: pointwise, on the channels it keeps."""
    if isinstance(shape, Diagonal):
        return shape.axis in (None, -found.spatial - 1)
    return shape.pointwise and len(shape.axes) == found.spatial


def _can_frame(outer: Path, reading: Affine) -> bool:
    """Whether a bias could instead be added by an image of ones that has its operand's size."""
    if len(reading.terms) > 1 or not _pointwise(reading.terms[0].map) or outer.outside is not None:
        return False
    shape = outer.map
    if not isinstance(shape, Map) or shape.channelwise is None or shape.transposed:
        return False
    return shape.padding_mode == "zeros" and shape.band.rows is None


def _move_frames(walk: Walk, step: _Step) -> Refusal | None:
    """Images of ones of the size of `step.node` become those of its operand, of equal size."""
    here = [frame for frame in walk.frames if frame.node is step.node]
    if not here:
        return None
    terms = step.reading.terms
    if len(terms) > 1 and step.reading.kind != "cat":
        return Refusal("a border would have to be corrected for a sum, which may broadcast")
    shape = terms[0].map
    if isinstance(shape, Map) and not shape.keeps_size:
        return Refusal("a border would have to be corrected for a value of another size")
    walk.frames = [
        replace(frame, node=terms[0].operand) if frame.node is step.node else frame
        for frame in walk.frames
    ]
    return None


def _composed(shape: Linear, outer: Path, term: Term) -> Expr | None:
    if term.weight is None and isinstance(term.map, Diagonal):
        return outer.weight
    if outer.weight is None and isinstance(outer.map, Diagonal):
        return term.weight
    ones = outer.weight is None and term.weight is None and _selects(outer.map)
    if ones and _selects(term.map) and not has_holes(shape):
        return None
    return Call(weights.compose, (shape, outer.map, term.map, outer.weight, term.weight))


def _selects(shape: Linear) -> bool:
    return isinstance(shape, Diagonal) or shape.selects


def _proven(reading: Affine, outer: Path) -> bool:
    """Whether the operand must have the channels of the composite, or the original raises.

    A convolution or BatchNorm raises; a scale by a vector or an addition may broadcast instead.
    """
    if len(reading.terms) > 1:
        return False
    term = reading.terms[0]
    if isinstance(term.map, Diagonal) and term.map.axis is None:
        return outer.proven
    if isinstance(term.map, Map) and term.map.channelwise is None:
        return outer.proven
    return reading.proves


def _is_zero(view: View, reading: Affine, term: Term) -> bool:
    """A branch switched off by its coefficient."""
    if reading.kind != "mul" or term.weight is None:
        return False
    return not bool(view.value(term.weight).any())


def _outside(outer: Path, reading: Affine, term: Term) -> Outside | None:
    """What a path pads with, after one more step down."""
    here = outer.outside
    if here is None:
        return None if reading.outside is None else Outside(reading.outside)
    shape = composition.compose(here.map, term.map, biased=False)
    assert not isinstance(shape, Refusal)  # pointwise, or the composition had been refused
    above = Path(here.map, here.weight)
    biases = here.biases
    if reading.bias is not None:
        bias: Expr = reading.bias
        if here.weight is not None or isinstance(here.map, Map):
            bias = Call(weights.compose_bias, (here.map, here.weight, bias))
        biases = (*biases, bias)
    return Outside(here.value, shape, _composed(shape, above, term), biases)


def _settled(view: View, path: Path) -> Path:
    """A path that pads with what its operand's map gives for zeros pads the operand with zeros."""
    outside = path.outside
    if outside is None:
        return path
    assert isinstance(path.map, Map)
    value = view.value(outside.value).cpu()
    given = torch.zeros((), dtype=torch.float64)
    for bias in outside.biases:
        given = given + view.value(bias).cpu()
    if not _equal(value, given):
        return path
    return replace(path, map=replace(path.map, padding_mode="zeros"), outside=None)


def _equal(a: Tensor, b: Tensor) -> bool:
    """Equal in real arithmetic, as far as float64 can tell."""
    if a.dim() and b.dim() and a.shape != b.shape:
        return False
    return bool(((a - b).abs() <= SAME_VALUE * (a.abs() + b.abs())).all())


def merged(paths: Sequence[Path]) -> Path | Refusal:
    """Several ways to the root as one map."""
    if len(paths) == 1:
        return paths[0]
    if any(path.outside is not None for path in paths):
        return Refusal("a branch pads with values that its source does not give for zeros")
    shapes = tuple(path.map for path in paths)
    meets = frozenset.intersection(*(path.meets for path in paths))
    shape = composition.add(shapes, same_size=bool(meets))
    if isinstance(shape, Refusal):
        return shape
    alive = [path for path in paths if not path.zero]
    if 0 < len(alive) < len(paths):  # sizes agree: what is zero need not be added
        return merged(alive)
    weight: Expr | None = None
    if not _gathers(shape, paths):
        weight = Call(weights.add, (shape, shapes, *(path.weight for path in paths)))
    operands = 0
    for path in paths:
        operands |= path.operands
    return Path(
        shape,
        weight,
        operands,
        any(path.proven for path in paths),
        not alive,
        frozenset[fx.Node]().union(*(path.layers for path in paths)),
        meets,
    )


def _gathers(whole: Linear, paths: Sequence[Path]) -> bool:
    """Whether paths bring each channel of a value to a place of its own, in order and once."""
    if isinstance(whole, Diagonal) or not places(whole):
        return False
    shapes = [path.map for path in paths if isinstance(path.map, Map) and path.weight is None]
    if len(shapes) < len(paths) or not all(map(_selects, shapes)):
        return False
    count = [len(s.band.narrowed.starts) for s in shapes if s.channelwise is not None]
    return len(count) == len(paths) and sum(count) == whole.band.narrowed.outputs


def _pointwise(shape: Linear) -> bool:
    return isinstance(shape, Diagonal) or shape.pointwise


# --- operations moved over ------------------------------------------------------------------------


def _cross(walk: Walk, node: fx.Node) -> Refusal | None:
    """Move all that the walk has passed below `node`, which then is applied to the result."""
    found = mover(walk.view, node)
    if found is None:
        return Refusal("")
    if not walk.moves:
        walk.movers = True
        return Refusal("")
    if node is walk.root or len(walk.frontier) > 1 or walk.frames or walk.before is not None:
        return Refusal("")
    outer = merged(walk.frontier[node])
    if isinstance(outer, Refusal) or not _passes(walk, found, outer):
        return Refusal("")
    if walk.view.aliasing.pinned(node) or not unread(
        walk.view, node, Seen(outer.map, walk.crossed), walk.expanded
    ):
        return Refusal("")
    del walk.frontier[node]
    walk.expanded[node] = Seen(outer.map, walk.crossed)
    if found.spread > 1:
        outer = _spread(outer, found.spread)
        walk.biases = [
            Bias(Call(weights.spread, (bias.expr, found.spread))) for bias in walk.biases
        ]
    walk.after.append(found)
    walk.frontier[found.source] = [outer]
    return None


def _passes(walk: Walk, found: Mover, outer: Path) -> bool:
    """Whether the map above `found` may be applied below it."""
    if isinstance(outer.map, Diagonal):
        if outer.map.axis not in (None, -found.spatial - 1):
            return False
        if found.orders and outer.weight is not None:
            return bool((walk.view.value(outer.weight) > 0).all())
        return True
    if not found.mixes or not outer.map.pointwise or outer.outside is not None:
        return False
    # Below a mean over everything a layer would run at who knows how many positions.
    return len(outer.map.axes) == found.spatial and bool(found.axes or found.factors)


def _spread(path: Path, times: int) -> Path:
    """A per-channel map of a shuffled value as one of what was shuffled."""
    assert isinstance(path.map, Diagonal)
    channels = None if path.map.channels is None else path.map.channels * times
    weight = None if path.weight is None else Call(weights.spread, (path.weight, times))
    return replace(path, map=Diagonal(channels, path.map.axis), weight=weight, proven=False)


# --- who reads a value ----------------------------------------------------------------------------


def unread(view: View, node: fx.Node, seen: Seen, gone: Container[fx.Node]) -> bool:
    """Whether nobody but `gone` needs the node's value itself.

    Who reads only its dtype can read that of the result, and of a result of the same shape its
    shape too.
    """
    outer = seen.map
    same = not seen.crossed and (
        isinstance(outer, Diagonal)
        or (outer.channelwise is not None and outer.pointwise and outer.inputs == outer.outputs)
    )
    return all(
        user in gone or (view.reads_metadata(user) and (same or not view.reads_size(user)))
        for user in node.users
    )


def is_structure(reading: Affine) -> bool:
    """Pooling, padding, slices: maps of one value that are no layers."""
    single = len(reading.terms) == 1 and not reading.is_layer
    return single and isinstance(reading.terms[0].map, Map)


def where(node: fx.Node) -> str:
    """The module path a node comes from, for people."""
    if node.op in ("call_module", "get_attr"):
        return str(node.target)
    return scope(node) or node.name
