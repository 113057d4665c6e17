"""Finding collapses: which part of a graph is one convolution of one value.

The walk starts at a root and goes back in topological order with a frontier of values and the
map from each of them to the root. It takes the latest value; if that is computed linearly, its
operands replace it, their maps composed with its own. Whenever the frontier is a plain set of
sources, "root = sum of convolutions of these" is a candidate. Everything here works on shapes;
weights are recorded as expressions and computed once, for the plan that is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from fxrep import geometry, kernels
from fxrep.cost import SIZES, TYPICAL, CostModel, Work, total
from fxrep.geometry import IDENTITY, Diagonal, Linear, Map, Refusal
from fxrep.operators import Affine, Term, View, reads_metadata, scope, writes
from fxrep.recipe import Call, Expr

# How many values one walk expands at the most: linear regions longer than this are cut.
LONGEST_WALK = 512


@dataclass(frozen=True, eq=False)
class Piece:
    """One summand of a plan: a convolution of `source`, or `source` itself if weight is None.

    Attributes:
        layers: the convolution and linear layers it is made of.
    """

    source: fx.Node
    map: Linear
    weight: Expr | None
    layers: frozenset[fx.Node]


@dataclass(frozen=True, eq=False)
class Plan:
    """``root = sum of pieces + bias``, in place of the nodes of `region`.

    Attributes:
        root: the node whose value is replaced.
        region: every node that dies, root last, in graph order.
        expanded: every node passed, dying or not, in graph order.
        pieces: the summands that replace them, in graph order of their sources.
        bias: (O,) or () added once, or None.
        relies: values assumed to be batched.
        before: work of what dies.
        after: work of the pieces.
        apart: why pieces of one source stay apart, if some do.
    """

    root: fx.Node
    region: tuple[fx.Node, ...]
    expanded: tuple[fx.Node, ...]
    pieces: tuple[Piece, ...]
    bias: Expr | None
    relies: tuple[fx.Node, ...]
    before: Work
    after: Work
    apart: str | None = None

    @property
    def score(self) -> tuple[int, int]:
        """Multiply-accumulates and operations saved."""
        return (
            self.before.macs[TYPICAL] - self.after.macs[TYPICAL],
            self.before.operations - self.after.operations,
        )


Rule = Callable[[Affine], bool]


@dataclass(frozen=True, eq=False)
class _Path:
    """One way from a value to the root."""

    map: Linear
    weight: Expr | None
    operands: int  # bit i: it enters the root by its term i
    proven: bool  # the value is known to have the channels of the map
    layers: frozenset[fx.Node] = frozenset()


@dataclass(eq=False)
class _Walk:
    view: View
    root: fx.Node
    frontier: dict[fx.Node, list[_Path]]
    expanded: dict[fx.Node, Linear] = field(default_factory=dict)
    frozen: dict[fx.Node, str] = field(default_factory=dict)
    biases: list[Expr] = field(default_factory=list)
    one_source: bool = False  # a spatial map was moved over an addition
    survivors: bool = False  # it stopped at a value that others read too
    works: dict[fx.Node, Work] = field(default_factory=dict)


def search(view: View, root: fx.Node, reads: Rule, cost: CostModel) -> Plan | Refusal | None:
    """The best plan for `root`, why there is none, or None if nothing was in sight.

    Args:
        view: the graph.
        root: the node to replace.
        reads: which readings a walk may pass.
        cost: decides between legal plans.
    """
    best: Plan | None = None
    objections: list[str] = []
    for through_survivors in (False, True):
        walk = _start(view, root)
        for _ in _steps(walk, reads, through_survivors):
            plan = _plan(walk, cost)
            if isinstance(plan, Plan):
                objection = cost.objection(plan.before, plan.after)
                if objection is not None:
                    objections.append(plan.apart or f"not worth it: {objection}")
                elif best is None or plan.score > best.score:
                    best = plan
            elif plan is not None:
                objections.append(plan.reason)
        if len(walk.expanded) <= 1:  # it did not get past the root's own operand
            objections.extend(
                why if where(node) == where(root) else f"{where(node)}: {why}"
                for node, why in walk.frozen.items()
                if why
            )
        if not walk.survivors:
            break
    if best is not None:
        return best
    return Refusal(objections[-1]) if objections else None


def where(node: fx.Node) -> str:
    """The module path a node comes from, for people."""
    if node.op in ("call_module", "get_attr"):
        return str(node.target)
    return scope(node) or node.name


def _start(view: View, root: fx.Node) -> _Walk:
    return _Walk(view, root, {root: [_Path(IDENTITY, None, 0, False)]})


def _steps(walk: _Walk, reads: Rule, through_survivors: bool) -> Iterator[None]:
    """Expand one value after the other; yields after each at which the frontier may be a plan."""
    while len(walk.expanded) < LONGEST_WALK:
        open_nodes = [node for node in walk.frontier if node not in walk.frozen]
        if not open_nodes:
            return
        node = max(open_nodes)
        refusal = _expand(walk, node, reads, through_survivors)
        if refusal is not None:
            walk.frozen[node] = refusal.reason
            if through_survivors and len(walk.frontier) > 1:
                return  # an earlier value can never lead back to a later one
            continue
        if not through_survivors or len(walk.frontier) == 1:
            yield


def _expand(walk: _Walk, node: fx.Node, reads: Rule, through_survivors: bool) -> Refusal | None:
    """Replace `node` in the frontier by what it is computed from."""
    view = walk.view
    reading = view.read(node)
    if reading is None:
        return Refusal("")
    if isinstance(reading, Refusal):
        return reading
    if node is not walk.root and not reads(reading):
        return Refusal("")
    if node is not walk.root and view.aliasing.pinned(node):
        return Refusal("its value is written in place while others still read it")
    outer = _merged(walk.frontier[node])
    if isinstance(outer, Refusal):
        return outer
    if (
        not through_survivors
        and node is not walk.root
        and not _unread(node, outer.map, walk.expanded)
    ):
        walk.survivors = True
        others = sum(user not in walk.expanded for user in node.users)
        return Refusal(f"its output is read by {others} other operation{'s' * (others > 1)}")
    additions = []
    for index, term in enumerate(reading.terms):
        shape = geometry.compose(outer.map, term.map, biased=reading.bias is not None)
        if isinstance(shape, Refusal):
            return shape
        operands = outer.operands or 1 << index
        path = _path(shape, outer, term, operands, _proven(reading, outer))
        if reading.weight is not None:
            path = replace(path, layers=path.layers | {node})
        additions.append((term, path))
    if len({term.operand for term in reading.terms}) > 1 and not _pointwise(outer.map):
        walk.one_source = True
    del walk.frontier[node]
    walk.expanded.update(dict.fromkeys((node, *reading.inside), outer.map))
    for term, path in additions:
        walk.frontier.setdefault(term.operand, []).append(path)
    if reading.bias is not None:
        bias: Expr = reading.bias
        if outer.weight is not None:
            bias = Call(kernels.compose_bias, (outer.map, outer.weight, bias))
        walk.biases.append(bias)
    return None


def _path(shape: Linear, outer: _Path, term: Term, operands: int, proven: bool) -> _Path:
    if outer.weight is None or term.weight is None:
        weight = term.weight if outer.weight is None else outer.weight
    else:
        weight = Call(kernels.compose, (shape, outer.map, term.map, outer.weight, term.weight))
    return _Path(shape, weight, operands, proven, outer.layers)


def _proven(reading: Affine, outer: _Path) -> bool:
    """Whether the operand must have the channels of the composite, or the original raises.

    A convolution or BatchNorm raises; a scale by a vector or an addition may broadcast instead.
    """
    if len(reading.terms) > 1:
        return False
    term = reading.terms[0]
    if isinstance(term.map, Diagonal) and term.map.axis is None:
        return outer.proven
    return reading.proves


def _merged(paths: Sequence[_Path]) -> _Path | Refusal:
    """Several ways to the root as one map."""
    if len(paths) == 1:
        return paths[0]
    shapes = tuple(path.map for path in paths)
    shape = geometry.add(shapes)
    if isinstance(shape, Refusal):
        return shape
    weight = Call(kernels.add, (shape, shapes, *(path.weight for path in paths)))
    operands = 0
    for path in paths:
        operands |= path.operands
    proven = any(path.proven for path in paths)
    layers = frozenset[fx.Node]().union(*(path.layers for path in paths))
    return _Path(shape, weight, operands, proven, layers)


def _pointwise(shape: Linear) -> bool:
    return isinstance(shape, Diagonal) or shape.pointwise


def _unread(node: fx.Node, outer: Linear, gone: Container[fx.Node]) -> bool:
    """Whether nobody but `gone` needs the node's value itself.

    Who reads only its dtype can read that of the result, and of a result of the same shape its
    shape too.
    """
    same = isinstance(outer, Diagonal) or (outer.pointwise and outer.inputs == outer.outputs)
    return all(
        user in gone or (reads_metadata(user) and (same or _sizeless(user))) for user in node.users
    )


def _sizeless(reader: fx.Node) -> bool:
    """A metadata read that gives the same answer for every value of the region."""
    name = reader.args[1] if reader.op == "call_function" else reader.target
    return name not in ("shape", "size")


def metadata_readers(plan: Plan) -> list[fx.Node]:
    """Nodes outside the region that read the shape, dtype or device of a value that dies."""
    region = set(plan.region)
    return [user for node in plan.region[:-1] for user in node.users if user not in region]


# --- from a frontier to a plan ----------------------------------------------------------------


def _plan(walk: _Walk, cost: CostModel) -> Plan | Refusal | None:
    """The plan that the present frontier amounts to; None if it is not one at all."""
    if any(node.op == "get_attr" for node in walk.frontier):
        return None
    for paths in walk.frontier.values():
        if len(paths) == 1 and isinstance(paths[0].map, Diagonal) and paths[0].weight is not None:
            return None  # a scaled value that no layer takes up
    pieces: list[Piece] = []
    apart: str | None = None
    for source in sorted(walk.frontier):
        paths = walk.frontier[source]
        merged, reason = _cheapest(paths, cost)
        apart = apart or reason
        for path in merged:
            if isinstance(path.map, Diagonal) and path.weight is not None:
                return None
            if isinstance(path.map, Map):
                refusal = geometry.unavailable(path.map) or _unproven(walk, source, paths, path.map)
                if refusal is not None:
                    return refusal
            pieces.append(Piece(source, path.map, path.weight, path.layers))
    shapes = [piece.map for piece in pieces if isinstance(piece.map, Map)]
    if not shapes or (walk.one_source and len(pieces) > 1):
        return None
    if len({shape.outputs for shape in shapes}) > 1:
        return Refusal("branches of different channels broadcast against each other")
    if len(pieces) > 1 and _separable(walk):
        return None
    region = _dying(walk)
    if len(pieces) > 1 and any(
        not _sizeless(user)
        for node in region[:-1]
        for user in node.users
        if user not in walk.expanded
    ):
        return Refusal("the shape of an inner value is read")
    sources = [piece.source for piece in pieces]
    expanded = tuple(sorted(walk.expanded))
    if walk.view.aliasing.writes_between(expanded[0], walk.root, sources, dying=set(region)):
        return Refusal("a source is written in place between its readers")
    if len(pieces) > len(shapes) and any(map(writes, expanded)):
        return Refusal("an in-place sum takes the dtype of one of its operands, not known here")
    refusal = _promotion(walk)
    if refusal is not None:
        return refusal
    rank = len(shapes[0].axes)
    outputs = shapes[0].outputs
    readings = [walk.view.read(node) for node in region]
    relies = tuple(
        value
        for node in expanded
        if isinstance(reading := walk.view.read(node), Affine)
        for value in reading.relies
    )
    if sum(r.kind != "identity" for r in readings if isinstance(r, Affine)) < 2:
        return None  # one operation in place of one
    for node, reading in zip(region, readings, strict=True):
        if node not in walk.works and isinstance(reading, Affine):
            walk.works[node] = _work(reading, walk.expanded[node], outputs, rank)
    before = total([walk.works[node] for node in region if node in walk.works])
    bias = _total_bias(walk)
    parts = [_layer(shape, IDENTITY, rank, bias is not None) for shape in shapes]
    parts += [_elementwise(2, outputs, IDENTITY, rank, 1)] * (len(pieces) - 1)
    after = total(parts)
    return Plan(walk.root, region, expanded, tuple(pieces), bias, relies, before, after, apart)


def _total_bias(walk: _Walk) -> Expr | None:
    if not walk.biases:
        return None
    return walk.biases[0] if len(walk.biases) == 1 else Call(kernels.add_biases, (*walk.biases,))


def _cheapest(paths: Sequence[_Path], cost: CostModel) -> tuple[list[_Path], str | None]:
    """The ways from one source, merged where that is legal and worth it, and why not all are."""
    if len(paths) == 1:
        return list(paths), None
    whole = _together(paths, cost)
    if not isinstance(whole, Refusal):
        return [whole], None
    merged: list[_Path] = []
    for path in sorted(paths, key=_weights, reverse=True):
        for i, other in enumerate(merged):
            both = _together([other, path], cost)
            if not isinstance(both, Refusal):
                merged[i] = both
                break
        else:
            merged.append(path)
    return merged, whole.reason


def _together(paths: Sequence[_Path], cost: CostModel) -> _Path | Refusal:
    """Several ways as one, or why that is not legal or not worth it."""
    whole = _merged(paths)
    if isinstance(whole, Refusal):
        return whole
    before = total([_weight_work(path) for path in paths])
    objection = cost.objection(before, _weight_work(whole))
    return whole if objection is None else Refusal(f"not worth it: {objection}")


def _weight_work(path: _Path) -> Work:
    """The work of a map per output position; the addition that merging saves counts with it."""
    weights = _weights(path)
    return Work((weights,) * len(SIZES), convolutions=min(weights, 1), operations=1)


def _weights(path: _Path) -> int:
    return path.map.weights if isinstance(path.map, Map) else 0


def _separable(walk: _Walk) -> bool:
    """Whether the root only adds parts that have no source in common: each is a root of its own."""
    reading = walk.view.read(walk.root)
    assert isinstance(reading, Affine)
    if len(reading.terms) < 2 or reading.bias is not None:
        return False
    for paths in walk.frontier.values():
        operands = 0
        for path in paths:
            operands |= path.operands
        if operands & (operands - 1):
            return False
    return True


def _dying(walk: _Walk) -> tuple[fx.Node, ...]:
    """The expanded nodes that nobody needs once the root is replaced, in graph order."""
    dying = {walk.root}
    for node in sorted(walk.expanded, reverse=True):
        if node is walk.root:
            continue
        if _unread(node, walk.expanded[node], dying):
            dying.add(node)
    return tuple(sorted(dying))


def _unproven(walk: _Walk, source: fx.Node, paths: Sequence[_Path], shape: Map) -> Refusal | None:
    if any(path.proven for path in paths) or channels(walk.view, source) == shape.inputs:
        return None
    return Refusal(f"{where(source)}: not known to have {shape.inputs} channels")


def channels(view: View, node: fx.Node) -> int | None:
    """The channels of a value, if its producer or an elementwise chain above it says so."""
    for _ in range(16):
        reading = view.read(node)
        if isinstance(reading, Affine) and len(reading.terms) == 1:
            shape = reading.terms[0].map
            if isinstance(shape, Map):
                return shape.outputs
            if reading.proves and shape.channels is not None:
                return shape.channels
            node = reading.terms[0].operand
        else:
            return None
    return None


def _promotion(walk: _Walk) -> Refusal | None:
    """Constants of a wider dtype than the convolution's would change the result's dtype."""
    readings = [
        (node, reading)
        for node in walk.expanded
        if isinstance(reading := walk.view.read(node), Affine)
    ]
    dtypes = {reading.weight.dtype for _, reading in readings if reading.weight is not None}
    if len(dtypes) > 1:
        return Refusal(f"branches of different dtypes: {' and '.join(sorted(map(str, dtypes)))}")
    for dtype in dtypes:
        for node, reading in readings:
            for other in reading.promotes:
                if torch.promote_types(dtype, other) != dtype:
                    return Refusal(f"{where(node)}: a constant of {other} promotes {dtype}")
    return None


# --- work --------------------------------------------------------------------------------------


def _positions(outer: Linear, rank: int) -> tuple[int, ...]:
    """Positions of a value that the root needs, at each root size."""
    if isinstance(outer, Diagonal):
        return tuple(size**rank for size in SIZES)
    if outer.transposed:
        return tuple(math.prod(-(-size // a.stride) for a in outer.axes) for size in SIZES)
    return tuple(math.prod(a.needed(size) for a in outer.axes) for size in SIZES)


def _work(reading: Affine, outer: Linear, outputs: int, rank: int) -> Work:
    shape = reading.terms[0].map
    if isinstance(shape, Map):
        return _layer(shape, outer, rank, reading.bias is not None)
    width = outer.inputs if isinstance(outer, Map) else outputs
    vectors = (reading.bias is not None) + (reading.terms[0].weight is not None)
    operations = 0 if reading.kind == "identity" else 1
    if reading.kind == "batch_norm":
        vectors = 4
    work = _elementwise(len(reading.terms), width, outer, rank, operations)
    return replace(work, parameters=vectors * width if shape.channels else 0)


def _layer(shape: Map, outer: Linear, rank: int, biased: bool) -> Work:
    written = _positions(outer, rank)
    whole = geometry.compose(outer, shape, biased=False)
    read = written if isinstance(whole, Refusal) else _positions(whole, rank)
    computed = read if shape.transposed else written
    pads = 0 if shape.symmetric else 1
    return Work(
        macs=tuple(shape.weights * n for n in computed),
        traffic=tuple(
            (1 + pads) * shape.inputs * a + shape.outputs * b
            for a, b in zip(read, written, strict=True)
        ),
        convolutions=1,
        operations=1 + pads,
        parameters=shape.weights + (shape.outputs if biased else 0),
    )


def _elementwise(terms: int, width: int, outer: Linear, rank: int, operations: int) -> Work:
    positions = _positions(outer, rank)
    return Work(
        macs=tuple(operations * width * n for n in positions),
        traffic=tuple(operations * (terms + 1) * width * n for n in positions),
        operations=operations,
    )
