"""Element-by-element operations: what commutes with taking, joining and splitting channels."""

from __future__ import annotations

from torch import fx

from fxrep.ops.op import Shape
from fxrep.reading.view import View


def pointwise(view: View, node: fx.Node) -> object:
    """What a node does to each element of its operand, equal for equal functions; None if more."""
    called = view.calls.of(node)
    if called is None or called.source is None or node.all_input_nodes != [called.source]:
        return None
    # What broadcasts does the same to each element if all but one operand are numbers.
    if not called.op.elementwise and called.op.shape is not Shape.BROADCASTS:
        return None
    if called.module is not None:
        return called.op.name, called.module.extra_repr()
    return called.op.name, node.op, str(node.args[1:]), str(node.kwargs)
