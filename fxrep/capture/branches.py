"""Which answer of a condition only leads to an error, found in the bytecode.

Given: ``if x.shape[1] != self.channels: raise ValueError(...)`` or ``assert x.ndim == 4``.

Result: wherever the forward goes on, the first condition is false and the second is true.
"""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Sequence

from fxrep.capture.hidden import NO_OPERATION
from fxrep.words import words

_MOST = 200  # instructions on the way to an error


@functools.cache
def only_answer(code: types.CodeType, offset: int) -> bool | None:
    """The answer of a condition without which the code raises; None if both go on.

    Args:
        code: code of a function.
        offset: the instruction that asks whether a value is true.
    """
    steps: list[dis.Instruction] = []
    places: dict[int, int] = {}  # by offset, the step there or the next one
    for step in dis.get_instructions(code):
        places[step.offset] = len(steps)
        if step.opname not in NO_OPERATION:
            steps.append(step)
    at = places.get(offset)
    if at is not None and steps[at].opname in ("TO_BOOL", "COPY"):
        at += 1
    if at is None or at >= len(steps) or "POP_JUMP" not in steps[at].opname:
        return None
    jumped, went_on = places.get(steps[at].argval), at + 1
    if jumped is None or "NONE" in steps[at].opname:
        return None
    raises = [_raises(steps, places, place) for place in (jumped, went_on)]
    if raises[0] == raises[1]:
        return None
    jumps_if = "IF_TRUE" in steps[at].opname
    return jumps_if if raises[1] else not jumps_if


def _raises(steps: Sequence[dis.Instruction], places: dict[int, int], start: int) -> bool:
    """Whether the code from here on raises, whichever way its own conditions go."""
    ahead, seen = [start], set()
    while ahead:
        at = ahead.pop()
        while at not in seen:
            seen.add(at)
            if at >= len(steps) or len(seen) > _MOST:
                return False
            step = steps[at]
            if step.opname == "RAISE_VARARGS":
                break
            jumps = step.opcode in dis.hasjrel or step.opcode in dis.hasjabs
            if step.opname in _ENDS or (jumps and places[step.argval] <= at):
                return False  # a loop may return at another turn
            if step.opname == "JUMP_FORWARD":
                at = places[step.argval]
                continue
            if jumps:
                ahead.append(places[step.argval])
            at += 1
    return True


_ENDS = words("RETURN_VALUE RETURN_CONST RERAISE YIELD_VALUE")
