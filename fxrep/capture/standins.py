"""Modules that stand for math and operator while a forward is traced.

Given: ``math.sqrt(x.shape[1])`` and ``operator.is_(a, b)``.
Result: the first is a node of the graph; the second is refused for traced values. For all else, and
in other threads, the stand-ins give what the modules give.
"""

from __future__ import annotations

import math
import operator
import types
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import _symbolic_trace as fx_trace

from fxrep.capture.proxies import (
    Variable,
    as_tensor,
    factory,
    is_other,
    is_same,
    is_tensor,
    negated,
)


class _MathFunction:
    """A function of math that, called with traced numbers, becomes a node of the graph.

    A copy or pickle is the original function: a model made during a capture may keep it.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.__name__ = self.__qualname__ = name
        self.__module__, self.__doc__, self.function = "math", function.__doc__, function
        self.traced = fx_trace._create_wrapped_func(function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.traced(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self.function

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr_of_math, (self.__name__,)


def getattr_of_math(name: str) -> Any:
    """The function of math with this name, for pickles."""
    return getattr(math, name)


def _stand_in(original: types.ModuleType, changed: dict[str, Any]) -> types.ModuleType:
    """A module that has some names of another changed."""
    module = types.ModuleType(original.__name__, original.__doc__)
    vars(module).update({**vars(original), **changed})
    return module


_OF_OPERATOR = {"is_": is_same, "is_not": is_other, "not_": negated}
_MATH = {
    name: _MathFunction(name, value)
    for name, value in vars(math).items()
    if callable(value) and not name.startswith("_")
}

# Functions of torch that do not see a traced value by themselves, by name.
OF_TORCH = {
    "is_tensor": is_tensor,
    "as_tensor": as_tensor,
    **{name: factory(getattr(torch, name)) for name in ("zeros", "ones", "empty")},
}

# By the id of a name's value: the original, or already the substitute, for another thread.
STAND_INS: dict[int, Any] = {
    id(each): stand_in
    for original, stand_in in (
        (math, _stand_in(math, _MATH)),
        (operator, _stand_in(operator, _OF_OPERATOR)),
        (torch.autograd.Variable, Variable),
        *((getattr(torch, name), function) for name, function in OF_TORCH.items()),
        *((getattr(operator, name), function) for name, function in _OF_OPERATOR.items()),
        *((function.function, function) for function in _MATH.values()),
    )
    for each in (original, stand_in)
}
