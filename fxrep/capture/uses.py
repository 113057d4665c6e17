"""What Python code mentions: how it uses a Sequential, and whether it names weights.

The use of a Sequential, as a whole or item by item, decides what is worth a graph. A wrong answer
costs memory or speed, never a result: where code runs layers that have no graph, it runs them as
they are.
"""

from __future__ import annotations

import dis
import functools
import inspect
import sys
import types
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

from torch import nn

from fxrep.capture.code import mentioned, nested, stored_attributes
from fxrep.capture.reach import NoTree, Reach
from fxrep.capture.sharing import is_library, of_function
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
    "asarray frombuffer memoryview data_ptr swap_tensors vector_to_parameters"
)


def use_of(module: nn.Module, child: str) -> Use:
    """How the methods of a module's class use one of its children.

    Args:
        module: the module.
        child: the name of the child: ``self.CHILD(x)``, ``for each in self.CHILD``.
    """
    if type(module).forward is nn.Sequential.forward:
        return "whole"
    called = items = otherwise = False
    for code in _code(type(module)):
        steps = list(dis.get_instructions(code))
        for i, step in enumerate(steps[1:], 1):
            if step.opname in _LOADS and step.argval == child and _loads_self(steps[i - 1], code):
                if _is_call(step):
                    called = True
                elif _is_for_items(steps, i):
                    items = True
                else:
                    otherwise = True
    if called:
        return "both" if items or otherwise else "whole"
    return "items" if items and not otherwise else "unknown"


# Ways to set an attribute by its name, or the mode of layers.
_CHANGES = words("setattr delattr __setattr__ __dict__ vars train eval apply")


@functools.cache
def _hyper_parameters() -> frozenset[str]:
    """The names of what layers are made with, which their attributes have too; and the mode."""
    kinds = [kind for kind in vars(nn).values() if isinstance(kind, type)]
    layers = [kind for kind in kinds if issubclass(kind, nn.Module)]
    names = (name for kind in layers for name in inspect.signature(kind.__init__).parameters)
    return frozenset({"training", *names}) - {"self", "args", "kwargs"}


def changes_layers(hooks: Sequence[Any], module: nn.Module) -> bool:
    """Whether the code of hooks, or of what they carry, may change layers.

    It names weights, or sets an attribute with the name of a hyper-parameter.

    Args:
        hooks: of a module, or of modules below it.
        module: the module.
    """
    names = _WEIGHTS | _CHANGES
    return _named_by_hooks(hooks, module, names, _hyper_parameters()) is not None


def _named_by_hooks(
    hooks: Sequence[Any], module: nn.Module, names: frozenset[str], stored: frozenset[str]
) -> str | None:
    """The first of some names in the code of hooks, and of the methods of what they carry.

    Args:
        hooks: functions, methods, or objects with `__call__`.
        module: the module that has them.
        names: the names to find.
        stored: names to find where they are those of attributes that the code sets.
    """
    kinds = {type(each) for each in (*module.modules(), *hooks)}
    carried = Reach(
        [("a hook", each) for each in hooks], map(type, hooks), NoTree(kinds), _FARTHEST
    )
    if not carried.is_complete:
        return "something that was not found"
    for function in carried.functions.values():
        found = _names_in(function, names, stored)
        if found is not None:
            return found
    return _named(hooks, (), names, stored)


# How many objects that hooks carry are looked at: a hook may carry a whole model.
_FARTHEST = 100_000


def _names_in(
    function: types.FunctionType, names: frozenset[str], stored: frozenset[str]
) -> str | None:
    for code in nested(function.__code__):
        found = names & mentioned(code)
        if stored:
            found |= stored & stored_attributes(code)
        if found:
            return min(found)
    return None


def unseen_write_of_hooks(hooks: Sequence[Any], module: nn.Module) -> str | None:
    """`unseen_write` for hooks of a module, and its own ways to be called."""
    return _named_by_hooks(hooks, module, _UNSEEN, frozenset()) or unseen_write(hooks, module)


def unseen_write(callables: Iterable[Any], module: nn.Module) -> str | None:
    """A name, in the code of callables, of writes that leave a tensor's version as it is.

    Args:
        callables: a forward, hooks: code that is given the module, or has it for self.
        module: the module, of which and below which the code may call methods by name.
    """
    below = [each for each in module.modules() if not is_leaf(each)]
    held = (value for each in below for value in vars(each).values())
    kinds = {type(each) for each in (*below, *held)}
    return _named(callables, kinds, _UNSEEN, holders=below)


def _named(
    callables: Iterable[Any],
    kinds: Iterable[type],
    names: frozenset[str],
    stored: frozenset[str] = frozenset(),
    holders: Iterable[Any] = (),
) -> str | None:
    """The first of some names in the code of callables, or of what it uses.

    Args:
        callables: functions, methods, or objects with `__call__`.
        kinds: classes whose methods, but for `forward`, the code may call by name.
        names: the names to find.
        stored: names to find where they are those of attributes that the code sets.
        holders: objects whose functions the code may call by name, besides those of the methods.
    """
    ahead, seen = list(callables), set[types.FunctionType]()
    holders = [*holders, *filter(None, (getattr(each, "__self__", None) for each in ahead))]
    own = [type(each) for each in holders]
    kinds = list(dict.fromkeys((*kinds, *own)))
    called: set[str] = {"forward"}
    kinds = [kind for kind in kinds if not is_library(kind)]
    while ahead:
        function = _python_function(ahead.pop())
        if function is None or function in seen:
            continue
        seen.add(function)
        ahead += of_function(function)  # what a decorator wraps is in its closure
        found = _names_in(function, names, stored)
        if found is not None:
            return found
        for code in nested(function.__code__):
            for name in set(code.co_names) - called:
                called.add(name)
                ahead += (inspect.getattr_static(kind, name, None) for kind in kinds)
                ahead += (vars(each).get(name) for each in holders if hasattr(each, "__dict__"))
    return None


def _python_function(thing: Any) -> types.FunctionType | None:
    """The Python function behind a callable that is not torch's."""
    if isinstance(thing, property):
        thing = thing.fget
    elif isinstance(thing, functools.partial):
        thing = thing.func
    thing = getattr(thing, "__func__", thing)
    if isinstance(thing, type) or not callable(thing):
        return None
    if not isinstance(thing, types.FunctionType):
        thing = inspect.getattr_static(type(thing), "__call__", None)
    is_function = isinstance(thing, types.FunctionType)
    return thing if is_function and not is_library(thing) else None


def _code(kind: type) -> Iterator[types.CodeType]:
    """The code of the methods of a class, `forward` and those that it calls by name."""
    ahead, seen = ["forward"], set[str]()
    while ahead:
        name = ahead.pop()
        method = inspect.getattr_static(kind, name, None)
        if name in seen or not isinstance(method, types.FunctionType):
            continue
        seen.add(name)
        for code in nested(inspect.unwrap(method).__code__):
            yield code
            ahead += code.co_names


def _loads_self(step: dis.Instruction, code: types.CodeType) -> bool:
    own = code.co_varnames[0] if code.co_argcount else "self"
    return step.opname.startswith(("LOAD_FAST", "LOAD_DEREF")) and step.argval in (own, "self")


def _is_call(step: dis.Instruction) -> bool:
    if step.opname == "LOAD_METHOD":
        return True
    return sys.version_info >= (3, 12) and step.opname == "LOAD_ATTR" and bool((step.arg or 0) & 1)


# What reads items, or an attribute, of the value that was loaded just before, and builtins that do.
_OF_ITEMS = words("GET_ITER LOAD_ATTR LOAD_METHOD")
_SUBSCRIPTS = words("BINARY_SUBSCR BINARY_SLICE")
_ITERATING = words("enumerate zip len list tuple reversed iter range map")


def _is_for_items(steps: list[dis.Instruction], index: int) -> bool:
    """Whether the value that a step loads is iterated, subscribed or asked for an attribute."""
    ahead = steps[index + 1 : index + 5]  # a slice has a start, an end and a construction
    if any(step.opname in _OF_ITEMS for step in ahead[:1]):
        return True
    calls = [i for i, step in enumerate(ahead) if "CALL" in step.opname]
    ahead = ahead[: calls[0]] if calls else ahead
    if any(step.opname in _SUBSCRIPTS for step in ahead):
        return True
    before = steps[index - 2] if index > 1 else None
    return before is not None and before.opname == "LOAD_GLOBAL" and before.argval in _ITERATING
