"""What a pass is: a name, and a function that answers for one node."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx

from fxrep.algebra.maps import Diagonal
from fxrep.algebra.recipe import Call
from fxrep.planning.cost import CostModel
from fxrep.planning.plan import Plan
from fxrep.reading.view import Affine, View
from fxrep.refusal import Refusal


@dataclass(frozen=True, eq=False)
class Fold:
    """``node`` depends on the model's tensors alone and has this value.

    Attributes:
        node: the last of a constant expression.
        value: a tensor, a number or a size.
        expr: how the value is computed from the model's tensors.
    """

    node: fx.Node
    value: Any
    expr: Call


@dataclass(frozen=True, eq=False)
class Joint:
    """Plans that pay only together, after which nobody reads `node` any more.

    Attributes:
        node: goes when the plans are carried out.
        plans: all are carried out, or none.
    """

    node: fx.Node
    plans: tuple[Plan, ...]


@dataclass(frozen=True, eq=False)
class Drop:
    """Nobody reads `node`, and `node` does nothing but to compute its value.

    Attributes:
        node: goes.
        kind: the operation, as the report names it.
    """

    node: fx.Node
    kind: str


@dataclass(frozen=True, eq=False)
class Same:
    """``node`` computes the value of ``value``, an earlier node: its readers may read that.

    Equal means equal elements, shape, dtype and device; and `node` does nothing else. The driver
    looks at memory: it refuses where a write in place or an output would show that two values
    became one. The pass looks at strides, where a reader could fail on those of `value`.

    Attributes:
        node: goes.
        value: is read instead.
        itself: `node` gives that very tensor and not a copy, so that an output cannot show it.
    """

    node: fx.Node
    value: fx.Node
    itself: bool = False


Answer = Plan | Fold | Joint | Drop | Same | Refusal | None
"""A rewrite; why there is none, although the structure is there; or None: no such structure."""


@dataclass(frozen=True)
class Pass:
    """One kind of rewrite.

    Attributes:
        name: how reports and ``optimize(passes=...)`` name it.
        propose: answers for one node of a graph; it never changes the graph.
        reports_layers: whether the report says of a layer why this pass declined it. The reasons
            of a pass that folds BatchNorms are reported at the BatchNorm that stays instead.
    """

    name: str
    propose: Callable[[View, fx.Node, CostModel], Answer]
    reports_layers: bool = True


# How many scales and shifts after an operation are looked through: a BatchNorm, some coefficients.
_LONGEST_TAIL = 16


def tail(view: View, node: fx.Node) -> Affine | None:
    """The last operation at or above `node` that is more than a scale or shift of channels."""
    for _ in range(_LONGEST_TAIL):
        reading = view.read(node)
        if not isinstance(reading, Affine):
            return None
        if len(reading.terms) > 1 or not isinstance(reading.terms[0].map, Diagonal):
            return reading
        node = reading.terms[0].operand
    return None
