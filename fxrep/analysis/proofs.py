"""Answers that hold in every call: what proven ranks and channels say about a question.

Given: ``skip.shape[1] != 0``, where a BatchNorm2d(64) has read `skip`.
Result: True, whatever the inputs are.
"""

from __future__ import annotations

import operator
from functools import cached_property
from types import NoneType
from typing import Any

from torch import fx

from fxrep.analysis.channels import Channels
from fxrep.analysis.ranks import Ranks
from fxrep.capture.shadows import UNKNOWN
from fxrep.ops.calls import Calls, is_item
from fxrep.words import words

# Functions of numbers and truths, which give the same for the same.
_PLAIN = {
    getattr(operator, name)
    for name in words("eq ne lt le gt ge not_ truth add sub mul floordiv mod neg and_ or_")
}


def proven(graph: fx.Graph, calls: Calls, node: fx.Node) -> Any:
    """The value of a node, of a graph that may not be complete, in every call; or `UNKNOWN`.

    Args:
        graph: the graph so far.
        calls: its calls.
        node: makes a number, a truth or a shape; of a shape, the length only is proven.
    """
    return _Proofs(graph, calls).of(node)


class _Proofs:
    def __init__(self, graph: fx.Graph, calls: Calls) -> None:
        self.graph = graph
        self.calls = calls

    @cached_property
    def ranks(self) -> Ranks:
        return Ranks(self.graph, self.calls)

    @cached_property
    def channels(self) -> Channels:
        return Channels(self.graph, self.calls, self.ranks.rank)

    def of(self, value: Any) -> Any:
        """The value of an operand."""
        if not isinstance(value, fx.Node):
            return value
        called = self.calls.of(value)
        if called is not None and called.op.name in ("ndim", "dim"):
            return self._rank(called.source)
        tensor = self._shaped(value)
        if tensor is not None:
            rank = self._rank(tensor)
            return UNKNOWN if rank is UNKNOWN else (UNKNOWN,) * rank
        if called is not None and called.op.name == "size":
            return self._size(called.source, called.get("dim"))
        if is_item(value):
            return self._item(*value.args)
        if value.op != "call_function" or value.kwargs:
            return UNKNOWN
        if value.target is len:
            return self._rank(self._shaped(value.args[0]))
        operands = [self.of(each) for each in value.args] if value.target in _PLAIN else [UNKNOWN]
        if any(type(each) not in (int, float, bool) for each in operands):
            return UNKNOWN
        try:
            return value.target(*operands)  # type: ignore[operator]
        except ZeroDivisionError:
            return UNKNOWN

    def _item(self, base: Any, key: Any) -> Any:
        if isinstance(key, slice):
            whole = self.of(base)
            plain = all(type(each) in (int, NoneType) for each in (key.start, key.stop, key.step))
            return whole[key] if isinstance(whole, tuple) and plain else UNKNOWN
        return self._size(self._shaped(base), key)

    def _shaped(self, shape: Any) -> fx.Node | None:
        """The tensor whose whole shape a value is."""
        called = self.calls.of(shape) if isinstance(shape, fx.Node) else None
        if called is None or called.op.name not in ("shape", "size"):
            return None
        return called.source if called.get("dim") is None else None

    def _rank(self, tensor: fx.Node | None) -> Any:
        rank = None if tensor is None else self.ranks.rank(tensor)
        return UNKNOWN if rank is None else rank

    def _size(self, tensor: fx.Node | None, axis: object) -> Any:
        if tensor is None or type(axis) is not int:
            return UNKNOWN
        rank = self.ranks.rank(tensor)
        if axis >= 0:
            if rank is None or axis >= rank:
                return UNKNOWN
            axis -= rank
        size = self.channels.of(tensor, axis)
        return UNKNOWN if size is None else size
