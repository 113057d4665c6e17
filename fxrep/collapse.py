"""Finding collapses: which part of a graph is one convolution of one value.

Whenever the frontier of a walk (`fxrep.walk`) is a plain set of sources, "root = sum, or
concatenation, of convolutions of these" is a candidate. The best legal candidate is the plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from fxrep import geometry, kernels, work
from fxrep.commuting import Mover
from fxrep.cost import SIZES, TYPICAL, CostModel, Work, total
from fxrep.geometry import Diagonal, Linear, Map, Refusal
from fxrep.recipe import Call, Expr
from fxrep.view import Affine, View, writes
from fxrep.walk import (
    SAME_VALUE,
    Frame,
    Path,
    Rule,
    Walk,
    merged,
    sizeless,
    start,
    steps,
    unread,
    where,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Piece:
    """One part of a plan: a convolution of `source`, or `source` itself if its map is diagonal.

    Attributes:
        bias: (O,) or () that this layer adds, or None.
        layers: the convolution and linear layers it is made of.
        ones: the last input channel of its map is a channel of ones, to be added to the source.
        rows: the outputs it gives, where the plan concatenates; else None.
    """

    source: fx.Node
    map: Linear
    weight: Expr | None
    layers: frozenset[fx.Node] = frozenset()
    bias: Expr | None = None
    ones: bool = False
    rows: tuple[int, int] | None = None


@dataclass(frozen=True, eq=False)
class Plan:
    """``root = after(join of pieces(before(source)))``, in place of the nodes of `region`.

    Attributes:
        root: the node whose value is replaced.
        region: every node that dies, root last, in graph order.
        expanded: every node passed, dying or not, in graph order.
        pieces: what replaces them, in graph order of their sources, or of rows.
        concatenates: the pieces are concatenated on `axis`, not added.
        axis: of the channels, counted from the last.
        relies: values assumed to be batched.
        saved: work of what dies.
        spent: work of what replaces it.
        apart: why pieces of one source stay apart, if some do.
        border: what a padding would see if its border were not corrected.
        before: an operation applied to the sources first.
        after: operations applied to the result, outermost first.
        outputs: nodes that get some channels of the result each, with their number; the root's
            own value if there are none.
    """

    root: fx.Node
    region: tuple[fx.Node, ...]
    expanded: tuple[fx.Node, ...]
    pieces: tuple[Piece, ...]
    axis: int
    relies: tuple[fx.Node, ...]
    saved: Work
    spent: Work
    concatenates: bool = False
    apart: str | None = None
    border: str | None = None
    before: Mover | None = None
    after: tuple[Mover, ...] = ()
    outputs: tuple[tuple[fx.Node, int], ...] = ()

    @property
    def score(self) -> tuple[int, int]:
        """Multiply-accumulates and operations saved."""
        return (
            self.saved.macs[TYPICAL] - self.spent.macs[TYPICAL],
            self.saved.operations - self.spent.operations,
        )

    @property
    def moved(self) -> tuple[Mover, ...]:
        """The operations that something is moved over."""
        return self.after if self.before is None else (*self.after, self.before)

    @property
    def saves(self) -> bool:
        """Whether it leaves fewer operations or multiply-accumulates, whatever else it costs."""
        return max(self.score) > 0

    @property
    def roots(self) -> tuple[fx.Node, ...]:
        """The nodes whose values are replaced."""
        return tuple(node for node, _ in self.outputs) or (self.root,)


def search(
    view: View, root: fx.Node, reads: Rule, cost: CostModel, *, moves: bool = False, maps: int = 0
) -> Plan | Refusal | None:
    """The best plan for `root`, why there is none, or None if nothing was in sight.

    Args:
        view: the graph.
        root: the node to replace.
        reads: which readings a walk may pass.
        cost: decides between legal plans.
        moves: whether operations that commute are moved out of the way.
        maps: how many operations other than scales and shifts a plan must replace.
    """
    objections: list[str] = []
    walk = start(view, root, moves=moves, maps=maps)
    best = _best(walk, steps(walk, reads), cost, None, objections)
    if best is None and walk.joins > 1:
        # Past a second sum or concatenation no plan paid: stop before it.
        again = start(view, root, moves=moves, maps=maps)
        best = _best(again, steps(again, reads, one_join=True), cost, best, objections)
    if walk.survivors and not moves:
        through = start(view, root, maps=maps)
        best = _best(through, steps(through, reads, survivors=True), cost, best, objections)
    if best is not None:
        return best
    return Refusal(objections[-1]) if objections else None


def absorbing(view: View, root: fx.Node, node: fx.Node, cost: CostModel) -> Plan | Refusal | None:
    """The plan in which `root` takes up what `node` computes, whoever else reads that.

    On its own it saves nothing; together with those of all other readers `node` dies.
    """
    walk = start(view, root)
    for _ in steps(walk, lambda reading: reading is view.read(node), survivors=True):
        if node in walk.expanded:
            return _plan(walk, cost, alone=True)
    return next((why for why in walk.frozen.values() if why.reason), None)


def _best(
    walk: Walk, steps: Iterator[None], cost: CostModel, best: Plan | None, objections: list[str]
) -> Plan | None:
    """The best plan of one walk, or `best` if that is better; appends why others are none."""
    for _ in steps:
        if walk.moves and walk.before is None and not walk.after:
            continue  # what needs no moving is for the other passes
        plan = _plan(walk, cost)
        if isinstance(plan, Plan):
            objection = cost.objection(plan.saved, plan.spent)
            if objection is not None and (plan.saves or plan.apart or plan.border):
                objections.append(_objection(plan, objection))
            elif objection is None and (best is None or plan.score > best.score):
                best = plan
        elif plan is not None:
            objections.append(plan.reason)
    # It did not get past the root's own operand, or not as far as the pass looks.
    near = len(walk.expanded) <= 1 and not walk.maps
    if near or (walk.maps and best is None and not objections):
        objections.extend(
            why.reason if where(node) == where(walk.root) else f"{where(node)}: {why.reason}"
            for node, why in walk.frozen.items()
            if why.reason and (near or why.kind != "shared")
        )
    return best


def _objection(plan: Plan, objection: str) -> str:
    if plan.border is not None:
        return f"{plan.border}; correcting its border is not worth it: {objection}"
    return plan.apart or f"not worth it: {objection}"


def metadata_readers(plan: Plan) -> list[fx.Node]:
    """Nodes outside the region that read the shape, dtype or device of a value that dies."""
    region, roots = set(plan.region), set(plan.roots)
    return [
        user
        for node in plan.region
        if node not in roots
        for user in node.users
        if user not in region
    ]


# --- from a frontier to a plan ----------------------------------------------------------------


@dataclass(eq=False)
class _Draft:
    """The pieces of a frontier in the making."""

    pieces: list[Piece] = field(default_factory=list)
    apart: str | None = None
    concatenates: bool = False


def _plan(walk: Walk, cost: CostModel, *, alone: bool = False) -> Plan | Refusal | None:
    """The plan that the present frontier amounts to; None if it is not one at all.

    With `alone` one operation may take the place of one.
    """
    draft = _draft(walk, cost)
    if not isinstance(draft, _Draft):
        return draft
    pieces = draft.pieces
    shapes = [piece.map for piece in pieces if isinstance(piece.map, Map)]
    if not shapes and not _is_copy(walk, draft):
        return None
    if (walk.one_source or walk.before) and len(pieces) > 1:
        return None
    if len({len(shape.axes) for shape in shapes}) > 1:
        return None
    if len(pieces) > 1 and _separable(walk):
        return None
    region = dying(walk)
    if len(pieces) > 1 and any(
        not sizeless(user)
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
    refusal = promotion(walk.view, expanded)
    if refusal is not None:
        return refusal
    readings = [reading for node in expanded if (reading := _affine(walk.view, node)) is not None]
    if sum(_is_map(walk.view, node) for node in region) < walk.maps:
        return None
    if not alone and _operations(walk, region) < 2 and not _pools(walk, region):
        return None  # one operation in place of one
    relies = tuple(value for reading in readings for value in reading.relies)
    axis = shapes[0].channel_axis if shapes else _axis(pieces[0])
    rank = -axis - 1
    return Plan(
        walk.root, region, expanded, tuple(pieces), axis, relies,
        _saved(walk, region, draft, rank), _spent(walk, draft, rank),
        draft.concatenates, draft.apart, next((f.reason for f in walk.frames), None),
        walk.before, tuple(walk.after),
    )  # fmt: skip


def _axis(piece: Piece) -> int:
    """The channels' dimension of a value that is taken as it is."""
    assert isinstance(piece.map, Diagonal) and piece.map.axis is not None
    return piece.map.axis


def _is_copy(walk: Walk, draft: _Draft) -> bool:
    """Whether values apart are put together again, and nobody would see that it is no copy."""
    if any(isinstance(p.map, Map) or p.map.axis is None for p in draft.pieces):
        return False
    root, aliasing = walk.root, walk.view.aliasing
    if draft.concatenates:
        return True
    source = draft.pieces[0].source
    if len(draft.pieces) > 1 or aliasing.written(root) or aliasing.written(source):
        return False
    return source.op != "placeholder" and all(user.op != "output" for user in root.users)


def _affine(view: View, node: fx.Node) -> Affine | None:
    reading = view.read(node)
    return reading if isinstance(reading, Affine) else None


def _is_map(view: View, node: fx.Node) -> bool:
    """More than a scale or shift."""
    reading = _affine(view, node)
    if reading is None:
        return False
    return len(reading.terms) > 1 or isinstance(reading.terms[0].map, Map)


def _operations(walk: Walk, region: Sequence[fx.Node]) -> int:
    """How many operations a region is made of; identities are none."""
    moved = {each.node for each in walk.crossed}
    readings = [(node, _affine(walk.view, node)) for node in region]
    return sum(node in moved if r is None else r.kind != "identity" for node, r in readings)


def _pools(walk: Walk, region: Sequence[fx.Node]) -> bool:
    kinds = [r.kind for node in region if (r := _affine(walk.view, node)) is not None]
    return kinds == ["avg_pool"]


def _draft(walk: Walk, cost: CostModel) -> _Draft | Refusal | None:
    """The pieces that the frontier amounts to, with their biases."""
    if any(node.op == "get_attr" for node in walk.frontier):
        return None
    for paths in walk.frontier.values():
        only = paths[0] if len(paths) == 1 else None
        if only and only.outside is None and _unavailable(only):
            return None  # scaled, cropped or padded values that no layer takes up
    draft = _Draft()
    for source in sorted(walk.frontier):
        if any(path.outside is not None for path in walk.frontier[source]):
            return Refusal("it pads with values that its source does not give for zeros")
        merged_paths, reason = _cheapest(walk.frontier[source], cost)
        draft.apart = draft.apart or reason
        for path in merged_paths:
            piece = _piece(walk, source, path)
            if not isinstance(piece, Piece):
                return piece
            draft.pieces.append(piece)
    frames = _visible(walk)
    return _with_frame(walk, draft, frames) if frames else _with_bias(walk, draft)


def _unavailable(path: Path) -> bool:
    """Whether no layer is left that could compute a path: it computes nothing, or a scale."""
    if isinstance(path.map, Diagonal):
        return path.weight is not None
    return path.weight is None and not geometry.places(path.map)


def _piece(walk: Walk, source: fx.Node, path: Path) -> Piece | Refusal | None:
    if _unavailable(path):
        return None
    shape = path.map
    if isinstance(shape, Diagonal):
        return Piece(source, shape, None)
    if shape.channelwise is None:
        channels = walk.view.channels.of(source, shape.channel_axis)
        if channels is None:
            return Refusal(f"{where(source)}: not known how many channels it has")
        shape = geometry.lifted(shape, channels)
    elif not path.proven and walk.view.channels.of(source, shape.channel_axis) != shape.inputs:
        return Refusal(f"{where(source)}: not known to have {shape.inputs} channels")
    rows = shape.band.rows
    if path.weight is None:
        return Piece(source, Diagonal(shape.inputs, shape.channel_axis), None, rows=rows)
    refusal = geometry.unavailable(shape)
    return refusal or Piece(source, shape, path.weight, path.layers, rows=rows)


def _with_bias(walk: Walk, draft: _Draft) -> _Draft | Refusal | None:
    """Give each layer its part of the bias, and decide how the pieces are put together."""
    pieces = draft.pieces
    outputs = {piece.map.outputs for piece in pieces if isinstance(piece.map, Map)}
    outputs = outputs or {max((p.rows or (0, 0))[1] for p in pieces)}
    if len(outputs) > 1:
        return Refusal("branches of different channels broadcast against each other")
    biases = walk.biases
    if any(piece.rows is not None for piece in pieces) and len(pieces) > 1:
        ordered = sorted(pieces, key=lambda piece: piece.rows or (0, 0))
        ends = [0, *((piece.rows or (0, 0))[1] for piece in ordered)]
        starts = [*((piece.rows or (0, 0))[0] for piece in ordered), *outputs]
        if ends != starts:
            return None
        draft.pieces = []
        for piece in ordered:
            first, last = piece.rows or (0, 0)
            reached = [b for b in biases if b.rows is None or b.rows[0] < last > first < b.rows[1]]
            if not reached:
                draft.pieces.append(piece)
            elif isinstance(piece.map, Diagonal):
                return None
            else:
                whole = Call(kernels.full_bias, (_sum([b.expr for b in reached]), *outputs))
                part = Call(kernels.rows, (whole, first, last))
                draft.pieces.append(replace(piece, bias=part))
        draft.concatenates = True
        return draft
    # Outputs that read nothing are rows of zeros here.
    draft.pieces = pieces = [_unbanded(piece) for piece in pieces]
    if biases:
        layer = next((i for i, p in enumerate(pieces) if isinstance(p.map, Map)), None)
        if layer is None:
            return None
        pieces[layer] = replace(pieces[layer], bias=_sum([b.expr for b in biases]))
    return draft


def _sum(exprs: Sequence[Expr]) -> Expr:
    return exprs[0] if len(exprs) == 1 else Call(kernels.add_biases, tuple(exprs))


def _unbanded(piece: Piece) -> Piece:
    if piece.rows is None or not isinstance(piece.map, Map):
        return replace(piece, rows=None)
    return replace(piece, map=geometry.unbanded(piece.map), rows=None)


def _visible(walk: Walk) -> list[Frame]:
    """The frames, unless they add up to nothing: a shift before the padding, undone after it."""
    if len(walk.frames) > 1 and len({frame.map.axes for frame in walk.frames}) == 1:
        weights = [walk.view.value(frame.weight) for frame in walk.frames]
        largest = kernels.add_biases(*(w.abs() for w in weights))
        if bool((kernels.add_biases(*weights).abs() <= SAME_VALUE * largest).all()):
            return []
    return walk.frames


def _with_frame(walk: Walk, draft: _Draft, frames: Sequence[Frame]) -> _Draft | Refusal | None:
    """Correct the border by one more input channel: ones, with the biases as its weights."""
    if len(draft.pieces) != 1 or walk.before is not None or walk.after:
        return None
    piece = draft.pieces[0]
    shape = piece.map
    if any(frame.node is not piece.source for frame in frames) or not isinstance(shape, Map):
        return None
    if shape.transposed or shape.padding_mode != "zeros" or shape.band.groups > 1:
        return Refusal("its border would need one more input channel for each group")
    inputs = shape.inputs + 1
    maps = (
        geometry.beside(geometry.unbanded(shape), inputs, 0),
        *(geometry.beside(frame.map, inputs, inputs - 1) for frame in frames),
    )
    whole = geometry.add(maps)
    if isinstance(whole, Refusal):
        return whole
    weights = (piece.weight, *(frame.weight for frame in frames))
    assert isinstance(whole, Map)
    draft.pieces = [
        replace(
            piece, map=whole, weight=Call(kernels.add, (whole, maps, *weights)), ones=True,
            bias=_sum([b.expr for b in walk.biases]) if walk.biases else None, rows=None,
        )
    ]  # fmt: skip
    return draft


def _cheapest(paths: Sequence[Path], cost: CostModel) -> tuple[list[Path], str | None]:
    """The ways from one source, merged where that is legal and worth it, and why not all are."""
    if len(paths) == 1:
        return list(paths), None
    whole = _together(paths, cost)
    if not isinstance(whole, Refusal):
        return [whole], None
    found: list[Path] = []
    for path in sorted(paths, key=_weights, reverse=True):
        for i, other in enumerate(found):
            both = _together([other, path], cost)
            if not isinstance(both, Refusal):
                found[i] = both
                break
        else:
            found.append(path)
    return found, whole.reason


def _together(paths: Sequence[Path], cost: CostModel) -> Path | Refusal:
    """Several ways as one, or why that is not legal or not worth it."""
    whole = merged(paths)
    if isinstance(whole, Refusal):
        return whole
    before = total([_weight_work(path) for path in paths])
    objection = cost.objection(before, _weight_work(whole))
    return whole if objection is None else Refusal(f"not worth it: {objection}")


def _weight_work(path: Path) -> Work:
    """The work of a map per output position; the addition that merging saves counts with it."""
    weights = _weights(path)
    return Work((weights,) * len(SIZES), convolutions=min(weights, 1), operations=1)


def _weights(path: Path) -> int:
    if isinstance(path.map, Diagonal) or path.map.channelwise is None:
        return 0
    return path.map.weights


def _separable(walk: Walk) -> bool:
    """Whether the root only joins parts that have no source in common: each is its own root."""
    reading = walk.view.read(walk.root)
    if not isinstance(reading, Affine) or len(reading.terms) < 2 or reading.bias is not None:
        return False
    for paths in walk.frontier.values():
        operands = 0
        for path in paths:
            operands |= path.operands
        if operands & (operands - 1):
            return False
    return True


def dying(walk: Walk) -> tuple[fx.Node, ...]:
    """The expanded nodes that nobody needs once the root is replaced, in graph order."""
    found = {walk.root}
    for node in sorted(walk.expanded, reverse=True):
        if node is not walk.root and unread(node, walk.expanded[node], found):
            found.add(node)
    return tuple(sorted(found))


def promotion(view: View, nodes: Sequence[fx.Node]) -> Refusal | None:
    """Constants of a wider dtype than the convolution's would change the result's dtype."""
    readings = [(node, r) for node in nodes if (r := _affine(view, node)) is not None]
    dtypes = {reading.weight.dtype for _, reading in readings if reading.weight is not None}
    if len(dtypes) > 1:
        return Refusal(f"branches of different dtypes: {' and '.join(sorted(map(str, dtypes)))}")
    for dtype in dtypes:
        for node, reading in readings:
            for other in reading.promotes:
                if torch.promote_types(dtype, other) != dtype:
                    return Refusal(f"{where(node)}: a constant of {other} promotes {dtype}")
    return None


# --- work ---------------------------------------------------------------------------------------


def _saved(walk: Walk, region: Sequence[fx.Node], draft: _Draft, rank: int) -> Work:
    """The work of what dies."""
    outputs = _width(draft)
    moved = {m.node: m for m in walk.crossed}
    for node in region:
        if node in walk.works:
            continue
        seen, reading = walk.expanded[node], _affine(walk.view, node)
        if node in moved:
            width = outputs
            if walk.before is None and isinstance(seen.map, Map):
                width = seen.map.inputs
            walk.works[node] = work.moved(moved[node], width, rank, seen.crossed)
        elif reading is not None:
            walk.works[node] = work.of(reading, seen, outputs, rank)
    return total([walk.works[node] for node in region if node in walk.works])


def _spent(walk: Walk, draft: _Draft, rank: int) -> Work:
    """The work of what replaces it."""
    outputs = _width(draft)
    crossed = tuple(walk.after)
    works = []
    for piece in draft.pieces:
        if isinstance(piece.map, Map):
            shape = geometry.narrowed(piece.map) if draft.concatenates else piece.map
            biased = piece.bias is not None
            works.append(
                work.layer(shape, geometry.IDENTITY, rank, biased, crossed, ones=piece.ones)
            )
    if draft.concatenates:
        works.append(work.joined(outputs, rank, crossed))
    else:
        sums = len(draft.pieces) - 1
        works += [work.elementwise(2, outputs, geometry.IDENTITY, rank, crossed)] * sums
    if walk.before is not None:
        shape = next(p.map for p in draft.pieces if isinstance(p.map, Map))
        works.append(work.moved(walk.before, shape.inputs, rank, ()))
    works += [
        work.moved(each, outputs, rank, tuple(walk.after[:i])) for i, each in enumerate(walk.after)
    ]
    return total(works)


def _width(draft: _Draft) -> int:
    for piece in draft.pieces:
        if isinstance(piece.map, Map):
            return piece.map.outputs
    return sum(p.map.channels or 0 for p in draft.pieces if isinstance(p.map, Diagonal))
