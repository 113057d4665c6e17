"""The graphs that `torch.compile` had fxrep compile and that still exist, for the public calls.

Apart from the backend itself: that needs dynamo, which takes seconds to import.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterable
from typing import Protocol

from torch import nn

from fxrep.report import Report


class Graph(Protocol):
    """A compiled graph."""

    @property
    def report(self) -> Report:
        """What was done."""

    def uses(self, tensors: set[int]) -> bool:
        """Whether it has been called with one of these tensors, by identity."""

    def forget(self, tensors: set[int] | None) -> None:
        """Compute anew what was made from these tensors, or everything."""


graphs: weakref.WeakSet[Graph] = weakref.WeakSet()


def refresh(compiled: object = None) -> None:
    """Let compiled graphs compute their folded weights anew at the next call.

    For changes that leave no trace: ``p.data.mul_(2)`` and other writes through ``.data``, NumPy
    or a kernel of one's own. All others are seen without this call.

    Args:
        compiled: a module, compiled or not, whose weights have changed; all if it is left out.
    """
    tensors = _tensors([compiled]) if isinstance(compiled, nn.Module) else None
    for graph in list(graphs):
        graph.forget(tensors)


def compiled_report(compiled: object) -> Report | None:
    """What was done in the graphs that the weights of a module or function went through, if any."""
    tensors = _tensors(_modules(compiled))
    reports = [graph.report for graph in list(graphs) if graph.uses(tensors)]
    if not reports:
        return None
    return Report(
        tuple(rewrite for report in reports for rewrite in report.rewrites),
        tuple(skip for report in reports for skip in report.skipped),
    )


def _modules(compiled: object) -> list[nn.Module]:
    """A module, or those that a function finds by itself: its own, in its closure, by a name."""
    if isinstance(compiled, nn.Module):
        return [compiled]
    function = inspect.unwrap(compiled) if callable(compiled) else None
    found = [getattr(function, "__self__", None)]
    function = getattr(function, "__func__", function)
    if inspect.isfunction(function):
        names = inspect.getclosurevars(function)
        found += [*names.nonlocals.values(), *names.globals.values()]
    return [each for each in found if isinstance(each, nn.Module)]


def _tensors(modules: Iterable[nn.Module]) -> set[int]:
    return {id(it) for module in modules for it in (*module.parameters(), *module.buffers())}
