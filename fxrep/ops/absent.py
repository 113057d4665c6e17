"""Calls that cannot run because they are given None for a tensor.

Given: ``forward(self, image=None, mask=None)``, traced without an image. Result: the call that
cannot run is found while tracing, and not when the optimized model is called.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from fxrep.ops.calls import declared_kind, schemas, target_name

# Functions of the module operator that take None.
_TAKING_NONE = frozenset({"eq", "ne", "is_", "is_not", "getitem", "setitem", "contains"})


def lacks_operand(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a function or method (a str) is given None for a tensor or number it needs."""
    if not any(_has_none(value) for value in (*args, *kwargs.values())):
        return False
    name = target_name(target)
    namespace = "torch"
    if not isinstance(target, str):
        namespace = getattr(target, "__module__", None) or "torch"
    if namespace == "_operator":  # a tuple of None may be the key of an index
        return name not in _TAKING_NONE and any(value is None for value in args)
    if namespace.partition(".")[0] != "torch":
        return False
    if inspect.isfunction(target):  # of torch.nn.functional: all but the first may be optional
        first = next(iter(inspect.signature(target).parameters), "")
        return _has_none(args[0] if args else kwargs.get(first, 0))
    found = schemas(name)
    return bool(found) and all(_overload_lacks(schema, args, kwargs) for schema in found)


def lacks_input(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a module of torch.nn is given None for an argument that has no default.

    Raises:
        TypeError: the arguments do not fit, as the call itself would raise it.
    """
    signature = _signature(type(module).forward)
    given = signature.bind(module, *args, **kwargs).arguments
    return any(
        value is None and signature.parameters[name].default is inspect.Parameter.empty
        for name, value in given.items()
    )


def check_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise the TypeError that a call of a module raises if its arguments do not fit.

    Raises:
        TypeError: the arguments do not fit the signature of the module's forward.
    """
    if "forward" in vars(module) or type(module).__call__ is not nn.Module.__call__:
        return
    _check_names(type(module).forward, len(args), tuple(kwargs))


@functools.cache
def _check_names(forward: Any, positional: int, names: tuple[str, ...]) -> None:
    with contextlib.suppress(ValueError):  # code without a signature
        _signature(forward).bind(None, *(None,) * positional, **dict.fromkeys(names))


@functools.cache
def _signature(function: Any) -> inspect.Signature:
    return inspect.signature(function)


def _overload_lacks(schema: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call gives one overload None for a tensor or number."""
    given = {a.name: value for a, value in zip(schema.arguments, args, strict=False)}
    given.update(kwargs)
    needed = [a for a in schema.arguments if declared_kind(a.type) in ("TensorType", "NumberType")]
    return any(_has_none(given.get(argument.name, 0)) for argument in needed)


def _has_none(value: object) -> bool:
    if isinstance(value, tuple | list):
        return any(each is None for each in value)
    return value is None
