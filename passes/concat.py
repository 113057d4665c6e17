"""Merge the operands of a concatenation of channels.

Given::

    x -+-> conv 3x3 (W1, b1) -+
       +-> conv 1x1 (W2, b2) -+-> cat -> (BatchNorm) -> y
       +-> identity, pooling -+

Result::

    x -> conv 3x3 (W1 above W2 above ..., b1 above b2 above ...) -> y

An operand of a concatenation is a map whose other outputs read nothing, so that a concatenation is
a sum and the rules of sums hold; since it raises unless all sizes agree, they need not be proven.
Over several sources each keeps one convolution, and what followed the concatenation is folded into
them: BatchNorm and scales act on each operand's channels alone. Equal convolutions of the chunks of
one value, concatenated in order, are one convolution with as many more groups.

Source: Szegedy et al., "Going Deeper with Convolutions", 2015 (the structure); Ding et al.,
"Diverse Branch Block", 2021 (concatenation of kernels).
"""

from __future__ import annotations

from torch import fx

from fxrep.planning.cost import CostModel
from fxrep.planning.plan import Plan
from fxrep.planning.rule import Pass, tail
from fxrep.planning.search import search
from fxrep.reading.view import Operation, Unread, View
from fxrep.refusal import Refusal


def propose(view: View, node: fx.Node, cost: CostModel) -> Plan | Refusal | None:
    """Merge the operands of the concatenation at or above `node`."""
    unread = view.read(node)
    if isinstance(unread, Unread) and unread.operation is Operation.CONCATENATION:
        sources = [view.affine(each) for each in node.all_input_nodes]
        return unread if sum(each is not None for each in sources) > 1 else None
    reading = tail(view, node)
    if reading is None or reading.operation is not Operation.CONCATENATION:
        return None
    return search(view, node, lambda _: True, cost)


CONCAT = Pass("concat", propose)
