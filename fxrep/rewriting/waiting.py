"""Plans for layers that are called more than once: they wait until every call has an equal plan.

Given: ``y = block(block(x))``, whose two calls share each layer's weight.

Result: a plan for the first call waits for the plan for the second, and both get one new layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import fx

from fxrep.planning.plan import Plan
from fxrep.planning.walk import where
from fxrep.refusal import Refusal


@dataclass(eq=False)
class Waiting:
    """The plans that wait, in groups of plans that compute the same from different values."""

    groups: dict[object, list[Plan]] = field(default_factory=dict)

    def gather(self, plan: Plan, shared: Mapping[fx.Node, set[fx.Node]]) -> list[Plan] | Refusal:
        """The plan with those that waited for it, or why it has to wait.

        Args:
            plan: the plan.
            shared: layers of its region that have other users, with all their users.
        """
        if not shared:
            return [plan]
        key = _signature(plan)
        # A rewrite in between may have taken a waiting plan apart: the next round plans anew.
        plans = [*filter(_stands, self.groups.get(key, ())), plan]
        self.groups[key] = plans
        covered = {node for each in plans for node in each.region}
        if any(user not in covered for users in shared.values() for user in users):
            node, users = next(iter(shared.items()))
            return Refusal(f"{where(node)}: {_uses(users)}, in different surroundings")
        return self.groups.pop(key)


def _uses(users: set[fx.Node]) -> str:
    """How often a layer is called, or which layers share its weight."""
    layers = sorted({where(user) for user in users})
    if len(layers) == 1:
        return f"called {len(users)} times"
    return f"its weight is used {len(users)} times, by {', '.join(layers)}"


def _stands(plan: Plan) -> bool:
    """Whether a plan's nodes are all still in the graph."""
    nodes = (*plan.expanded, *(piece.source for piece in plan.pieces))
    return not any(node._erased for node in nodes)


def _signature(plan: Plan) -> object:
    """Equal for two plans that compute the same from different values."""
    index: dict[fx.Node, object] = {node: i for i, node in enumerate(plan.expanded)}
    for piece in plan.pieces:
        index.setdefault(piece.source, f"source {len(index)}")

    def name(node: fx.Node) -> object:
        return index.get(node, str(node.target))

    def arguments(node: fx.Node) -> str:
        return str(fx.map_arg((node.args, node.kwargs), lambda n: str(name(n))))

    return tuple((node.op, str(node.target), arguments(node)) for node in plan.expanded)
