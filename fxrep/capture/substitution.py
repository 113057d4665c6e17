"""Functions that must accept traced values: replaced by name while a model is captured.

Given: ``isinstance(x, torch.Tensor)``, ``torch.is_tensor(x)``, ``math.sqrt(x.shape[1])`` and the
functions that a library registered by `torch.fx.wrap`. Python looks such a name up in the global
names of the Python module (its namespace), which all threads share.

Result: during a capture the names stand, in the namespaces of the model's code, for functions that
accept traced values and call the original for any other value. Traced values never leave the
tracing thread, so that the results in other threads stay the same. A name is restored when the
last capture that needs it ends.
"""

from __future__ import annotations

import builtins
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import fx, nn
from torch.fx import _symbolic_trace as fx_trace

from fxrep.capture import namespaces
from fxrep.capture.askers import is_library
from fxrep.capture.proxies import Variable, identity, is_callable, is_instance, traced_type
from fxrep.capture.standins import OF_TORCH, STAND_INS

_Result = TypeVar("_Result")


def run_and_undo(run: Callable[[], _Result], undo: Callable[[], None]) -> _Result:
    """Call `run`, then `undo`, whatever happens; if an interrupt hits `undo`, call it again.

    Args:
        run: may raise at any point.
        undo: restores all that `run` may have changed; a second call must change nothing.
    """
    try:
        try:
            return run()
        finally:
            undo()
    finally:
        undo()


def with_traceable_names(root: nn.Module, run: Callable[[], _Result]) -> _Result:
    """Call `run` while names in a model's code stand for functions that accept traced values."""
    token = object()

    def substituted() -> _Result:
        _substitute(token, root)
        return run()

    return run_and_undo(substituted, lambda: namespaces.restore(token))


def _substitute(token: object, root: nn.Module) -> None:
    for namespace, name, value in list(_replacements(root)):
        namespaces.replace(token, namespace, name, value)


def _replacements(root: nn.Module) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """The namespaces, the names to replace in them, and the functions that replace them."""
    yield from ((vars(torch), name, substitute) for name, substitute in OF_TORCH.items())
    yield vars(torch.autograd), "Variable", Variable
    for (_, name), namespace in list(fx_trace._wrapped_fns_to_patch.items()):
        function = namespaces.read(namespace, name)
        if function is namespaces.MISSING:
            function = getattr(builtins, name, None)
        if function is not None:
            yield namespace, name, fx_trace._create_wrapped_func(function)
    for namespace in _namespaces(root):
        for name, substitute in _builtins_for(namespace):
            if namespaces.read(namespace, name) in (None, namespaces.MISSING):
                yield namespace, name, substitute
        for name, value in namespaces.items(namespace):
            substitute = STAND_INS.get(id(value))
            if substitute is not None:
                yield namespace, name, substitute


def _namespaces(root: nn.Module) -> list[dict[str, Any]]:
    """The namespaces of the packages a model is written in, and of the functions it calls."""
    found = (*_package_namespaces(root), *_function_namespaces(root))
    return list({id(namespace): namespace for namespace in found}.values())


def _function_namespaces(root: nn.Module) -> Iterator[dict[str, Any]]:
    """The namespaces of all functions that the methods of a model's classes mention, in turn."""
    classes = {cls for module in root.modules() for cls in type(module).__mro__}
    classes -= {cls for cls in classes if _is_from_torch(cls)}
    ahead = [value for cls in classes for value in vars(cls).values()]
    # The code of a graph calls operators by names of its own; its class is torch's.
    graphs = (module for module in root.modules() if isinstance(module, fx.GraphModule))
    ahead += [type(module).forward for module in graphs]
    seen: set[types.CodeType] = set()
    while ahead:
        function = ahead.pop()
        if not isinstance(function, types.FunctionType) or _is_from_torch(function):
            continue
        function = inspect.unwrap(function)
        names = function.__globals__
        if function.__code__ in seen or names is _OWN_NAMESPACE:
            continue
        seen.add(function.__code__)
        yield names
        mentioned = [names[name] for name in function.__code__.co_names if name in names]
        mentioned += inspect.getclosurevars(function).nonlocals.values()
        ahead += mentioned
        for value in mentioned:  # the function of a module that is mentioned: `helpers.scaled(x)`
            if isinstance(value, types.ModuleType) and not value.__name__.startswith("torch"):
                ahead += [vars(value).get(name) for name in function.__code__.co_names]


# The namespace of the substitutes, which call the originals.
_OWN_NAMESPACE = vars(sys.modules[is_instance.__module__])


def _is_from_torch(thing: Any) -> bool:
    return str(thing.__module__).partition(".")[0] in ("torch", "builtins")


def _package_namespaces(root: nn.Module) -> list[dict[str, Any]]:
    """The namespaces of all modules of the packages that a model's classes come from."""
    files = {kind.__module__ for module in root.modules() for kind in type(module).__mro__}
    own = __name__.partition(".")[0]
    packages = {file.partition(".")[0] for file in files} - {"torch", "builtins", own}
    return [
        vars(module)
        for file, module in list(sys.modules.items())
        if isinstance(module, types.ModuleType)
        and (file.partition(".")[0] in packages or (file in files and file.startswith(own)))
    ]


# Builtins that look at an object without asking it.
_BUILTINS: dict[str, Any] = {
    "isinstance": is_instance,
    "type": traced_type,
    "id": identity,
    "callable": is_callable,
}


def _builtins_for(namespace: dict[str, Any]) -> list[tuple[str, Any]]:
    """Python's own library gets no `type`: it looks into `type` itself."""
    own = is_library(str(namespace.get("__file__", "")))
    return [("isinstance", is_instance)] if own else list(_BUILTINS.items())
