"""Compiled code of Python: the code inside it, and the names that it mentions."""

from __future__ import annotations

import types
from collections.abc import Iterator


def nested(code: types.CodeType) -> Iterator[types.CodeType]:
    """The code, and that of the functions and comprehensions inside."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from nested(constant)


def mentioned(code: types.CodeType) -> set[str]:
    """The names that code mentions, as names or as strings; not those of code inside it."""
    return {*code.co_names, *(each for each in code.co_consts if isinstance(each, str))}
