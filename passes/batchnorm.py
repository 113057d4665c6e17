"""Fold what scales and shifts channels into the layer before it, or after it.

Given::

    x -> conv (W, b) -> BatchNorm / * c / + c / - c / / c -> y
    x -> BatchNorm / * c / ... -> conv (W, b) -> y

Result::

    x -> conv (s W, s b + t) -> y        s = γ/√(σ²+ε), t = β - μ s for a BatchNorm
    x -> conv (W s, W t + b) -> y

``conv`` is any convolution, transposed convolution or Linear, of any rank and grouping. After the
layer it is exact at every position, padded or not. Before it, a shift t is exact only where the
layer does not pad, since its zeros are not shifted. Nobody else may read the values in between.

Source: Ioffe & Szegedy, "Batch Normalization", 2015; folding as in Jacob et al., 2018.
"""

from __future__ import annotations

from torch import fx

from fxrep.algebra.maps import IDENTITY, Diagonal
from fxrep.planning import work
from fxrep.planning.cost import CostModel, total
from fxrep.planning.plan import Plan, absorbing, search
from fxrep.planning.rule import Joint, Pass
from fxrep.reading.view import Affine, View
from fxrep.refusal import Refusal


def propose(view: View, node: fx.Node, cost: CostModel) -> Plan | Joint | Refusal | None:
    """Fold the scales and shifts that end at `node`, or that its layer reads."""
    reading = view.read(node)
    if isinstance(reading, Refusal):
        return None if reading.kind else reading
    if not isinstance(reading, Affine) or len(reading.terms) > 1:
        return None
    if reading.is_layer:
        return search(view, node, _is_diagonal, cost)
    if not _is_scale(reading) or _goes_on(view, node):
        return None
    answer = search(view, node, _is_near, cost)
    if isinstance(answer, Plan) or len(node.users) < 2:
        return answer
    return _into_all(view, node, cost) or answer


def _goes_on(view: View, node: fx.Node) -> bool:
    """Whether the only reader scales on: the walk from the last of them passes this one too."""
    if len(node.users) != 1:
        return False
    reading = view.read(next(iter(node.users)))
    return isinstance(reading, Affine) and _is_scale(reading) and not reading.relies


def _into_all(view: View, node: fx.Node, cost: CostModel) -> Joint | Refusal | None:
    """Fold a scale or shift into every layer that reads it."""
    readings = [view.read(user) for user in node.users]
    if not all(isinstance(reading, Affine) and reading.is_layer for reading in readings):
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
    """A BatchNorm, a product or sum with a constant, 0 included; an identity is nothing to fold."""
    term = reading.terms[0]
    return (
        len(reading.terms) == 1
        and isinstance(term.map, Diagonal)
        and (reading.kind != "identity" or term.weight is not None or reading.bias is not None)
    )


def _is_diagonal(reading: Affine) -> bool:
    return len(reading.terms) == 1 and isinstance(reading.terms[0].map, Diagonal)


def _is_near(reading: Affine) -> bool:
    return _is_diagonal(reading) or reading.is_layer


BATCHNORM = Pass("batchnorm", propose, reports_layers=False)
