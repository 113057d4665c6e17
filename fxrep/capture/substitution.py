"""Names that have to answer for traced values, while somebody traces.

Given: ``isinstance(x, torch.Tensor)``, ``torch.is_tensor(x)``, ``math.sqrt(x.shape[1])`` and the
functions that a library registered by `torch.fx.wrap`. Python looks such names up in the module the
code stands in, and knows no place that belongs to one thread.

Result: while a model is captured they stand, in the modules it is written in, for functions that
answer for traced values and call the original for anything else. Traced values never leave the
thread that traces, so every other thread gets what it always got, from the same function. A name
is put back when the last capture that needs it ends.
"""

from __future__ import annotations

import builtins
import inspect
import math
import sys
import threading
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn
from torch.fx import _symbolic_trace as fx_trace

from fxrep.capture.proxies import is_instance, is_tensor

_Result = TypeVar("_Result")


def surely(run: Callable[[], _Result], undo: Callable[[], None]) -> _Result:
    """Run, and undo whatever happens: if an interrupt hits the undoing, it is done again.

    Args:
        run: what to do; it may have got anywhere when it raises.
        undo: gives back all that `run` may have changed; to call it twice is to call it once.
    """
    try:
        try:
            return run()
        finally:
            undo()
    finally:
        undo()


def with_names(root: nn.Module, run: Callable[[], _Result]) -> _Result:
    """Run something while the names that a model's code uses answer for traced values."""
    token = object()

    def substituted() -> _Result:
        _substitute(token, root)
        return run()

    return surely(substituted, lambda: _put_back(token))


_ABSENT = object()


@dataclass(eq=False)
class _Name:
    """A name that stands for something else, and who needs that."""

    home: dict[str, Any]
    name: str
    original: object
    users: set[object] = field(default_factory=set)


_names: dict[tuple[int, str], _Name] = {}
_lock = threading.RLock()


def _substitute(token: object, root: nn.Module) -> None:
    with _lock:
        for home, name, value in _entries(root):
            # Noted before it is changed: what is noted is put back, wherever this ends.
            known = _names.setdefault((id(home), name), _Name(home, name, home.get(name, _ABSENT)))
            known.users.add(token)
            if len(known.users) == 1:
                home[name] = value


def _put_back(token: object) -> None:
    with _lock:
        for key, known in list(_names.items()):
            known.users.discard(token)
            if known.users:
                continue
            if known.original is _ABSENT:
                known.home.pop(known.name, None)
            else:
                known.home[known.name] = known.original
            del _names[key]


def _entries(root: nn.Module) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """Where, which name, and what it stands for."""
    yield vars(torch), "is_tensor", is_tensor
    for (_, name), home in list(fx_trace._wrapped_fns_to_patch.items()):
        function = home.get(name, getattr(builtins, name, None))
        if function is not None:
            yield home, name, fx_trace._create_wrapped_func(_original(home, name, function))
    for home in _homes(root):
        if _original(home, "isinstance", home.get("isinstance")) in (None, _ABSENT):
            yield home, "isinstance", is_instance
        for name, value in list(home.items()):
            substitute = _SUBSTITUTES.get(id(value))
            if substitute is not None:
                yield home, name, substitute


def _original(home: dict[str, Any], name: str, value: object) -> Any:
    """What a name stood for before anybody traced."""
    known = _names.get((id(home), name))
    return value if known is None else known.original


def _homes(root: nn.Module) -> list[dict[str, Any]]:
    """The global names of the packages a model is written in, and of the functions it calls."""
    homes = {id(home): home for home in (*_packages(root), *_called(root))}
    return list(homes.values())


def _called(root: nn.Module) -> Iterator[dict[str, Any]]:
    """The global names of the functions that the methods of a model's classes lead to."""
    kinds = {kind for module in root.modules() for kind in type(module).__mro__}
    kinds -= {kind for kind in kinds if _is_torchs(kind)}
    ahead = [value for kind in kinds for value in vars(kind).values()]
    seen: set[types.CodeType] = set()
    while ahead:
        function = ahead.pop()
        if not isinstance(function, types.FunctionType) or _is_torchs(function):
            continue
        function = inspect.unwrap(function)
        names = function.__globals__
        if function.__code__ in seen or names is _OWN:
            continue
        seen.add(function.__code__)
        yield names
        mentioned = [names[name] for name in function.__code__.co_names if name in names]
        mentioned += inspect.getclosurevars(function).nonlocals.values()
        ahead += mentioned
        for value in mentioned:  # helpers.scaled(x)
            if isinstance(value, types.ModuleType) and not value.__name__.startswith("torch"):
                ahead += [vars(value).get(name) for name in function.__code__.co_names]


# Where the substitutes are: they call what they stand for.
_OWN = vars(sys.modules[is_instance.__module__])


def _is_torchs(thing: Any) -> bool:
    return str(thing.__module__).partition(".")[0] in ("torch", "builtins")


def _packages(root: nn.Module) -> list[dict[str, Any]]:
    files = {kind.__module__ for module in root.modules() for kind in type(module).__mro__}
    own = __name__.partition(".")[0]
    packages = {file.partition(".")[0] for file in files} - {"torch", "builtins", own}
    return [
        vars(module)
        for file, module in list(sys.modules.items())
        if isinstance(module, types.ModuleType)
        and (file.partition(".")[0] in packages or (file in files and file.startswith(own)))
    ]


class _MathFunction:
    """A function of math; of traced numbers it is an operation of the graph.

    Copied or pickled it is the function itself: a model made meanwhile may keep it.
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
    """The function of math by its name, for pickles."""
    return getattr(math, name)


def _math() -> types.ModuleType:
    """The module math, whose functions of traced numbers are operations of the graph."""
    stand_in = types.ModuleType("math", math.__doc__)
    for name, value in vars(math).items():
        public = callable(value) and not name.startswith("_")
        setattr(stand_in, name, _MathFunction(name, value) if public else value)
    return stand_in


_MATH = _math()

# By the identity of what a name stands for; it may do so already, for another thread.
_SUBSTITUTES: dict[int, Any] = {
    id(each): substitute
    for original, substitute in (
        (math, _MATH),
        (torch.is_tensor, is_tensor),
        *((f.function, f) for f in vars(_MATH).values() if isinstance(f, _MathFunction)),
    )
    for each in (original, substitute)
}
