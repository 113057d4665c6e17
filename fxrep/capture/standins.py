"""Modules that stand for torch, math and operator while a forward is traced.

Given: ``torch.is_grad_enabled()``, ``math.sqrt(x.shape[1])``, ``operator.is_(a, b)``.
Result: the first is refused, for a graph that was traced in one mode runs in another; the second is
a node of the graph; the third is refused for traced values. For all else, and in other threads, the
stand-ins give what the modules give.
"""

from __future__ import annotations

import functools
import importlib
import math
import operator
import types
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import _symbolic_trace as fx_trace

from fxrep.capture.hidden import MODES
from fxrep.capture.proxies import Unfaithful, is_other, is_same, is_tensor, running


class _StandIn(types.ModuleType):
    """A module that stands for another, equal to it, but for some of its names."""

    def __init__(self, original: types.ModuleType, changed: dict[str, Any]) -> None:
        super().__init__(original.__name__, original.__doc__)
        for name in ("__spec__", "__loader__", "__package__"):
            object.__delattr__(self, name)
        for name, value in {"_original": original, **changed}.items():
            object.__setattr__(self, name, value)

    @property
    def __dict__(self) -> dict[str, Any]:  # type: ignore[override]
        original: types.ModuleType = self._original
        return vars(original)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_original"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._original, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._original, name)

    def __dir__(self) -> list[str]:
        return dir(self._original)

    def __eq__(self, other: object) -> bool:
        return other is self or other is self._original

    def __hash__(self) -> int:
        return hash(self._original)

    def __reduce__(self) -> tuple[Any, ...]:
        return importlib.import_module, (self.__name__,)


def _refused_in_traces(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of torch that the forward which is traced may not call."""

    @functools.wraps(function)
    def ask(*args: Any, **kwargs: Any) -> Any:
        tracer = running()
        if tracer is not None:
            raise tracer.refuse(Unfaithful(f"forward asks for {function.__name__}()"))
        return function(*args, **kwargs)

    return ask


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


def _stand_ins() -> list[tuple[Any, Any]]:
    """Modules and functions, and what stands for them."""
    modes = [name for name in sorted(MODES) if hasattr(torch, name)]
    asks = {name: _refused_in_traces(getattr(torch, name)) for name in modes}
    inner = {name: asks[name] for name in modes if hasattr(torch._C, name)}
    low: Any = torch._C
    identity = {"is_": is_same, "is_not": is_other}
    functions = {
        name: _MathFunction(name, value)
        for name, value in vars(math).items()
        if callable(value) and not name.startswith("_")
    }
    return [
        (torch, _StandIn(torch, {**asks, "_C": _StandIn(low, inner)})),
        *((getattr(torch, name), ask) for name, ask in asks.items()),
        (torch.is_tensor, is_tensor),
        (operator, _StandIn(operator, identity)),
        *((getattr(operator, name), function) for name, function in identity.items()),
        (math, _StandIn(math, functions)),
        *((function.function, function) for function in functions.values()),
    ]


# By the id of a name's value: the original, or already the substitute, for another thread.
STAND_INS: dict[int, Any] = {
    id(each): stand_in for original, stand_in in _stand_ins() for each in (original, stand_in)
}
