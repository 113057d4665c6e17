"""The graphs that `torch.compile` had fxrep compile and that still exist, for the public calls.

Apart from the backend itself: that needs dynamo, which takes seconds to import.
"""

from __future__ import annotations

import weakref
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
    tensors = _tensors(compiled) if isinstance(compiled, nn.Module) else None
    for graph in list(graphs):
        graph.forget(tensors)


def compiled_report(module: nn.Module) -> Report | None:
    """What was done in the graphs that a module's weights went through, if any."""
    tensors = _tensors(module)
    reports = [graph.report for graph in list(graphs) if graph.uses(tensors)]
    if not reports:
        return None
    return Report(
        tuple(rewrite for report in reports for rewrite in report.rewrites),
        tuple(skip for report in reports for skip in report.skipped),
    )


def _tensors(module: nn.Module) -> set[int]:
    return {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
