"""Whether a value may be read in place of an equal value without an effect on shared memory.

Given::

    y = x * 1 ;  y.add_(a) ;  use(x, y)

Result: a refusal, for without the product the addition would write x.
"""

from __future__ import annotations

from fxrep.planning.rule import Same
from fxrep.reading.view import View
from fxrep.refusal import Refusal


def refusal(view: View, answer: Same) -> Refusal | None:
    """Why `answer.value` must not be read in place of `answer.node`, or None."""
    node, value, memory = answer.node, answer.value, view.aliasing
    itself = answer.itself or memory.gives_back(node, value)
    if not itself and memory.has_effects(node):
        return Refusal("it writes in place, or runs code or hooks that are not torch's")
    if memory.stale(node):
        return Refusal("it is written in place before its last reader")
    if not itself and memory.writes_between(value, node, [value]):
        return Refusal("the value that it equals is written in place before it")
    if not itself and not memory.is_dense(value):
        return Refusal("the value that it equals may be a view of another, with gaps in memory")
    dtypes = view.dtypes.of(node), view.dtypes.of(value)
    if None not in dtypes and dtypes[0] != dtypes[1]:
        return Refusal(f"it is of {dtypes[0]}, the value that it equals of {dtypes[1]}")
    others = [user for user in value.users if user is not node and not view.reads_metadata(user)]
    if not others:
        return None  # no other operation knows the value by another name
    if memory.written(node) or memory.written_since(value, node):
        return Refusal("it equals a value that others read, and one of them is written in place")
    if not itself and memory.returned(node):
        return Refusal("it is a copy of a value, and the caller would get the value itself")
    return None
