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

from fxrep.proxies import is_instance, is_tensor

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
    """The global names of the packages a model is written in."""
    files = {kind.__module__ for module in root.modules() for kind in type(module).__mro__}
    own = __name__.partition(".")[0]
    packages = {file.partition(".")[0] for file in files} - {"torch", "builtins", own}
    return [
        vars(module)
        for file, module in list(sys.modules.items())
        if isinstance(module, types.ModuleType)
        and (file.partition(".")[0] in packages or (file in files and file.startswith(own)))
    ]


def _math() -> types.ModuleType:
    """The module math, whose functions of traced numbers are operations of the graph."""
    stand_in = types.ModuleType("math", math.__doc__)
    for name, value in vars(math).items():
        wrapped = fx_trace._create_wrapped_func(value) if callable(value) else value
        setattr(stand_in, name, wrapped)
    return stand_in


_MATH = _math()

# By the identity of what a name stands for; it may do so already, for another thread.
_SUBSTITUTES: dict[int, Any] = {
    id(each): substitute
    for original, substitute in (
        (math, _MATH),
        (torch.is_tensor, is_tensor),
        *((value, getattr(_MATH, name)) for name, value in vars(math).items() if callable(value)),
    )
    for each in (original, substitute)
}
