"""Whether a value may become a view of a larger value: how its readers treat its memory.

A split returns views into the memory of its operand, with gaps between their rows. Most operations
read a view like any other value; some make it contiguous first, by a copy; ``.view(...)`` raises;
and autograd forbids writes into the views that a split returns.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Set

import torch
from torch import fx

from fxrep.reading.commuting import commuter
from fxrep.reading.pointwise import pointwise
from fxrep.reading.view import Operation, View

# Functions that read a view like any other value and return new memory, besides those that are
# affine or element-wise.
_READ_VIEWS: Set[object] = {operator.matmul, torch.matmul, torch.softmax, "softmax", "matmul"}

# Functions whose result is another view of the same memory.
_TRANSPOSED: Set[object] = {torch.transpose, torch.permute, "transpose", "permute"}


def may_be_view(view: View, node: fx.Node) -> bool:
    """Whether all readers compute the same from a view of a larger value in place of `node`.

    They might not if the value, a part of it or a reshaped value is an output of the graph.
    """
    return all(_reads_views(view, reader) for reader, _ in _readers(view, node))


def is_copied(view: View, node: fx.Node) -> bool:
    """Whether a reader makes `node` contiguous first, by a copy, if it is a view."""
    return any(_copies_first(view, reader) for reader, _ in _readers(view, node))


def is_written_over(view: View, node: fx.Node) -> bool:
    """Whether a reader of `node` writes its result over the value."""
    return any(_writes_over(view, reader, value) for reader, value in _readers(view, node))


def _readers(view: View, node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """The operations that read the memory of `node`, each with the operand in that memory."""
    values = [node]
    for value in values:
        for reader in value.users:
            if view.reads_metadata(reader):
                continue
            yield reader, value
            if _shares_memory(view, reader, value) and reader not in values:
                values.append(reader)


def _shares_memory(view: View, reader: fx.Node, value: fx.Node) -> bool:
    """Whether the result of a reader is in the memory of its operand."""
    if _calls(reader, _TRANSPOSED):
        return True
    reading = view.affine(reader)
    return (reading is not None and reading.is_identity) or _writes_over(view, reader, value)


def _reads_views(view: View, reader: fx.Node) -> bool:
    reading = view.affine(reader)
    if reading is not None and reading.operation is not Operation.PART:
        return True
    return (
        _calls(reader, _TRANSPOSED | _READ_VIEWS)
        or pointwise(view, reader) is not None
        or commuter(view, reader) is not None
    )


def _copies_first(view: View, reader: fx.Node) -> bool:
    reading = view.affine(reader)
    if reading is not None and not reading.is_layer:
        return reading.operation is Operation.POOLING
    return pointwise(view, reader) is None


def _writes_over(view: View, reader: fx.Node, value: fx.Node) -> bool:
    return view.writes(reader) and reader.args[:1] == (value,)


def _calls(reader: fx.Node, functions: Set[object]) -> bool:
    """Whether a node calls one of these functions or methods (the path of a module may be any)."""
    return reader.op in ("call_function", "call_method") and reader.target in functions
