"""Finding collapses: which part of a graph is one convolution of one value.

Whenever the frontier of a walk (`fxrep.planning.walk`) is a plain set of sources, "root = sum, or
concatenation, of convolutions of these" is a candidate. The best legal candidate is the plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from fxrep.algebra import maps as geometry
from fxrep.algebra.maps import Map
from fxrep.planning import work
from fxrep.planning.cost import TYPICAL, CostModel, Work, total
from fxrep.planning.pieces import Draft, Piece, pieces_of
from fxrep.planning.walk import (
    Rule,
    Walk,
    is_structure,
    start,
    steps,
    unread,
    where,
)  # fmt: skip
from fxrep.reading.commuting import Mover
from fxrep.reading.view import Affine, View
from fxrep.refusal import Refusal


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
        contiguous: what dies made its value contiguous, and a reader may count on that.
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
    contiguous: bool = False
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
    if best is None and walk.structure:
        # A pooling as a convolution cost too much, or a part as a layer of the whole: leave them.
        again = start(view, root, moves=moves, maps=maps)
        rest = steps(again, lambda r: reads(r) and not is_structure(r))
        best = _best(again, rest, cost, best, objections)
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


def _plan(walk: Walk, cost: CostModel, *, alone: bool = False) -> Plan | Refusal | None:
    """The plan that the present frontier amounts to; None if it is not one at all.

    With `alone` one operation may take the place of one.
    """
    draft = pieces_of(walk, cost)
    if not isinstance(draft, Draft):
        return draft
    pieces = draft.pieces
    shapes = [piece.map for piece in pieces if isinstance(piece.map, Map)]
    if not shapes and not _is_copy(walk, draft):
        return None
    if (walk.one_source or walk.before) and len(pieces) > 1:
        return None
    if walk.before and not shapes:
        return None  # nothing to move
    if len({len(shape.axes) for shape in shapes}) > 1:
        return None
    if len(pieces) > 1 and _separable(walk):
        return None
    region = dying(walk)
    if len(pieces) > 1 and any(
        walk.view.reads_size(user)
        for node in region[:-1]
        for user in node.users
        if user not in walk.expanded
    ):
        return Refusal("the shape of an inner value is read")
    sources = [piece.source for piece in pieces]
    expanded = tuple(sorted(walk.expanded))
    if walk.view.aliasing.writes_between(expanded[0], walk.root, sources, dying=set(region)):
        return Refusal("a source is written in place between its readers")
    if len(pieces) > len(shapes) and any(map(walk.view.writes, expanded)):
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
    axis, rank = draft.axis, -draft.axis - 1
    return Plan(
        walk.root, region, expanded, tuple(pieces), axis, relies,
        _saved(walk, region, draft, rank), _spent(walk, draft, rank),
        draft.concatenates, draft.apart, next((f.reason for f in walk.frames), None),
        walk.before, tuple(walk.after), any(n.target == "contiguous" for n in region),
    )  # fmt: skip


def _is_copy(walk: Walk, draft: Draft) -> bool:
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
    # What is written into a value goes with it, or stays with it.
    writes_of = {
        node: reading.inside
        for node in walk.expanded
        if (reading := _affine(walk.view, node)) is not None and reading.settled
    }
    written = {write for writes in writes_of.values() for write in writes}
    found = {walk.root, *writes_of.get(walk.root, ())}
    for node in sorted(walk.expanded, reverse=True):
        if node is walk.root or node in written:
            continue
        own = writes_of.get(node, ())
        if unread(walk.view, node, walk.expanded[node], found.union(own) if own else found):
            found.update((node, *own))
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


def _saved(walk: Walk, region: Sequence[fx.Node], draft: Draft, rank: int) -> Work:
    """The work of what dies."""
    outputs = draft.width
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


def _spent(walk: Walk, draft: Draft, rank: int) -> Work:
    """The work of what replaces it."""
    outputs = draft.width
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
