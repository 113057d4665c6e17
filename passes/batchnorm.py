"""Fold scales and shifts of channels into the layer before them, or after them.

Given::

    x -> conv (W, b) -> BatchNorm / * c / + c / - c / / c -> y
    x -> BatchNorm / * c / ... -> conv (W, b) -> y

Result::

    x -> conv (s W, s b + t) -> y        s = γ/√(σ²+ε), t = β - μ s for a BatchNorm
    x -> conv (W s, W t + b) -> y

``conv`` is any convolution, transposed convolution or Linear, of any rank and grouping. After the
layer the rewrite is exact at every position, padded or not. Before it, a shift t is exact only
where the layer does not pad, since its zeros are not shifted. No other operation may read the
values in between.

Source: Ioffe & Szegedy, "Batch Normalization", 2015; folding as in Jacob et al., 2018.
"""

from __future__ import annotations

from torch import fx

from fxrep.algebra.maps import IDENTITY
from fxrep.planning import work
from fxrep.planning.cost import CostModel, total
from fxrep.planning.plan import Plan
from fxrep.planning.rule import Joint, Pass
from fxrep.planning.search import absorbing, search
from fxrep.reading.view import Affine, Operation, Unread, View
from fxrep.refusal import Refusal


def propose(view: View, node: fx.Node, cost: CostModel) -> Plan | Joint | Refusal | None:
    """Fold the scales and shifts that end at `node`, or that its layer reads."""
    reading = view.read(node)
    if isinstance(reading, Unread) and reading.operation is not Operation.BATCHNORM:
        return None  # the passes about that operation report the reason
    if isinstance(reading, Refusal):
        return reading
    if reading is None or len(reading.terms) > 1:
        return None
    if reading.is_layer:
        return search(view, node, lambda each: each.is_diagonal, cost)
    if not _is_scale(reading) or _goes_on(view, node):
        return None
    answer = search(view, node, lambda each: each.is_diagonal or each.is_layer, cost)
    if isinstance(answer, Plan) or len(node.users) < 2:
        return answer
    return _into_all(view, node, cost) or answer


def _goes_on(view: View, node: fx.Node) -> bool:
    """Whether the only reader scales on: the walk from the last of them passes this one too."""
    if len(node.users) != 1:
        return False
    reading = view.affine(next(iter(node.users)))
    return reading is not None and _is_scale(reading) and not reading.assumes_batched


def _into_all(view: View, node: fx.Node, cost: CostModel) -> Joint | Refusal | None:
    """Fold a scale or shift into every layer that reads it."""
    readings = [view.affine(user) for user in node.users]
    if not all(reading is not None and reading.is_layer for reading in readings):
        return None
    plans = []
    for user in sorted(node.users):
        plan = absorbing(view, user, node, cost)
        if not isinstance(plan, Plan):
            return plan
        plans.append(plan)
    first = plans[0]
    rank = -first.axis - 1
    width = view.channels.of(node, first.axis) or 0
    scale = work.elementwise(1, width, IDENTITY, rank)
    saved = total([*(plan.saved for plan in plans), scale])
    objection = cost.objection(saved, total([plan.spent for plan in plans]))
    return Joint(node, tuple(plans)) if objection is None else Refusal(f"not worth it: {objection}")


def _is_scale(reading: Affine) -> bool:
    """Whether an operation is a BatchNorm, or a product or sum with a constant."""
    if not reading.is_diagonal:
        return False
    absorbs = reading.terms[0].weight is not None or reading.bias is not None
    return absorbs or not reading.is_identity


BATCHNORM = Pass("batchnorm", propose, reports_layers=False)
