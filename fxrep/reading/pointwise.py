"""Element-wise operations, which commute with selecting and concatenating channels."""

from __future__ import annotations

from torch import fx

from fxrep.ops.op import Shape
from fxrep.reading.view import View


def pointwise(view: View, node: fx.Node) -> object:
    """A key of the function that a node applies to each element of its only operand.

    Returns:
        Equal keys for equal functions; None if the node is no element-wise operation.
    """
    called = view.calls.of(node)
    if called is None or called.source is None or node.all_input_nodes != [called.source]:
        return None
    if "out" in node.kwargs:  # it writes another value
        return None
    # Arithmetic is element-wise if all operands but one are numbers.
    if not called.op.elementwise and called.op.shape is not Shape.BROADCASTS:
        return None
    if called.module is not None:
        return called.op.name, called.module.extra_repr()
    return called.op.name, node.op, str(node.args[1:]), str(node.kwargs)
