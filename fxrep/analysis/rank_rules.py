"""The facts that each operator gives about ranks: of its result, and of operands.

A rule is given a call whose arguments are known by name, and yields facts. It changes nothing. A
fact about an operand holds because the operator raises at other ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import fx

from fxrep.ops.calls import Called
from fxrep.ops.op import Shape

if TYPE_CHECKING:
    from fxrep.analysis.ranks import Ranks


class Shifted(NamedTuple):
    """rank(node) = rank(source) + change."""

    node: fx.Node
    source: fx.Node
    change: int = 0


class Exactly(NamedTuple):
    """rank(node) = rank."""

    node: fx.Node
    rank: int


class AtLeast(NamedTuple):
    """rank(node) >= rank."""

    node: fx.Node
    rank: int


class Suggested(NamedTuple):
    """rank(node) = rank if the operand of the layer has a batch dimension."""

    node: fx.Node
    rank: int


class Broadcast(NamedTuple):
    """rank(node) is the largest rank of the operands, each of which has at least rank `least`."""

    node: fx.Node
    operands: Iterable[fx.Node]
    least: int = 0


class Parts(NamedTuple):
    """The node is a tuple of tensors, each of rank(source) + change."""

    node: fx.Node
    source: fx.Node
    change: int = 0


Fact = Shifted | Exactly | AtLeast | Suggested | Broadcast | Parts


Rule = Callable[[Called, "Ranks"], Iterator[Fact]]

# The rank of the operand that a mode of interpolation takes.
RANK_OF_MODE = {"linear": 3, "bilinear": 4, "bicubic": 4, "trilinear": 5}


def _keeps(call: Called, ranks: Ranks) -> Iterator[Fact]:
    if call.source is not None:
        yield Shifted(call.node, call.source)


def _keeps_rank(call: Called, ranks: Ranks) -> Iterator[Fact]:
    takes_dim = call.arguments is not None and "dim" in call.arguments
    if not takes_dim or call.get("dim") is not None:
        yield from _keeps(call, ranks)


def _layer(call: Called, ranks: Ranks) -> Iterator[Fact]:
    spatial, source = call.op.spatial, call.source
    if source is None:
        return
    if spatial:
        yield Shifted(call.node, source)
        yield AtLeast(source, spatial + 1)
        yield Suggested(source, spatial + 2)
    elif call.module is not None or _has_rank(call.get("weight"), 2, ranks):
        yield Shifted(call.node, source)
        yield AtLeast(source, 1)


def _has_rank(node: object, rank: int, ranks: Ranks) -> bool:
    return isinstance(node, fx.Node) and ranks.proven(node) == rank


def _norm(call: Called, ranks: Ranks) -> Iterator[Fact]:
    if call.source is not None:
        yield Shifted(call.node, call.source)
        yield AtLeast(call.source, 2)
        if call.op.spatial:  # BatchNorm2d and 3d take one rank only
            yield Exactly(call.source, call.op.spatial + 2)


def _spatial(call: Called, ranks: Ranks) -> Iterator[Fact]:
    """Pooling and the like: with or without a batch axis."""
    if call.source is None or call.get("return_indices") not in (None, False):
        return
    yield Shifted(call.node, call.source)
    yield AtLeast(call.source, call.op.spatial + 1)


def _resize(call: Called, ranks: Ranks) -> Iterator[Fact]:
    if call.source is None:
        return
    yield Shifted(call.node, call.source)
    rank = RANK_OF_MODE.get(str(call.get("mode")))
    yield AtLeast(call.source, 3) if rank is None else Exactly(call.source, rank)


def _pixels(call: Called, ranks: Ranks) -> Iterator[Fact]:
    if call.source is not None:
        yield Shifted(call.node, call.source)
        yield AtLeast(call.source, 3)


def _broadcasts(call: Called, ranks: Ranks) -> Iterator[Fact]:
    yield Broadcast(call.node, call.node.all_input_nodes)


def _matmul(call: Called, ranks: Ranks) -> Iterator[Fact]:
    yield Broadcast(call.node, call.node.all_input_nodes, least=2)


def _attention(call: Called, ranks: Ranks) -> Iterator[Fact]:
    # A mask broadcasts to the scores, but adds no axis to the result.
    operands = (call.source, call.get("key"), call.get("value"))
    yield Broadcast(call.node, [each for each in operands if isinstance(each, fx.Node)], least=2)


def _batched_matmul(call: Called, ranks: Ranks) -> Iterator[Fact]:
    for each in (call.node, *call.node.all_input_nodes):
        yield Exactly(each, 3)


def _flatten(call: Called, ranks: Ranks) -> Iterator[Fact]:
    source, start, end = call.source, call.get("start_dim"), call.get("end_dim")
    if source is None or not isinstance(start, int) or not isinstance(end, int):
        return
    if start >= 0 and end < 0:
        # The axes up to `start` and behind `end` stay, those between become one axis.
        yield Exactly(call.node, start + 1 - (end + 1))
        yield AtLeast(source, max(start + 1, -end) if start or end != -1 else 0)
    elif (start >= 0) == (end >= 0) and end > start:
        yield AtLeast(source, end + 1 if end >= 0 else -start)
        yield Shifted(call.node, source, start - end)


def _unflatten(call: Called, ranks: Ranks) -> Iterator[Fact]:
    sizes = call.get("sizes")
    if call.source is not None and isinstance(sizes, (tuple, list)):
        yield Shifted(call.node, call.source, len(sizes) - 1)


def _sizes(call: Called, ranks: Ranks) -> Iterator[Fact]:
    sizes = call.get("size")
    sizes = (sizes,) if isinstance(sizes, fx.Node) else sizes
    if not isinstance(sizes, (tuple, list)) or not sizes:
        return
    if len(sizes) == 1 and isinstance(sizes[0], fx.Node):
        kind = ranks.size_type(sizes[0])
        if kind is int:
            yield Exactly(call.node, 1)
        elif kind is torch.Size:  # x.view(y.shape)
            yield from (Shifted(call.node, each) for each in _sources_of_shape(sizes[0]))
    elif all(isinstance(size, (int, fx.Node)) for size in sizes):
        yield Exactly(call.node, len(sizes))


def _sources_of_shape(size: fx.Node) -> list[fx.Node]:
    """The value whose whole shape a node reads; none if it reads less."""
    whole = size.target is getattr or (size.target == "size" and len(size.args) == 1)
    return size.all_input_nodes if whole else []


def _permute(call: Called, ranks: Ranks) -> Iterator[Fact]:
    dims = call.get("dims")
    if isinstance(dims, (tuple, list)) and all(isinstance(dim, int) for dim in dims):
        for each in (call.node, call.source):
            if each is not None:
                yield Exactly(each, len(dims))


def _like(call: Called, ranks: Ranks) -> Iterator[Fact]:
    other = call.get("other")
    if isinstance(other, fx.Node):
        yield Shifted(call.node, other)


def _shifts(change: int) -> Rule:
    def rule(call: Called, ranks: Ranks) -> Iterator[Fact]:
        if call.source is not None:
            yield Shifted(call.node, call.source, change)

    return rule


def _joins(change: int) -> Rule:
    def rule(call: Called, ranks: Ranks) -> Iterator[Fact]:
        tensors = call.get("tensors")
        if isinstance(tensors, fx.Node):
            parts = ranks.parts_of(tensors)
            if parts is not None:
                yield Shifted(call.node, parts[0], parts[1] + change)
            return
        for tensor in tensors or ():
            # `cat` takes an empty vector beside values of any rank.
            if isinstance(tensor, fx.Node) and (change or ranks.proven(tensor) != 1):
                yield Shifted(call.node, tensor, change)

    return rule


def _parts(change: int) -> Rule:
    def rule(call: Called, ranks: Ranks) -> Iterator[Fact]:
        if call.source is not None:
            yield Parts(call.node, call.source, change)

    return rule


def _transpose(call: Called, ranks: Ranks) -> Iterator[Fact]:
    if call.source is None:
        return
    yield Shifted(call.node, call.source)
    for dim in (call.get("dim0"), call.get("dim1")):
        if isinstance(dim, int):
            yield AtLeast(call.source, dim + 1 if dim >= 0 else -dim)


def _reduce(call: Called, ranks: Ranks) -> Iterator[Fact]:
    source, dims, keep = call.source, call.get("dim"), call.get("keepdim")
    if source is None:
        return
    if keep is True and dims is not None:
        yield Shifted(call.node, source)
    elif keep is False:
        if dims is None:
            yield Exactly(call.node, 0)
        elif isinstance(dims, int) and not isinstance(dims, bool):
            yield Shifted(call.node, source, -1)
        elif isinstance(dims, (tuple, list)) and dims:
            yield Shifted(call.node, source, -len(dims))


def _einsum(call: Called, ranks: Ranks) -> Iterator[Fact]:
    equation, operands = call.get("equation"), call.get("operands")
    if not isinstance(equation, str) or "." in equation or "->" not in equation:
        return
    inputs, output = equation.replace(" ", "").split("->")
    yield Exactly(call.node, len(output))
    for letters, operand in zip(inputs.split(","), operands, strict=False):
        if isinstance(operand, fx.Node):
            yield Exactly(operand, len(letters))


RULES: dict[Shape, Rule] = {
    **dict.fromkeys(
        (Shape.KEEPS, Shape.LAYER_NORM, Shape.PAD), _keeps
    ),
    **dict.fromkeys((Shape.LAYER, Shape.TRANSPOSED_LAYER), _layer),
    **dict.fromkeys((Shape.POOL, Shape.INSTANCE_NORM), _spatial),
    **dict.fromkeys((Shape.PIXEL_SHUFFLE, Shape.PIXEL_UNSHUFFLE), _pixels),
    Shape.KEEPS_RANK: _keeps_rank,
    Shape.NORM: _norm,
    Shape.RESIZE: _resize,
    Shape.BROADCASTS: _broadcasts,
    Shape.MATMUL: _matmul,
    Shape.ATTENTION: _attention,
    Shape.BATCHED_MATMUL: _batched_matmul,
    Shape.FLATTEN: _flatten,
    Shape.UNFLATTEN: _unflatten,
    Shape.SIZES: _sizes,
    Shape.PERMUTE: _permute,
    Shape.LIKE: _like,
    Shape.UNSQUEEZE: _shifts(1),
    Shape.EMBEDDING: _shifts(1),
    Shape.SELECT: _shifts(-1),
    Shape.CAT: _joins(0),
    Shape.STACK: _joins(1),
    Shape.PARTS: _parts(0),
    Shape.UNBIND: _parts(-1),
    Shape.TRANSPOSE: _transpose,
    Shape.REDUCE: _reduce,
    Shape.EINSUM: _einsum,
}  # fmt: skip
