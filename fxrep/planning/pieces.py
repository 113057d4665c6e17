"""From the frontier of a walk to the pieces that could replace what it has passed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import fx

from fxrep.algebra import composition, weights
from fxrep.algebra.maps import Diagonal, Linear, Map, beside, lifted, places, unavailable, unbanded
from fxrep.algebra.recipe import Call, Expr
from fxrep.planning.cost import SIZES, CostModel, Work, total
from fxrep.planning.walk import SAME_VALUE, Frame, Path, Walk, merged, where
from fxrep.refusal import Refusal


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


@dataclass(eq=False)
class Draft:
    """The pieces of a frontier in the making."""

    pieces: list[Piece] = field(default_factory=list)
    apart: str | None = None
    concatenates: bool = False

    @property
    def width(self) -> int:
        """Channels of the result."""
        for piece in self.pieces:
            if isinstance(piece.map, Map):
                return piece.map.outputs
        return sum(p.map.channels or 0 for p in self.pieces if isinstance(p.map, Diagonal))

    @property
    def axis(self) -> int:
        """The channels' dimension, counted from the last."""
        first = next((p.map for p in self.pieces if isinstance(p.map, Map)), None)
        if first is not None:
            return first.channel_axis
        last = self.pieces[0].map
        assert isinstance(last, Diagonal) and last.axis is not None
        return last.axis


def pieces_of(walk: Walk, cost: CostModel) -> Draft | Refusal | None:
    """The pieces that the frontier amounts to, with their biases."""
    if any(node.op == "get_attr" for node in walk.frontier):
        return None
    for paths in walk.frontier.values():
        only = paths[0] if len(paths) == 1 else None
        if only and only.outside is None and _unavailable(only):
            return None  # scaled, cropped or padded values that no layer takes up
    draft = Draft()
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
    return path.weight is None and not places(path.map)


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
        shape = lifted(shape, channels)
    elif not path.proven and walk.view.channels.of(source, shape.channel_axis) != shape.inputs:
        return Refusal(f"{where(source)}: not known to have {shape.inputs} channels")
    rows = shape.band.rows
    if path.weight is None:
        return Piece(source, Diagonal(shape.inputs, shape.channel_axis), None, rows=rows)
    refusal = unavailable(shape)
    return refusal or Piece(source, shape, path.weight, path.layers, rows=rows)


def _with_bias(walk: Walk, draft: Draft) -> Draft | Refusal | None:
    """Give each layer its part of the bias, and decide how the pieces are put together."""
    pieces = draft.pieces
    # Of the ways too: what a concatenation takes as it is has no map any more, and outputs whose
    # weights are zero may have no way at all.
    maps = [piece.map for piece in pieces]
    maps += [path.map for paths in walk.frontier.values() for path in paths]
    outputs = {m.outputs for m in maps if isinstance(m, Map) and m.channelwise is not None}
    if len(outputs) > 1:
        return Refusal("branches of different channels broadcast against each other")
    biases = walk.biases
    if any(piece.rows is not None for piece in pieces) and len(pieces) > 1:
        if any(piece.rows is None for piece in pieces):
            return None  # some outputs are a sum
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
                whole = Call(weights.full_bias, (_sum([b.expr for b in reached]), *outputs))
                part = Call(weights.rows, (whole, first, last))
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
    return exprs[0] if len(exprs) == 1 else Call(weights.add_biases, tuple(exprs))


def _unbanded(piece: Piece) -> Piece:
    if piece.rows is None or not isinstance(piece.map, Map):
        return replace(piece, rows=None)
    return replace(piece, map=unbanded(piece.map), rows=None)


def _visible(walk: Walk) -> list[Frame]:
    """The frames, unless they add up to nothing: a shift before the padding, undone after it."""
    if len(walk.frames) > 1 and len({(f.node, f.map.axes) for f in walk.frames}) == 1:
        corrections = [walk.view.value(frame.weight) for frame in walk.frames]
        largest = weights.add_biases(*(w.abs() for w in corrections))
        if bool((weights.add_biases(*corrections).abs() <= SAME_VALUE * largest).all()):
            return []
    return walk.frames


def _with_frame(walk: Walk, draft: Draft, frames: Sequence[Frame]) -> Draft | Refusal | None:
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
        beside(unbanded(shape), inputs, 0),
        *(beside(frame.map, inputs, inputs - 1) for frame in frames),
    )
    whole = composition.add(maps)
    if isinstance(whole, Refusal):
        return whole
    summands = (piece.weight, *(frame.weight for frame in frames))
    assert isinstance(whole, Map)
    draft.pieces = [
        replace(
            piece, map=whole, weight=Call(weights.add, (whole, maps, *summands)), ones=True,
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
    count = _weights(path)
    return Work((count,) * len(SIZES), convolutions=min(count, 1), operations=1)


def _weights(path: Path) -> int:
    if isinstance(path.map, Diagonal) or path.map.channelwise is None:
        return 0
    return path.map.weights
