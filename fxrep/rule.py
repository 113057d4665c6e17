"""What a pass is: a name, and a function that answers for one node."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx

from fxrep.collapse import Plan
from fxrep.cost import CostModel
from fxrep.geometry import Refusal
from fxrep.operators import View
from fxrep.recipe import Call


@dataclass(frozen=True, eq=False)
class Fold:
    """``node`` depends on the model's tensors alone and has this value."""

    node: fx.Node
    value: Any
    expr: Call


Answer = Plan | Fold | Refusal | None
"""A replacement, why there is none although the structure is there, or nothing of the kind."""


@dataclass(frozen=True)
class Pass:
    """One kind of rewrite.

    Attributes:
        name: how reports and ``optimize(passes=...)`` name it.
        propose: answers for one node of a graph; it never changes the graph.
    """

    name: str
    propose: Callable[[View, fx.Node, CostModel], Answer]
