"""The code that a module's forward may run itself: its methods and the functions it mentions."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fxrep.capture.askers import is_library, is_users


def reachable_code(module: nn.Module) -> Iterator[tuple[types.CodeType, bool]]:
    """All code that the forward of a module may run, without torch's, Python's and other modules'.

    Methods and functions are followed by name, so that some of the code may never run.

    Yields:
        Code, and whether its first argument is the module.
    """
    start = vars(module).get("forward", type(module).forward)
    ahead = [(function, True) for function in _functions(start)]
    seen: set[types.CodeType] = set()
    kinds = {type(each) for each in module.modules()} - {type(module)}
    kinds = {kind for kind in kinds if not kind.__module__.startswith("torch.")}
    while ahead:
        function, is_method = ahead.pop()
        code = function.__code__
        if code in seen or not is_users(code.co_filename) or is_library(code.co_filename):
            continue
        seen.add(code)
        yield code, is_method
        inner = list(_nested(code))
        yield from ((each, False) for each in inner)
        # What pytest adds to an assertion is named by no identifier.
        names = {n for each in (code, *inner) for n in each.co_names if n.isidentifier()}
        ahead += [(f, True) for name in names for f in _methods(type(module), name)]
        others = names - {"forward"}
        ahead += [(f, True) for cls in kinds for name in others for f in _methods(cls, name)]
        ahead += [(f, False) for f in _mentioned(function, module, names)]


def _methods(kind: type, name: str) -> Iterator[types.FunctionType]:
    """The methods of this name, overridden ones included: `super()` may call these."""
    for cls in kind.__mro__:
        value = vars(cls).get(name)
        if isinstance(value, types.FunctionType | property):
            yield from _functions(value)


def _mentioned(
    function: types.FunctionType, module: nn.Module, names: set[str]
) -> Iterator[types.FunctionType]:
    """The functions that a function mentions by name, or holds in its closure."""
    values = [vars(module).get(name) for name in names]
    values += [vars(cls).get(name) for cls in type(module).__mro__ for name in names]
    values += [function.__globals__.get(name) for name in names]
    values += [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
    values += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    for value in values:
        yield from _below(value, names, 3)


def _below(value: Any, names: set[str], depth: int) -> Iterator[types.FunctionType]:
    """The functions that a value holds or is, as far as they may be called by one of the names."""
    if type(value) in _DATA:
        return
    found = list(_functions(value))
    yield from found
    if found or depth == 0 or isinstance(value, nn.Module):
        return
    if isinstance(value, dict | list | tuple | set):
        inner = list(value.values() if isinstance(value, dict) else value)[:_MOST_ITEMS]
    elif isinstance(value, types.ModuleType):
        if value.__name__.startswith("torch"):
            return
        inner = [vars(value).get(name) for name in names]
    else:
        kind = value if isinstance(value, type) else type(value)
        wanted = {*names, "__init__", "__post_init__", "__new__", "__call__"}
        inner = [vars(cls).get(name) for cls in kind.__mro__ for name in wanted]
    for each in inner:
        yield from _below(each, names, depth - 1)


def code_key(module: nn.Module) -> tuple[object, ...]:
    """What decides which code is reachable: modules with equal keys reach the same code."""
    own = [v for k, v in vars(module).items() if k not in _OF_EVERY_MODULE and not _is_data(v)]
    kinds = frozenset(type(each) for each in module.modules())
    return type(module), kinds, tuple(map(id, own))


def _is_data(value: Any) -> bool:
    return type(value) in _DATA or (type(value) is tuple and all(map(_is_data, value)))


_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_DATA = frozenset({type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device})

# A longer table holds data.
_MOST_ITEMS = 64


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _functions(value: Any) -> Iterator[types.FunctionType]:
    """The Python functions behind a function, method, property or partial; wrapped ones too."""
    for _ in range(8):
        if isinstance(value, property):
            value = value.fget
        elif isinstance(value, functools.partial):
            value = value.func
        elif isinstance(value, types.MethodType | staticmethod | classmethod):
            value = value.__func__
        if isinstance(value, types.FunctionType):
            yield value
        if not isinstance(value, type) and callable(value) and hasattr(value, "__wrapped__"):
            value = value.__wrapped__
        elif not isinstance(value, property | functools.partial | types.MethodType):
            return


def _nested(code: types.CodeType) -> Iterator[types.CodeType]:
    """The code of the functions and comprehensions inside."""
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield constant
            yield from _nested(constant)
