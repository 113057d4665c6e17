"""Compiled code of Python: the code inside it, and the names that it mentions."""

from __future__ import annotations

import dis
import functools
import os
import types
from collections.abc import Iterator

# What tells the code of a function from other code, and can be pickled.
Key = tuple[str, str, int]


def key(code: types.CodeType) -> Key:
    """The file, the name and the line of some code."""
    return os.path.basename(code.co_filename), code.co_name, code.co_firstlineno


def nested(code: types.CodeType) -> Iterator[types.CodeType]:
    """The code, and that of the functions and comprehensions inside."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from nested(constant)


def mentioned(code: types.CodeType) -> set[str]:
    """The names that code mentions, as names or as strings; not those of code inside it."""
    texts = {each for each in code.co_consts if isinstance(each, str)}
    for each in code.co_consts:  # `case Point(x=0)` keeps its names in a tuple
        if isinstance(each, tuple):
            texts.update(text for text in each if isinstance(text, str))
    return {*code.co_names, *texts}


def stored_attributes(code: types.CodeType) -> set[str]:
    """The names of the attributes that code sets or deletes; not those of code inside it."""
    steps = dis.get_instructions(code)
    return {step.argval for step in steps if step.opname in ("STORE_ATTR", "DELETE_ATTR")}


@functools.lru_cache(maxsize=4096)
def global_names(code: types.CodeType) -> frozenset[str]:
    """The global names that code reads or sets, or may find by text; code inside it included."""
    found: set[str] = set()
    for each in nested(code):
        found.update(s.argval for s in dis.get_instructions(each) if s.opname in _GLOBAL)
        if not _BY_TEXT.isdisjoint(each.co_names):
            found |= {text for text in mentioned(each) if text.isidentifier()}
    return frozenset(found)


_GLOBAL = frozenset(
    f"{action}_{kind}" for action in ("LOAD", "STORE", "DELETE") for kind in ("GLOBAL", "NAME")
)
_BY_TEXT = frozenset({"globals", "vars", "getattr", "setattr", "exec", "eval", "__dict__"})
