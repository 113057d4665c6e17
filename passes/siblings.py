"""Run several layers of one value as one.

Given::

    x -+-> conv (W1, b1) -> relu -> y1
       +-> conv (W2, b2) -> relu -> y2
       +-> conv (W3, b3) -> relu -> y3

Result::

    x -> conv (W1 above W2 above W3, b1 above b2 above b3) -> relu -> split -> y1, y2, y3

for layers of equal kernel size, stride, padding and dilation without groups, whose outputs have
different readers. x is read once instead of three times. If the same element-wise operation follows
each layer, it is run once, too: it commutes with taking channels apart.

The parts are views of one result. A reader that needs its operand in one piece copies the view,
which the cost model counts; a reader that fails on a view (``.view(...)``) keeps its layer apart.

Source: Szegedy et al., "Going Deeper with Convolutions", 2015 (the structure); Jia et al., "TASO",
2019 (the rewrite).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from fxrep.algebra.maps import Map
from fxrep.planning.cost import CostModel
from fxrep.planning.plan import Plan
from fxrep.planning.rule import Pass
from fxrep.planning.stack import Branch, stack
from fxrep.reading.pointwise import pointwise
from fxrep.reading.tolerance import may_be_view
from fxrep.reading.view import View
from fxrep.refusal import Refusal

# How many readers of one value are considered.
_MOST = 64

# How many operations after a layer are considered, the element-wise one included.
_LONGEST_TAIL = 4


def propose(view: View, node: fx.Node, cost: CostModel) -> Plan | Refusal | None:
    """Join the layers that read `node`, if there are several alike."""
    if len(node.users) < 2:
        return None
    alike: dict[object, list[fx.Node]] = {}
    for user in sorted(node.users)[:_MOST]:
        key = _kind(view, user, node)
        if key is not None:
            alike.setdefault(key, []).append(user)
    refusal: Refusal | None = None
    for layers in alike.values():
        if len(layers) < 2:
            continue
        plan = stack(view, node, _branches(view, layers))
        if isinstance(plan, Refusal):
            refusal = plan
            continue
        objection = cost.objection(plan.saved, plan.spent)
        if objection is None:
            return plan
        refusal = Refusal(f"not worth it: {objection}")
    return refusal


def _kind(view: View, node: fx.Node, source: fx.Node) -> object:
    """Equal for layers of `source` that may be joined; None for every other node."""
    reading = view.affine(node)
    if reading is None or reading.weight is None or reading.absorbed:
        return None
    term = reading.terms[0]
    if term.operand is not source:  # the layer reads its weight there
        return None
    shape = term.map
    if not isinstance(shape, Map) or shape.transposed or shape.band.groups > 1:
        return None
    if view.aliasing.pinned(node) or not may_be_view(view, node):
        return None
    return shape.axes, shape.inputs, shape.padding_mode, reading.weight.dtype


def _branches(view: View, layers: Sequence[fx.Node]) -> list[Branch]:
    """The layers, and the element-wise operation that follows each, if it is the same for all."""
    tails = [_tail(view, layer) for layer in layers]
    functions = {pointwise(view, tail[-1]) if tail else None for tail in tails}
    safe = all(
        tail and may_be_view(view, tail[-1]) and not view.aliasing.pinned(tail[-1])
        for tail in tails
    )
    if len(functions) > 1 or not safe:
        return [Branch(layer) for layer in layers]
    return [Branch(layer, tail) for layer, tail in zip(layers, tails, strict=True)]


def _tail(view: View, node: fx.Node) -> tuple[fx.Node, ...]:
    """Identities, then an element-wise operation, each the only reader of the one before."""
    tail: list[fx.Node] = []
    while len(tail) < _LONGEST_TAIL:
        readers = [user for user in node.users if not view.reads_metadata(user)]
        if len(readers) != 1:
            break
        (node,) = readers
        tail.append(node)
        if pointwise(view, node) is not None:
            return tuple(tail)
        reading = view.affine(node)
        if reading is None or not reading.is_identity or node.target == "contiguous":
            break
        if view.aliasing.pinned(node):
            break
    return ()


SIBLINGS = Pass("siblings", propose)
