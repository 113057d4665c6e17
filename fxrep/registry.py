"""The graphs that the torch.compile backend has compiled and that still exist.

A module of its own, because the backend imports dynamo, which takes seconds.
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
        """What was rewritten, what was not and why."""

    def uses(self, tensors: set[int]) -> bool:
        """Whether the graph has run on one of these tensors, given by id."""

    def invalidate(self, tensors: set[int] | None) -> None:
        """Compute folded weights anew: those made from these tensors, given by id, or all."""


graphs: weakref.WeakSet[Graph] = weakref.WeakSet()


def refresh(compiled: object = None) -> None:
    """Let compiled graphs compute their folded weights anew at the next call.

    For changes that PyTorch does not count as writes: ``p.data.mul_(2)`` and other writes through
    ``.data``, NumPy or custom kernels. All other changes are seen without this call.

    Args:
        compiled: a module, compiled or not, whose weights have changed; without it, all graphs
            compute their folded weights anew.
    """
    tensors = _tensors([compiled]) if isinstance(compiled, nn.Module) else None
    for graph in list(graphs):
        graph.invalidate(tensors)


def compiled_report(compiled: object) -> Report | None:
    """The reports of the graphs that have run on the weights of a module or function, as one.

    None if there are no such graphs.
    """
    tensors = _tensors(_modules(compiled))
    reports = [graph.report for graph in list(graphs) if graph.uses(tensors)]
    if not reports:
        return None
    return Report(
        tuple(rewrite for report in reports for rewrite in report.rewrites),
        tuple(skip for report in reports for skip in report.skipped),
    )


def _modules(compiled: object) -> list[nn.Module]:
    """A module itself; of a function, the modules it is bound to, closes over or names."""
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
    """The ids of all parameters and buffers."""
    return {id(each) for module in modules for each in (*module.parameters(), *module.buffers())}
