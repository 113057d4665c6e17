"""Run several layers of one value as one.

Given::

    x -+-> conv (W1, b1) -> relu -> y1
       +-> conv (W2, b2) -> relu -> y2
       +-> conv (W3, b3) -> relu -> y3

Result::

    x -> conv (W1 above W2 above W3, b1 above b2 above b3) -> relu -> split -> y1, y2, y3

for layers of equal kernel size, stride, padding and dilation without groups, whose outputs go
different ways. x is read once instead of three times. Where the same element-by-element operation
follows each of them, it too is run once: it commutes with taking channels apart.

The parts are views of one result. A reader that wants its operand in one piece copies them, which
the cost model counts; a reader that fails on a view (``.view(...)``) keeps its layer apart.

Source: Szegedy et al., "Going Deeper with Convolutions", 2015 (the structure); Jia et al., "TASO",
2019 (the rewrite).
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import fx

from fxrep.algebra import maps as geometry
from fxrep.algebra import weights
from fxrep.algebra.maps import IDENTITY, Map
from fxrep.algebra.recipe import Call, Expr
from fxrep.planning import work
from fxrep.planning.cost import CostModel, Work, total
from fxrep.planning.pieces import Piece
from fxrep.planning.plan import Plan, promotion
from fxrep.planning.rule import Pass
from fxrep.reading.commuting import Commuter, commuter
from fxrep.reading.pointwise import pointwise, writes_over
from fxrep.reading.view import Affine, Operation, View, reads_metadata, writes
from fxrep.refusal import Refusal

# How many readers of one value are looked at.
_MOST = 64

# Functions besides the ones read as linear or pointwise that take views and give fresh values.
_FRESH = {operator.matmul, torch.matmul, torch.softmax, "softmax", "matmul"}

# Functions that give another view of the same memory.
_TURNS = {torch.transpose, torch.permute, "transpose", "permute"}


def propose(view: View, node: fx.Node, cost: CostModel) -> Plan | Refusal | None:
    """Join the layers that read `node`, if there are several alike."""
    if len(node.users) < 2:
        return None
    groups: dict[object, list[fx.Node]] = {}
    for user in sorted(node.users)[:_MOST]:
        key = _kind(view, user, node)
        if key is not None:
            groups.setdefault(key, []).append(user)
    refusal: Refusal | None = None
    for members in groups.values():
        if len(members) > 1:
            answer = _plan(view, node, members)
            if isinstance(answer, Plan):
                objection = cost.objection(answer.saved, answer.spent)
                if objection is None:
                    return answer
                answer = Refusal(f"not worth it: {objection}")
            refusal = answer
    return refusal


def _kind(view: View, node: fx.Node, source: fx.Node) -> object:
    """Equal for layers of `source` that may be joined; None for what is no such layer."""
    reading = view.read(node)
    if not isinstance(reading, Affine) or reading.weight is None or reading.absorbed:
        return None
    shape = reading.terms[0].map
    if reading.terms[0].operand is not source:  # it reads its weight there
        return None
    if not isinstance(shape, Map) or shape.transposed or shape.band.groups > 1:
        return None
    if view.aliasing.pinned(node) or not _may_be_view(view, node):
        return None
    return shape.axes, shape.inputs, shape.padding_mode, reading.weight.dtype


def _may_be_view(view: View, node: fx.Node) -> bool:
    """Whether every reader takes some channels of a larger value as well as a value of its own.

    What is returned, or reshaped by who knows whom, stays a value of its own.
    """
    for user in node.users:
        if reads_metadata(user):
            continue
        reading = view.read(user)
        known = isinstance(reading, Affine) and reading.operation is not Operation.PART
        known = (
            known
            or user.target in _TURNS
            or pointwise(view, user) is not None
            or commuter(view, user) is not None
        )
        if not known and user.target not in _FRESH:
            return False
        if _passes_on(view, user, node) and not _may_be_view(view, user):
            return False
    return True


def _passes_on(view: View, user: fx.Node, node: fx.Node) -> bool:
    """Whether a reader gives its operand's own memory on."""
    reading = view.read(user)
    if user.target in _TURNS:
        return True
    if isinstance(reading, Affine):
        return reading.is_identity or (writes(user) and user.args[0] is node)
    return pointwise(view, user) is not None and writes_over(view, user)


def _is_copied(view: View, node: fx.Node) -> bool:
    """Whether some reader has to copy a view to have it in one piece."""
    for user in node.users:
        if reads_metadata(user):
            continue
        reading = view.read(user)
        plain = (
            isinstance(reading, Affine)
            and not reading.is_layer
            and reading.operation is not Operation.POOLING
        )
        if not plain and pointwise(view, user) is None:
            return True
        if _passes_on(view, user, node) and _is_copied(view, user):
            return True
    return False


def _plan(view: View, source: fx.Node, members: Sequence[fx.Node]) -> Plan | Refusal:
    readings = [r for node in members if isinstance(r := view.read(node), Affine)]
    maps = [m for r in readings if isinstance(m := r.terms[0].map, Map)]
    ways = _followers(view, members)
    followers = [way[-1] for way in ways]
    roots = followers or list(members)
    if any(_is_written(view, root) for root in roots):
        return Refusal("some of its layers' results are written in place")
    region = tuple(sorted({*members, *(node for way in ways for node in way)}))
    if view.aliasing.writes_between(region[0], region[-1], [source], dying=set(region)):
        return Refusal("its operand is written in place between its readers")
    refusal = promotion(view, members)
    if refusal is not None:
        return refusal
    whole = geometry.stacked(maps)
    rank = len(whole.axes)
    weight = Call(weights.stack, tuple(r.terms[0].weight for r in readings))
    bias: Expr | None = None
    if any(r.bias is not None for r in readings):
        parts = [r.bias for r in readings]
        bias = Call(weights.stack_biases, (tuple(m.outputs for m in maps), *parts))
    after = (Commuter(followers[0], followers[0].all_input_nodes[0], rank),) if followers else ()
    layers = [work.of_root(r, m.outputs) for r, m in zip(readings, maps, strict=True)]
    return Plan(
        region[-1], region, region,
        (Piece(source, whole, weight, frozenset(members), bias),),
        whole.channel_axis, (),
        total([*layers, *_applied([m.outputs for m in maps] if followers else [], rank)]),
        total([
            work.layer(whole, IDENTITY, rank, bias is not None),
            *_applied([whole.outputs] if followers else [], rank),
            Work(operations=1),
            *(_copied(m.outputs, rank) for root, m in zip(roots, maps, strict=True)
              if _is_copied(view, root)),
        ]),
        after=after,
        outputs=tuple((root, m.outputs) for root, m in zip(roots, maps, strict=True)),
    )  # fmt: skip


def _followers(view: View, members: Sequence[fx.Node]) -> list[list[fx.Node]]:
    """The same element-by-element operation on each of them, if there is one and it may move.

    Each as the way there: identities on the way, then the operation.
    """
    ways = [_way(view, node) for node in members]
    kinds = {pointwise(view, way[-1]) if way else None for way in ways}
    if len(kinds) > 1 or None in kinds:
        return []
    last = [way[-1] for way in ways]
    safe = all(_may_be_view(view, node) and not view.aliasing.pinned(node) for node in last)
    return ways if safe else []


def _way(view: View, node: fx.Node) -> list[fx.Node]:
    """From a value to the element-by-element operation that alone reads it."""
    way: list[fx.Node] = []
    while len(way) < 4:
        users = [user for user in node.users if not reads_metadata(user)]
        if len(users) != 1:
            return []
        (node,) = users
        way.append(node)
        if pointwise(view, node) is not None:
            return way
        reading = view.read(node)
        plain = isinstance(reading, Affine) and reading.is_identity
        if not plain or node.target == "contiguous" or view.aliasing.pinned(node):
            return []
    return []


def _is_written(view: View, node: fx.Node) -> bool:
    """Whether some reader writes over a value, which autograd forbids for parts of one."""
    for user in node.users:
        over = pointwise(view, user) is not None and writes_over(view, user)
        if over or (writes(user) and user.args[0] is node):
            return True
        if _passes_on(view, user, node) and _is_written(view, user):
            return True
    return False


def _applied(widths: Sequence[int], rank: int) -> list[Work]:
    """The work of an element-by-element operation on values of so many channels."""
    return [work.elementwise(1, width, IDENTITY, rank) for width in widths]


def _copied(width: int, rank: int) -> Work:
    count = work.positions(IDENTITY, rank, ())
    return Work(traffic=tuple(2 * width * n for n in count))


SIBLINGS = Pass("siblings", propose)
