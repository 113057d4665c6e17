"""What Python code mentions: how it uses a Sequential, and whether it names weights.

The use of a Sequential, as a whole or item by item, decides what is worth a graph. A wrong answer
costs memory or speed, never a result: where code runs layers that have no graph, it runs them as
they are.
"""

from __future__ import annotations

import dis
import inspect
import sys
import types
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from torch import nn

from fxrep.ops.owner import is_leaf
from fxrep.words import words

# Code calls the Sequential as a whole, its items, or both; "unknown" where it does neither by name.
Use = Literal["whole", "items", "both", "unknown"]

_LOADS = ("LOAD_ATTR", "LOAD_METHOD")

_WEIGHTS = words(
    "weight bias running_mean running_var num_batches_tracked state_dict load_state_dict "
    "parameters named_parameters buffers named_buffers _parameters _buffers get_parameter "
    "get_buffer modules named_modules"
)


_UNSEEN = words(
    "data numpy __array__ storage untyped_storage typed_storage to_dlpack from_dlpack __dlpack__ "
    "from_numpy data_ptr swap_tensors vector_to_parameters"
)


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


def names_weights(callables: Iterable[Any]) -> bool:
    """Whether the code of callables, or of functions that it uses, has a name of weights in it."""
    return _named(callables, None, _WEIGHTS) is not None


def unseen_write(module: nn.Module) -> str | None:
    """A name in the code of a forward that stands for writes which leave a tensor's version alone.

    The methods of the modules below count, too: code above calls them by name.
    """
    kinds = tuple({type(each) for each in module.modules() if not is_leaf(each)})
    return _named([vars(module).get("forward"), type(module).forward], kinds, _UNSEEN)


def _named(
    callables: Iterable[Any], kinds: tuple[type, ...] | None, names: frozenset[str]
) -> str | None:
    """The first of some names in the code of callables, or of what it uses.

    Args:
        callables: functions, methods, or objects with `__call__`.
        kinds: classes whose methods the code may call by name.
        names: the names to find.
    """
    ahead, seen = list(callables), set[types.CodeType]()
    while ahead:
        function = _python_function(ahead.pop())
        for code in () if function is None else _with_nested(function.__code__):
            if code in seen:
                continue
            seen.add(code)
            mentioned = {*code.co_names, *(c for c in code.co_consts if isinstance(c, str))}
            if names & mentioned:
                return min(names & mentioned)
            ahead += map(function.__globals__.get, code.co_names)  # type: ignore[union-attr]
            for kind in kinds or ():
                others = (n for n in code.co_names if n != "forward")
                ahead += (inspect.getattr_static(kind, name, None) for name in others)
    return None


def _python_function(thing: Any) -> types.FunctionType | None:
    """The Python function behind a callable that is not torch's."""
    if isinstance(thing, property):
        thing = thing.fget
    thing = getattr(thing, "__func__", thing)
    if isinstance(thing, types.FunctionType):
        found = inspect.unwrap(thing)
    elif isinstance(thing, type) or not callable(thing):
        return None
    else:
        found = inspect.getattr_static(type(thing), "__call__", None)
    if not isinstance(found, types.FunctionType):
        return None
    return None if (found.__module__ or "").partition(".")[0] == "torch" else found


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
