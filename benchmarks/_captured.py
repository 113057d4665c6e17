"""How much of a model became graphs, in words."""

from __future__ import annotations

from torch import fx, nn

from fxrep.capture.graph_forward import GraphForward

WHOLE = ("whole graph", "guarded graph")


def captured(optimized: nn.Module) -> str:
    """How a result of `fxrep.optimize` runs.

    Returns:
        "whole graph"; "guarded graph", whole too, with the original forward beside it for calls
        that the graph does not stand for; "N islands", modules that run a graph of their own below
        a forward that stays Python; or "nothing".
    """
    if isinstance(optimized, fx.GraphModule):
        return "whole graph"
    if isinstance(optimized.__dict__.get("forward"), GraphForward):
        return "guarded graph"
    graphs = [m for m in optimized.modules() if isinstance(m.__dict__.get("forward"), GraphForward)]
    below = {id(x) for m in graphs for x in m.modules() if x is not m}
    islands = sum(id(module) not in below for module in graphs)
    return f"{islands} island{'s' * (islands != 1)}" if islands else "nothing"
