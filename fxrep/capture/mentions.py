"""The attribute names that Python code mentions, read from its bytecode.

A forward that does not trace stays Python code: the submodules and weights that it reads by name
must stay where they are.
"""

from __future__ import annotations

import dis
import inspect
import sys
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from fxrep.ops.owner import is_leaf
from fxrep.words import words

_WEIGHTS = words(
    "weight bias running_mean running_var num_batches_tracked state_dict load_state_dict "
    "parameters named_parameters buffers named_buffers _parameters _buffers get_parameter "
    "get_buffer modules named_modules"
)

_TREE = words("modules named_modules children named_children _modules get_submodule")

_LOADS = ("LOAD_ATTR", "LOAD_METHOD", "STORE_ATTR", "DELETE_ATTR", "LOAD_SUPER_ATTR")


# How Python code uses a child module: it calls the child as a whole, its items, or both.
Use = Literal["whole", "items", "both", "unknown"]


@dataclass(frozen=True)
class Mentions:
    """The attribute names that Python code mentions, and how it uses the attributes of `self`.

    Attributes:
        elsewhere: attributes of any object but self, and string constants.
        own: attributes of self.
        called: those that are called: ``self.NAME(...)``.
        used_otherwise: those that are used in another way: ``for block in self.NAME``.
    """

    elsewhere: frozenset[str]
    own: frozenset[str]
    called: frozenset[str]
    used_otherwise: frozenset[str]

    @classmethod
    def of_forward(cls, module: nn.Module) -> Mentions:
        """The mentions of a module's forward and of the functions it uses."""
        own = module.__dict__.get("forward")
        start = own if own is not None else type(module).forward
        kinds = {type(m): None for m in module.modules() if not is_leaf(m)}
        return cls._scan([start], type(module), list(kinds))

    @classmethod
    def of_hooks(cls, hooks: Sequence[Any]) -> Mentions:
        """The mentions of hooks."""
        return cls._scan(list(hooks), type(None), [])

    @classmethod
    def _scan(cls, start: list[Any], owner: type, below: list[type]) -> Mentions:
        elsewhere: set[str] = set()
        own: set[str] = set()
        called: set[str] = set()
        used_otherwise: set[str] = set()
        for code, is_own in _reachable_code(start, owner, below):
            first = code.co_varnames[0] if code.co_argcount else None
            previous: dis.Instruction | None = None
            for step in dis.get_instructions(code):
                if step.opname in _LOADS:
                    name = str(step.argval)
                    if is_own and _loads_variable(previous, first):
                        own.add(name)
                        (called if _is_call(step) else used_otherwise).add(name)
                    else:
                        elsewhere.add(name)
                previous = step
            elsewhere.update(c for c in code.co_consts if isinstance(c, str) and c.isidentifier())
        return cls(*map(frozenset, (elsewhere, own, called, used_otherwise)))

    def weights(self, module: nn.Module | None) -> str:
        """The names of weights that are mentioned, without the module's own; "" for none."""
        found = set(self.elsewhere & _WEIGHTS)
        for name in self.own & _WEIGHTS:
            if module is None or (name not in module._parameters and name not in module._buffers):
                found.add(name)
        return ", ".join(f"'{name}'" for name in sorted(found))

    def use_of(self, child: str) -> Use:
        """How the code uses a child of its module."""
        called, used_otherwise = child in self.called, child in self.used_otherwise
        if child in self.elsewhere or not (called or used_otherwise):
            return "unknown"
        if not used_otherwise:
            return "whole"
        return "both" if called else "items"

    def reaches(self, island: nn.Module) -> bool:
        """Whether the code may read the island's own submodules."""
        names = {part for path, _ in island.named_modules() for part in path.split(".") if path}
        return bool(_TREE & (self.elsewhere | self.own)) or any(n in self.elsewhere for n in names)


def _reachable_code(
    start: list[Any], owner: type, below: list[type]
) -> Iterator[tuple[types.CodeType, bool]]:
    """All code that may run from the functions in `start`.

    Args:
        start: functions that have an `owner` for self.
        owner: the class of self; its methods are followed by name.
        below: classes of submodules; their methods are followed by name too.

    Yields:
        Code, and whether its self is the owner.
    """
    stack = [(entry, True) for thing in start for entry in _python_functions(thing)]
    seen: set[types.CodeType] = set()
    while stack:
        function, is_own = stack.pop()
        for code in _with_nested(function.__code__):
            if code in seen:
                continue
            seen.add(code)
            yield code, is_own
            for name in code.co_names:
                mine = inspect.getattr_static(owner, name, None)
                stack.extend((entry, is_own) for entry in _python_functions(mine))
                other = [inspect.getattr_static(k, name, None) for k in below if name != "forward"]
                other.append(function.__globals__.get(name))
                stack.extend((f, False) for value in other for f in _python_functions(value))


def _python_functions(thing: object) -> list[types.FunctionType]:
    """The Python functions behind a callable or property, without those of torch."""
    if isinstance(thing, property):
        return [f for f in (thing.fget, thing.fset) if isinstance(f, types.FunctionType)]
    thing = getattr(thing, "__func__", thing)
    if isinstance(thing, types.FunctionType):
        found = inspect.unwrap(thing)
    else:
        if isinstance(thing, type) or not callable(thing):
            return []
        found = inspect.getattr_static(type(thing), "__call__", None)
    if not isinstance(found, types.FunctionType):
        return []
    home = found.__module__ or ""
    return [] if home == "torch" or home.startswith("torch.") else [found]


def _with_nested(code: types.CodeType) -> Iterator[types.CodeType]:
    """The code, and that of the functions and comprehensions inside."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _with_nested(constant)


def _loads_variable(step: dis.Instruction | None, name: str | None) -> bool:
    return step is not None and step.opname.startswith("LOAD_FAST") and step.argval == name


def _is_call(step: dis.Instruction) -> bool:
    if step.opname == "LOAD_METHOD":
        return True
    return sys.version_info >= (3, 12) and step.opname == "LOAD_ATTR" and bool((step.arg or 0) & 1)
