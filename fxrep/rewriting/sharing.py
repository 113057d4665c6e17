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
    if memory.has_effects(node):
        return Refusal("it writes in place, or runs code or hooks that are not torch's")
    if memory.stale(node):
        return Refusal("it is written in place before its last reader")
    others = [user for user in value.users if user is not node and not view.reads_metadata(user)]
    if not others and (answer.itself or memory.owns_memory(value)):
        return None  # no other reader could see a write
    if memory.written(node) or memory.written_since(value, node):
        return Refusal("it equals a value that others read, and one of them is written in place")
    if not answer.itself and memory.returned(node):
        return Refusal("it is a copy of a value, and the caller would get the value itself")
    return None
