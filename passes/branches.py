"""Merge the branches of a sum into one layer.

Given::

    x -+-> conv 3x3 -> BatchNorm -+
       +-> conv 1x1 -> BatchNorm -+-> add -> (BatchNorm) -> y
       +-> BatchNorm / identity  -+

Result::

    x -> conv 3x3 -> y

Convolution is linear in its kernel: ``Σ_i K_i * x = (Σ_i K_i) * x`` once all kernels lie on one
grid of taps, which asks for equal strides and for equal output sizes (padding less kernel reach).
The grid's step is the greatest common divisor of the dilations and of the differences of padding;
identity and BatchNorm are 1x1 kernels, coefficients scale a kernel. A sum over several sources is
regrouped by source: ``a(x) + c(h) + b(x) + d(h) = (a + b)(x) + (c + d)(h)``. Exact at borders:
every branch sees the same zeros (or the same reflection) around the same input.

Source: Ding et al., "RepVGG", 2021, and "ACNet", 2019; Vasu et al., "MobileOne", 2022.
"""

from __future__ import annotations

from torch import fx

from fxrep.planning.cost import CostModel
from fxrep.planning.plan import Plan
from fxrep.planning.rule import Pass, tail
from fxrep.planning.search import search
from fxrep.reading.view import Operation, View
from fxrep.refusal import Refusal


def propose(view: View, node: fx.Node, cost: CostModel) -> Plan | Refusal | None:
    """Merge the branches that the sum at or above `node` adds up."""
    reading = tail(view, node)
    if reading is None or len(reading.terms) < 2:
        return None
    if reading.operation is Operation.CONCATENATION:
        return None
    return search(view, node, lambda _: True, cost)


BRANCHES = Pass("branches", propose)
