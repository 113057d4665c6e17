"""What a piece of Python code mentions, read from its bytecode.

A forward that does not trace stays Python code: what it reads by name must stay where it is.
"""

from __future__ import annotations

import dis
import inspect
import sys
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True)
class Mentions:
    """The attribute names a piece of Python code mentions, and how it uses those of `self`."""

    elsewhere: frozenset[str]  # attributes of anything but self, and string constants
    own: frozenset[str]  # attributes read from self
    calls: frozenset[str]  # self.NAME(...)
    others: frozenset[str]  # self.NAME used in any other way

    @classmethod
    def of_forward(cls, module: nn.Module) -> Mentions:
        """What a module's forward and the functions it uses mention."""
        own = module.__dict__.get("forward")
        start = own if own is not None else type(module).forward
        kinds = {type(m): None for m in module.modules() if not is_leaf(m)}
        return cls._scan([start], type(module), list(kinds))

    @classmethod
    def of_hooks(cls, hooks: Sequence[Any]) -> Mentions:
        """What hooks mention."""
        return cls._scan(list(hooks), type(None), [])

    @classmethod
    def _scan(cls, start: list[Any], owner: type, below: list[type]) -> Mentions:
        elsewhere: set[str] = set()
        own: set[str] = set()
        calls: set[str] = set()
        others: set[str] = set()
        for code, is_own in _reached(start, owner, below):
            first = code.co_varnames[0] if code.co_argcount else None
            previous: dis.Instruction | None = None
            for step in dis.get_instructions(code):
                if step.opname in _LOADS:
                    name = str(step.argval)
                    if is_own and _loads(previous, first):
                        own.add(name)
                        (calls if _is_call(step) else others).add(name)
                    else:
                        elsewhere.add(name)
                previous = step
            elsewhere.update(c for c in code.co_consts if isinstance(c, str) and c.isidentifier())
        return cls(frozenset(elsewhere), frozenset(own), frozenset(calls), frozenset(others))

    def weights(self, module: nn.Module | None) -> str:
        """The weight-like names mentioned, but for the module's own parameters."""
        found = set(self.elsewhere & _WEIGHTS)
        for name in self.own & _WEIGHTS:
            if module is None or (name not in module._parameters and name not in module._buffers):
                found.add(name)
        return ", ".join(f"'{name}'" for name in sorted(found))

    def use(self, name: str) -> str:
        """How the code uses its child `name`: called as a whole, by items, or both."""
        if name in self.elsewhere or (name not in self.calls and name not in self.others):
            return "unknown"
        if name not in self.others:
            return "whole"
        return "both" if name in self.calls else "items"

    def reaches(self, island: nn.Module) -> bool:
        """Whether the code may read the island's own submodules."""
        names = {part for path, _ in island.named_modules() for part in path.split(".") if path}
        return bool(_TREE & (self.elsewhere | self.own)) or any(n in self.elsewhere for n in names)


def _reached(
    start: list[Any], owner: type, below: list[type]
) -> Iterator[tuple[types.CodeType, bool]]:
    """All code that may run, and whether it is a method's of `owner`."""
    stack = [(entry, True) for thing in start for entry in _functions(thing)]
    seen: set[types.CodeType] = set()
    while stack:
        function, is_own = stack.pop()
        for code in _codes(function.__code__):
            if code in seen:
                continue
            seen.add(code)
            yield code, is_own
            for name in code.co_names:
                mine = inspect.getattr_static(owner, name, None)
                stack.extend((entry, is_own) for entry in _functions(mine))
                other = [inspect.getattr_static(k, name, None) for k in below if name != "forward"]
                other.append(function.__globals__.get(name))
                stack.extend((entry, False) for value in other for entry in _functions(value))


def _functions(thing: object) -> list[types.FunctionType]:
    """The Python functions behind a callable, but for torch's own."""
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


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _loads(step: dis.Instruction | None, name: str | None) -> bool:
    return step is not None and step.opname.startswith("LOAD_FAST") and step.argval == name


def _is_call(step: dis.Instruction) -> bool:
    if step.opname == "LOAD_METHOD":
        return True
    return sys.version_info >= (3, 12) and step.opname == "LOAD_ATTR" and bool((step.arg or 0) & 1)
