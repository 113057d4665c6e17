"""The search for the best plan of a root: walks with fewer and fewer liberties."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from fxrep.planning.cost import CostModel
from fxrep.planning.plan import Plan, plan_of
from fxrep.planning.steps import Passes, start, steps
from fxrep.planning.walk import Shared, Walk, is_structure, where
from fxrep.reading.view import View
from fxrep.refusal import Refusal


def search(
    view: View, root: fx.Node, passes: Passes, cost: CostModel,
    *, moves: bool = False, maps: int = 0,
) -> Plan | Refusal | None:  # fmt: skip
    """The best plan for `root`, the reason why there is none, or None if nothing was in sight.

    Args:
        view: the graph.
        root: the node to replace.
        passes: which operations a walk may pass.
        cost: decides between legal plans.
        moves: whether operations that commute are moved out of the way.
        maps: how many operations other than scales and shifts a plan must replace.
    """
    objections: list[str] = []
    walk = start(view, root, moves=moves, maps=maps)
    best = _best(walk, steps(walk, passes), cost, None, objections)
    if best is None and walk.joins > 1:
        # No plan beyond a second sum or concatenation pays: stop before it.
        again = start(view, root, moves=moves, maps=maps)
        best = _best(again, steps(again, passes, one_join=True), cost, best, objections)
    if best is None and walk.has_structure:
        # Perhaps a pooling costs too much as a convolution, or a part as a layer of the whole.
        again = start(view, root, moves=moves, maps=maps)
        layers_only = steps(again, lambda reading: passes(reading) and not is_structure(reading))
        best = _best(again, layers_only, cost, best, objections)
    if walk.met_shared and not moves:
        beyond = start(view, root, maps=maps)
        best = _best(beyond, steps(beyond, passes, shared=True), cost, best, objections)
    if best is not None:
        return best
    return Refusal(objections[-1]) if objections else None


def absorbing(view: View, root: fx.Node, node: fx.Node, cost: CostModel) -> Plan | Refusal | None:
    """The plan in which `root` takes up the computation of `node`, whatever else reads that.

    The plan alone saves nothing, since `node` dies only once all its readers have taken it up.
    """
    walk = start(view, root)
    for _ in steps(walk, lambda reading: reading is view.read(node), shared=True):
        if node in walk.expanded:
            return plan_of(walk, cost, alone=True)
    return next((why for why in walk.frozen.values() if why is not None), None)


def _best(
    walk: Walk, steps: Iterator[None], cost: CostModel, best: Plan | None, objections: list[str]
) -> Plan | None:
    """The better of `best` and the best plan of one walk; appends why other plans were refused."""
    for _ in steps:
        if walk.moves and not walk.crossed:
            continue  # other passes find the plans that move nothing
        plan = plan_of(walk, cost)
        if isinstance(plan, Plan):
            objection = cost.objection(plan.saved, plan.spent)
            if objection is None and (best is None or plan.score > best.score):
                best = plan
            elif objection is not None and (plan.saves or plan.apart or plan.border):
                objections.append(_explained(plan, objection))
        elif plan is not None:
            objections.append(plan.reason)
    objections.extend(_reasons_to_stop(walk, found=best is not None or bool(objections)))
    return best


def _reasons_to_stop(walk: Walk, *, found: bool) -> Iterator[str]:
    """Why a walk stopped, if it did not get past the root's operands or found no plan."""
    is_short = len(walk.expanded) <= 1 and not walk.maps
    if not is_short and (not walk.maps or found):
        return
    # A sum with one affine operand has nothing to merge, whether others read the operand or not.
    is_alone = len(walk.frozen) > 1 and sum(why is not None for why in walk.frozen.values()) < 2
    for node, why in walk.frozen.items():
        if why is not None and not (isinstance(why, Shared) and (is_alone or not is_short)):
            at_root = where(node) == where(walk.root)
            yield why.reason if at_root else f"{where(node)}: {why.reason}"


def _explained(plan: Plan, objection: str) -> str:
    """The objection of a cost model, with the reason for the work that it objects to."""
    if plan.border is not None:
        return f"{plan.border}; correcting its border is not worth it: {objection}"
    return plan.apart or f"not worth it: {objection}"
