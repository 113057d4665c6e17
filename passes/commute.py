"""Run pointwise maps on the smaller side of a pooling or a resize, or out of the way.

Given::

    x -> conv 1x1 -> average pooling -> y            (every transition of a DenseNet)
    x -> upsample -> conv 1x1 -> y
    x -> conv -> upsample / max pooling / pixel shuffle -> BatchNorm -> y

Result::

    x -> average pooling -> conv 1x1 -> y
    x -> conv 1x1 -> upsample -> y
    x -> conv (BatchNorm folded) -> upsample / max pooling / pixel shuffle -> y

An operation R that treats every channel alike and gives a constant image back as it is commutes
with every pointwise affine map: ``W R(x) + b = R(W x + b)``. So do resizes of every kind and means
over real values; not zero padding. Max pooling commutes with scales that are positive.
"""

from __future__ import annotations

from torch import fx

from fxrep.planning.cost import CostModel
from fxrep.planning.plan import Plan
from fxrep.planning.rule import Pass
from fxrep.planning.search import search
from fxrep.reading.commuting import commuter
from fxrep.reading.view import View
from fxrep.refusal import Refusal

# How many operations between a pooling or resize and the root are looked through.
_LONGEST = 16


def propose(view: View, node: fx.Node, cost: CostModel) -> Plan | Refusal | None:
    """Move pointwise maps over an operation at or above `node`."""
    found = commuter(view, node)
    if found is not None and found.shrinks and view.affine(found.source) is not None:
        return search(view, node, lambda _: True, cost, moves=True)
    if found is None and _follows_commuter(view, node):
        return search(view, node, lambda _: True, cost, moves=True)
    return None


def _follows_commuter(view: View, node: fx.Node) -> bool:
    """Whether only affine operations lie between `node` and an operation to move them over."""
    for _ in range(_LONGEST):
        reading = view.affine(node)
        if reading is None or len(reading.terms) > 1:
            return False
        node = reading.terms[0].operand
        if commuter(view, node) is not None:
            return True
    return False


COMMUTE = Pass("commute", propose)
