"""How a forward that stays Python code uses a Sequential: as a whole, or its items one by one.

The answer is read from the forward's bytecode and decides what is worth a graph. A wrong answer
costs memory or speed, never a result: where code runs layers that have no graph, it runs them as
they are.
"""

from __future__ import annotations

import dis
import inspect
import sys
import types
from collections.abc import Iterator
from typing import Literal

from torch import nn

# Code calls the Sequential as a whole, its items, or both; "unknown" where it does neither by name.
Use = Literal["whole", "items", "both", "unknown"]

_LOADS = ("LOAD_ATTR", "LOAD_METHOD")


def use_of(module: nn.Module, child: str) -> Use:
    """How the methods of a module's class use one of its children.

    Args:
        module: the module.
        child: the name of the child: ``self.CHILD(x)``, ``for each in self.CHILD``.
    """
    if type(module).forward is nn.Sequential.forward:
        return "whole"
    called = otherwise = False
    for code in _code(type(module)):
        previous: dis.Instruction | None = None
        for step in dis.get_instructions(code):
            if step.opname in _LOADS and step.argval == child and _loads_self(previous, code):
                is_call = _is_call(step)
                called, otherwise = called or is_call, otherwise or not is_call
            previous = step
    if called:
        return "both" if otherwise else "whole"
    return "items" if otherwise else "unknown"


def _code(kind: type) -> Iterator[types.CodeType]:
    """The code of the methods of a class, `forward` and those that it calls by name."""
    ahead, seen = ["forward"], set[str]()
    while ahead:
        name = ahead.pop()
        method = inspect.getattr_static(kind, name, None)
        if name in seen or not isinstance(method, types.FunctionType):
            continue
        seen.add(name)
        for code in _with_nested(inspect.unwrap(method).__code__):
            yield code
            ahead += code.co_names


def _with_nested(code: types.CodeType) -> Iterator[types.CodeType]:
    """The code, and that of the functions and comprehensions inside."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _with_nested(constant)


def _loads_self(step: dis.Instruction | None, code: types.CodeType) -> bool:
    own = code.co_varnames[0] if code.co_argcount else "self"
    loads = step is not None and step.opname.startswith(("LOAD_FAST", "LOAD_DEREF"))
    return loads and step is not None and step.argval in (own, "self")


def _is_call(step: dis.Instruction) -> bool:
    if step.opname == "LOAD_METHOD":
        return True
    return sys.version_info >= (3, 12) and step.opname == "LOAD_ATTR" and bool((step.arg or 0) & 1)
