"""How much of a model became graphs, in words."""

from __future__ import annotations

from torch import fx, nn

from fxrep.capture.graph_forward import GraphForward

WHOLE = ("whole graph", "guarded graph")


def captured(optimized: nn.Module) -> str:
    """How a result of `fxrep.optimize` runs.

    Returns:
        "whole graph"; "guarded graph", whole too, with the original forward beside it for calls
        that the graph does not stand for; "graph around N", a graph that calls N modules whose
        forward stays Python; "N islands", modules that run a graph of their own below a forward
        that stays Python; or "nothing".
    """
    forward = optimized.__dict__.get("forward")
    guarded = isinstance(forward, GraphForward)
    root = forward if isinstance(forward, GraphForward) else optimized
    if isinstance(root, GraphForward | fx.GraphModule):
        around = _python_modules(optimized, root.graph)
        return f"graph around {around}" if around else WHOLE[guarded]
    graphs = [m for m in optimized.modules() if isinstance(m.__dict__.get("forward"), GraphForward)]
    below = {id(x) for m in graphs for x in m.modules() if x is not m}
    islands = sum(id(module) not in below for module in graphs)
    return f"{islands} island{'s' * (islands != 1)}" if islands else "nothing"


def _python_modules(module: nn.Module, graph: fx.Graph) -> int:
    """How many modules a graph calls that are none of torch's."""
    called = (module.get_submodule(str(n.target)) for n in graph.nodes if n.op == "call_module")
    return len({id(m) for m in called if not type(m).__module__.startswith("torch.")})
