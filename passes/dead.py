"""Remove what nobody reads.

Given::

    x -+-> conv -> relu -> (nobody)
       +-> ...

Result::

    x -> ...

An auxiliary branch that is left out in eval mode, a layer whose result a model throws away. Only
operations that do nothing but compute their value are removed: layers, BatchNorm, arithmetic,
structure and element-by-element functions, none of which writes in place or has a hook.
"""

from __future__ import annotations

from torch import fx

from fxrep.ops.op import Shape
from fxrep.planning.cost import CostModel
from fxrep.planning.rule import Drop, Pass
from fxrep.reading.pointwise import pointwise
from fxrep.reading.view import Affine, View


def propose(view: View, node: fx.Node, cost: CostModel) -> Drop | None:
    """Drop `node` if nobody reads it and it has no effect."""
    if node.users or node.op in ("placeholder", "output", "get_attr"):
        return None
    if "out" in node.kwargs:  # it writes another value
        return None
    reading = view.read(node)
    if isinstance(reading, Affine):
        # What is written over afterwards is part of the reading, and would be left without it.
        return None if view.writes(node) or reading.includes_writes else Drop(node, reading.kind)
    called = view.calls.of(node)
    parts = called is not None and called.op.shape in _PARTS and called.source is not None
    if not parts and (pointwise(view, node) is None or view.writes(node)):
        return None
    return Drop(node, str(getattr(node.target, "__name__", node.target)))


# What takes a value apart, and its parts: views, without effect.
_PARTS = (Shape.PARTS, Shape.ITEM)

DEAD = Pass("dead", propose)
