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
    """``node`` depends on the model's tensors alone and has this value."""

    node: fx.Node
    value: Any
    expr: Call


@dataclass(frozen=True, eq=False)
class Joint:
    """Plans that pay only together, after which nobody reads `node` any more."""

    node: fx.Node
    plans: tuple[Plan, ...]


@dataclass(frozen=True, eq=False)
class Drop:
    """Nobody reads `node`, and it does nothing else."""

    node: fx.Node
    kind: str


@dataclass(frozen=True, eq=False)
class Same:
    """``node`` computes the value of ``value``, an earlier node: its readers may read that.

    Equal means equal elements, shape, dtype and device, and nothing else that `node` does. The
    driver makes sure that nobody can tell the two apart by their memory, and refuses where an
    operation in place or an output would show it. Strides are the pass's own business.

    Attributes:
        node: the node that goes.
        value: the node that is read instead.
        itself: `node` gives that very tensor, not a copy: then they cannot be told apart.
    """

    node: fx.Node
    value: fx.Node
    itself: bool = False


Answer = Plan | Fold | Joint | Drop | Same | Refusal | None
"""A replacement, why there is none although the structure is there, or nothing of the kind."""


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
