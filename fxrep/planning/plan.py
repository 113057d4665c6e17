"""Plans: a part of a graph, and the convolutions that could take its place.

Whenever the frontier of a walk (`fxrep.planning.steps`) is a plain set of sources, "root = sum, or
concatenation, of convolutions of these" is a candidate for a plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from fxrep.algebra.maps import IDENTITY, Map, narrowed
from fxrep.planning import work
from fxrep.planning.cost import TYPICAL, CostModel, Work, total
from fxrep.planning.pieces import Draft, Piece, pieces_of
from fxrep.planning.walk import Walk, unread, where
from fxrep.reading.commuting import Commuter
from fxrep.reading.view import Operation, View
from fxrep.refusal import Refusal


@dataclass(frozen=True, eq=False)
class Plan:
    """``root = after(join of pieces(before(source)))``, in place of the nodes of `region`.

    Attributes:
        root: the node whose value is replaced.
        region: every node that dies, root last, in graph order.
        expanded: every node that the walk passed, dying or not, in graph order.
        pieces: the replacements, in graph order of their sources, or of rows.
        axis: the channels' dimension, counted from the last.
        assumes_batched: values that are assumed to have a batch dimension.
        saved: the work of the nodes that die.
        spent: the work of their replacement.
        concatenates: the pieces are concatenated on `axis`, not added.
        apart: why pieces of one source stay apart, if some do.
        border: why a border has to be corrected, if one has.
        before: an operation that is applied to the sources first.
        after: operations that are applied to the result, outermost first.
        contiguous: a node that dies made its value contiguous, and a reader may count on that.
        outputs: the nodes that get some channels of the result each, with their number; empty if
            the root gets all of them.
    """

    root: fx.Node
    region: tuple[fx.Node, ...]
    expanded: tuple[fx.Node, ...]
    pieces: tuple[Piece, ...]
    axis: int
    assumes_batched: tuple[fx.Node, ...]
    saved: Work
    spent: Work
    concatenates: bool = False
    apart: str | None = None
    border: str | None = None
    before: Commuter | None = None
    after: tuple[Commuter, ...] = ()
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
    def moved(self) -> tuple[Commuter, ...]:
        """The operations that maps are moved over."""
        return self.after if self.before is None else (*self.after, self.before)

    @property
    def saves(self) -> bool:
        """Whether the plan leaves fewer operations or multiply-accumulates, at any other cost."""
        return max(self.score) > 0

    @property
    def roots(self) -> tuple[fx.Node, ...]:
        """The nodes whose values are replaced."""
        return tuple(node for node, _ in self.outputs) or (self.root,)


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


def plan_of(walk: Walk, cost: CostModel, *, alone: bool = False) -> Plan | Refusal | None:
    """The plan that the frontier of a walk amounts to, a reason why it is unsafe, or None.

    Args:
        walk: as far as it has come.
        cost: decides which paths from one source are merged.
        alone: one operation may take the place of one.
    """
    draft = pieces_of(walk, cost)
    if not isinstance(draft, Draft):
        return draft
    if not _is_candidate(walk, draft):
        return None
    region, expanded = dying(walk), tuple(sorted(walk.expanded))
    refusal = _unsafe(walk, draft, region, expanded)
    if refusal is not None:
        return refusal
    if not _is_enough(walk, region, alone):
        return None
    passed = [reading for node in expanded if (reading := walk.view.affine(node)) is not None]
    rank = -draft.axis - 1
    return Plan(
        root=walk.root,
        region=region,
        expanded=expanded,
        pieces=draft.pieces,
        axis=draft.axis,
        assumes_batched=tuple(value for r in passed for value in r.assumes_batched),
        saved=_saved(walk, region, draft, rank),
        spent=_spent(walk, draft, rank),
        concatenates=draft.concatenates,
        apart=draft.apart,
        border=next((border.reason for border in walk.borders), None),
        before=walk.before,
        after=tuple(walk.after),
        contiguous=any(node.target == "contiguous" for node in region),
    )


def _is_candidate(walk: Walk, draft: Draft) -> bool:
    """Whether the pieces of a draft can be put together, and would be something new."""
    pieces = draft.pieces
    ranks = {len(piece.map.axes) for piece in pieces if isinstance(piece.map, Map)}
    if len(ranks) > 1:
        return False
    # Without a layer there is nothing to move, and at most values to put together again.
    if not ranks and (walk.before is not None or not _is_copy(walk, draft)):
        return False
    one_source = walk.needs_one_source or walk.before is not None
    return len(pieces) == 1 or not (one_source or _is_separable(walk))


def _is_copy(walk: Walk, draft: Draft) -> bool:
    """Whether the parts of a value are put together again, and no code would miss the copy."""
    if any(isinstance(p.map, Map) or p.map.axis is None for p in draft.pieces):
        return False
    root, aliasing = walk.root, walk.view.aliasing
    if draft.concatenates:
        return True
    source = draft.pieces[0].source
    if len(draft.pieces) > 1 or aliasing.written(root) or aliasing.written(source):
        return False
    return source.op != "placeholder" and all(user.op != "output" for user in root.users)


def _is_separable(walk: Walk) -> bool:
    """Whether the root only joins parts that have no source in common: each is its own root."""
    reading = walk.view.affine(walk.root)
    if reading is None or len(reading.terms) < 2 or reading.bias is not None:
        return False
    for paths in walk.frontier.values():
        terms = paths[0].root_terms
        if len(terms) > 1 or any(path.root_terms != terms for path in paths):
            return False
    return True


def _is_enough(walk: Walk, region: Sequence[fx.Node], alone: bool) -> bool:
    """Whether enough operations die: some maps, where the walk asks for them, and several in all.

    A pooling alone is enough, too: a convolution may do the same.
    """
    readings = [reading for node in region if (reading := walk.view.affine(node)) is not None]
    if walk.maps and sum(reading.is_map for reading in readings) < walk.maps:
        return False
    if alone or _operations(walk, region) > 1:
        return True
    return [reading.operation for reading in readings] == [Operation.POOLING]


def _operations(walk: Walk, region: Sequence[fx.Node]) -> int:
    """How many operations a region is made of; identities are none."""
    moved = {each.node for each in walk.crossed}
    readings = [(node, walk.view.affine(node)) for node in region]
    return sum(node in moved if r is None else not r.is_identity for node, r in readings)


def dying(walk: Walk) -> tuple[fx.Node, ...]:
    """The nodes passed that no operation needs once the root is replaced, in graph order."""
    view = walk.view
    # Writes into a value that are part of its reading die with the value, or stay with it.
    own_writes = {
        node: reading.absorbed
        for node in walk.expanded
        if (reading := view.affine(node)) is not None and reading.includes_writes
    }
    all_writes = {write for writes in own_writes.values() for write in writes}
    found = {walk.root, *own_writes.get(walk.root, ())}
    for node in sorted(walk.expanded, reverse=True):
        if node is walk.root or node in all_writes:
            continue
        own = own_writes.get(node, ())
        if unread(view, node, walk.expanded[node], found.union(own) if own else found):
            found.update((node, *own))
    return tuple(sorted(found))


# --- safety -------------------------------------------------------------------------------------


def _unsafe(
    walk: Walk, draft: Draft, region: Sequence[fx.Node], expanded: Sequence[fx.Node]
) -> Refusal | None:
    """Why a replacement could give another value, or a value of another dtype."""
    if len(draft.pieces) > 1 and _sizes_are_read(walk, region):
        return Refusal("the shape of an inner value is read")
    sources = [piece.source for piece in draft.pieces]
    if walk.view.aliasing.writes_between(expanded[0], walk.root, sources, dying=set(region)):
        return Refusal("a source is written in place between its readers")
    if any(not isinstance(p.map, Map) for p in draft.pieces) and any(
        map(walk.view.writes, expanded)
    ):
        return Refusal("an in-place sum takes the dtype of one of its operands, not known here")
    return promotion(walk.view, expanded)


def _sizes_are_read(walk: Walk, region: Sequence[fx.Node]) -> bool:
    """Whether an operation outside the walk reads the size of an inner value that dies."""
    return any(
        user not in walk.expanded and walk.view.reads_size(user)
        for node in region[:-1]
        for user in node.users
    )


def promotion(view: View, nodes: Sequence[fx.Node]) -> Refusal | None:
    """Why a convolution would give another dtype than `nodes` do.

    Constants of a wider dtype than the convolution's promote the result.
    """
    readings = [(node, r) for node in nodes if (r := view.affine(node)) is not None]
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
    """The work of the nodes that die."""
    moved = {each.node: each for each in walk.crossed}
    outputs = draft.width
    for node in region:
        if node in walk.works:
            continue
        passed, reading = walk.expanded[node], walk.view.affine(node)
        if node in moved:
            width = outputs
            if walk.before is None and isinstance(passed.map, Map):
                width = passed.map.inputs
            walk.works[node] = work.moved(moved[node], width, rank, passed.crossed)
        elif reading is not None:
            walk.works[node] = work.of(reading, passed, outputs, rank)
    return total([walk.works[node] for node in region if node in walk.works])


def _spent(walk: Walk, draft: Draft, rank: int) -> Work:
    """The work of the pieces, of joining them, and of the operations moved."""
    crossed, width = tuple(walk.after), draft.width
    works = []
    for piece in draft.pieces:
        if isinstance(piece.map, Map):
            shape = narrowed(piece.map) if draft.concatenates else piece.map
            biased = piece.bias is not None
            works.append(work.layer(shape, IDENTITY, rank, biased, crossed, ones=piece.ones))
    if draft.concatenates:
        works.append(work.joined(width, rank, crossed))
    else:
        works += [work.elementwise(2, width, IDENTITY, rank, crossed)] * (len(draft.pieces) - 1)
    if walk.before is not None:
        shape = next(p.map for p in draft.pieces if isinstance(p.map, Map))
        works.append(work.moved(walk.before, shape.inputs, rank, ()))
    works += [work.moved(each, width, rank, crossed[:i]) for i, each in enumerate(crossed)]
    return total(works)
