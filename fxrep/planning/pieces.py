"""From the frontier of a walk to the pieces that could replace the nodes passed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import fx

from fxrep.algebra import composition, weights
from fxrep.algebra.maps import (
    Diagonal,
    Linear,
    Map,
    is_placement,
    why_no_layer,
    with_all_rows,
    with_channels,
    with_more_inputs,
)
from fxrep.algebra.recipe import Call, Expr
from fxrep.planning.cost import SIZES, CostModel, Work, total
from fxrep.planning.paths import SAME_VALUE, Path, merged
from fxrep.planning.walk import Bias, BorderBias, Walk, where
from fxrep.refusal import Refusal


@dataclass(frozen=True, eq=False)
class Piece:
    """One part of a plan: a convolution of `source`, or `source` itself if its map is diagonal.

    Attributes:
        source: the value that it reads.
        map: the map from the source to the part of the result.
        weight: the weight of the map; None if the piece is the source itself.
        layers: the convolution and linear layers that the piece is made of.
        bias: (O,) or () that the piece adds, or None.
        ones: the last input channel of the map is a channel of ones, to be added to the source.
        rows: the output channels that the piece gives, where the plan concatenates; else None.
    """

    source: fx.Node
    map: Linear
    weight: Expr | None
    layers: frozenset[fx.Node] = frozenset()
    bias: Expr | None = None
    ones: bool = False
    rows: tuple[int, int] | None = None


@dataclass(frozen=True, eq=False)
class Draft:
    """The pieces of a frontier.

    Attributes:
        pieces: in graph order of their sources, or in the order of their rows.
        concatenates: the pieces are concatenated, not added.
        apart: why pieces of one source stay apart, if some do.
    """

    pieces: tuple[Piece, ...]
    concatenates: bool = False
    apart: str | None = None

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
        if only and only.padding is None and _needs_a_layer(only):
            return None
    pieces: list[Piece] = []
    apart: str | None = None
    for source in sorted(walk.frontier):
        if any(path.padding is not None for path in walk.frontier[source]):
            return Refusal("it pads with values that its source does not give for zeros")
        paths, reason = _cheapest(walk.frontier[source], cost)
        apart = apart or reason
        for path in paths:
            piece = _piece(walk, source, path)
            if not isinstance(piece, Piece):
                return piece
            pieces.append(piece)
    draft = Draft(tuple(pieces), apart=apart)
    borders = _visible_borders(walk)
    return _with_borders(walk, draft, borders) if borders else _with_biases(walk, draft)


def _needs_a_layer(path: Path) -> bool:
    """Whether a path scales, crops or pads, and has no layer that could do so."""
    if isinstance(path.map, Diagonal):
        return path.weight is not None
    return path.weight is None and not is_placement(path.map)


def _piece(walk: Walk, source: fx.Node, path: Path) -> Piece | Refusal | None:
    if _needs_a_layer(path):
        return None
    shape = path.map
    if isinstance(shape, Diagonal):
        return Piece(source, shape, None)
    if shape.channelwise is None:
        channels = walk.view.channels.of(source, shape.channel_axis)
        if channels is None:
            return Refusal(f"{where(source)}: not known how many channels it has")
        if channels == 0:
            return Refusal(f"{where(source)}: it has no channels")
        shape = with_channels(shape, channels)
    elif not path.channels_checked and not _has_channels(walk, source, shape):
        return Refusal(f"{where(source)}: not known to have {shape.inputs} channels")
    rows = shape.band.rows
    if path.weight is None:
        return Piece(source, Diagonal(shape.inputs, shape.channel_axis), None, rows=rows)
    refusal = why_no_layer(shape)
    return refusal or Piece(source, shape, path.weight, path.layers, rows=rows)


def _has_channels(walk: Walk, source: fx.Node, shape: Map) -> bool:
    """Whether a source is known to have the channels that a map reads."""
    return walk.view.channels.of(source, shape.channel_axis) == shape.inputs


# --- biases ---------------------------------------------------------------------------------------


def _with_biases(walk: Walk, draft: Draft) -> Draft | Refusal | None:
    """The pieces with their biases, added or concatenated."""
    # The paths count as well as the pieces: the piece of an operand that is concatenated as it is
    # has no map of the whole, and outputs with zero weights may have lost their piece.
    maps = [piece.map for piece in draft.pieces]
    maps += [path.map for paths in walk.frontier.values() for path in paths]
    widths = {m.outputs for m in maps if isinstance(m, Map) and m.channelwise is not None}
    if len(widths) > 1:
        return Refusal("branches of different channels broadcast against each other")
    if len(draft.pieces) > 1 and any(piece.rows is not None for piece in draft.pieces):
        return _concatenated(draft, widths.pop(), walk.biases)
    return _added(draft, walk.biases)


def _concatenated(draft: Draft, width: int, biases: Sequence[Bias]) -> Draft | None:
    """The pieces side by side, each with its part of the biases; None if they leave gaps."""
    by_rows = {piece.rows: piece for piece in draft.pieces if piece.rows is not None}
    ordered = sorted(by_rows)
    ends = [0, *(last for _, last in ordered)]
    starts = [*(first for first, _ in ordered), width]
    # A piece without rows, or with those of another, is added to others.
    if len(ordered) < len(draft.pieces) or ends != starts:
        return None
    pieces = []
    for rows in ordered:
        piece = by_rows[rows]
        reaching = [bias.expr for bias in biases if _reaches(bias, *rows)]
        if reaching and isinstance(piece.map, Diagonal):
            return None
        if reaching:
            whole = Call(weights.full_bias, (_sum(reaching), width))
            piece = replace(piece, bias=Call(weights.rows, (whole, *rows)))
        pieces.append(piece)
    return replace(draft, pieces=tuple(pieces), concatenates=True)


def _reaches(bias: Bias, first: int, last: int) -> bool:
    """Whether a bias is added to some of the rows from `first` to `last`."""
    return bias.rows is None or (bias.rows[0] < last and first < bias.rows[1])


def _added(draft: Draft, biases: Sequence[Bias]) -> Draft | None:
    """The pieces as summands, the first layer of them with the bias; None if there is no layer."""
    pieces = [_unbanded(piece) for piece in draft.pieces]
    if biases:
        layer = next((i for i, p in enumerate(pieces) if isinstance(p.map, Map)), None)
        if layer is None:
            return None
        pieces[layer] = replace(pieces[layer], bias=_sum([bias.expr for bias in biases]))
    return replace(draft, pieces=tuple(pieces))


def _sum(exprs: Sequence[Expr]) -> Expr:
    return exprs[0] if len(exprs) == 1 else Call(weights.add_biases, tuple(exprs))


def _unbanded(piece: Piece) -> Piece:
    """The piece for a sum, where outputs that read nothing are rows of zeros."""
    if piece.rows is None or not isinstance(piece.map, Map):
        return replace(piece, rows=None)
    return replace(piece, map=with_all_rows(piece.map), rows=None)


# --- borders --------------------------------------------------------------------------------------


def _visible_borders(walk: Walk) -> list[BorderBias]:
    """The walk's borders, unless they add up to nothing: a shift undone after the padding."""
    borders = walk.borders
    if len(borders) > 1 and len({(border.node, border.map.axes) for border in borders}) == 1:
        corrections = [walk.view.value(border.weight) for border in borders]
        largest = weights.add_biases(*(w.abs() for w in corrections))
        if bool((weights.add_biases(*corrections).abs() <= SAME_VALUE * largest).all()):
            return []
    return borders


def _with_borders(
    walk: Walk, draft: Draft, borders: Sequence[BorderBias]
) -> Draft | Refusal | None:
    """The draft with one more input channel, of ones, that has the borders' biases as weights."""
    if len(draft.pieces) != 1 or walk.before is not None or walk.after:
        return None
    piece = draft.pieces[0]
    shape = piece.map
    if any(border.node is not piece.source for border in borders) or not isinstance(shape, Map):
        return None
    if shape.transposed or shape.padding_mode != "zeros" or shape.band.groups > 1:
        return Refusal("its border would need one more input channel for each group")
    inputs = shape.inputs + 1
    maps = (
        with_more_inputs(with_all_rows(shape), inputs, 0),
        *(with_more_inputs(border.map, inputs, inputs - 1) for border in borders),
    )
    whole = composition.add(maps)
    if isinstance(whole, Refusal):
        return whole
    summands = (piece.weight, *(border.weight for border in borders))
    corrected = replace(
        piece,
        map=whole,
        weight=Call(weights.add, (whole, maps, *summands)),
        ones=True,
        bias=_sum([bias.expr for bias in walk.biases]) if walk.biases else None,
        rows=None,
    )
    return replace(draft, pieces=(corrected,))


# --- paths from one source ------------------------------------------------------------------------


def _cheapest(paths: Sequence[Path], cost: CostModel) -> tuple[list[Path], str | None]:
    """The paths from one source, merged where that is legal and pays, and why some stay apart."""
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
    """Several paths as one path, or why merging them is illegal or does not pay."""
    whole = merged(paths)
    if isinstance(whole, Refusal):
        return whole
    before = total([_weight_work(path) for path in paths])
    objection = cost.objection(before, _weight_work(whole))
    return whole if objection is None else Refusal(f"not worth it: {objection}")


def _weight_work(path: Path) -> Work:
    """The work of a map per output position, and of the addition of its result."""
    count = _weights(path)
    return Work((count,) * len(SIZES), convolutions=min(count, 1), operations=1)


def _weights(path: Path) -> int:
    if isinstance(path.map, Diagonal) or path.map.channelwise is None:
        return 0
    return path.map.weights
