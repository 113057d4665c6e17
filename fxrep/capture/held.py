"""What modules hold in plain attributes: containers, objects, arrays, and what these hold in turn.

Given: ``self.options = {"scale": 2.0}``, ``self.config.scale``, a NumPy array of anchors.

Result: all of it, recorded and compared without a step of Python code for each item. A deepcopy of
the record holds the copies that a deepcopy of the modules holds.
"""

from __future__ import annotations

import array
import copy
import functools
import sys
import types
from collections import deque
from collections.abc import Iterable
from operator import attrgetter
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from fxrep.capture.kept import is_container, values_of
from fxrep.capture.reach import is_atom, is_plain
from fxrep.ops.owner import EVERY_MODULE

FUSED = "_fxrep_fused"
"""The attribute of an island that holds its fused layers: no part of what the user's module is."""

_MOST = 2000  # objects; the nearest first

_attributes_of = attrgetter("__dict__")


class Held:
    """What some modules hold in their attributes, as it is now.

    Args:
        modules: the modules.

    Attributes:
        tensors: the tensors held by anything but the modules themselves.
        modules: the modules that are held without being children.
        code: the functions and classes that are held.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.tensors: list[Tensor] = []
        self.modules: list[nn.Module] = []
        self.code: list[Any] = []
        self.things: list[Any] = []
        self.slotted: list[Any] = []
        self.arrays: list[Any] = []
        self._containers: list[Any] = []
        self._walk(modules)
        self.kinds = list(map(type, (*self.things, *self.slotted)))
        self.attributes = [copy.copy(vars(thing)) for thing in self.things]
        self.slots = list(map(values_of, self.slotted))
        self.bytes = list(map(_bytes, self.arrays))
        self.empty = [each for each in self._containers if not each]
        self.filled = [each for each in self._containers if each]
        self.content = [copy.copy(each) for each in self.filled]

    def _walk(self, modules: Iterable[nn.Module]) -> None:
        seen: dict[int, Any] = {}
        ahead: deque[Any] = deque()
        for module in modules:
            seen[id(module)] = module
            for name, value in vars(module).items():
                if name not in EVERY_MODULE and name != FUSED:
                    if not (is_atom(value) or isinstance(value, Tensor)):
                        ahead.append(value)
                elif isinstance(value, dict) and name != FUSED:
                    self._containers.append(value)  # of tensors, children, hooks
        while ahead and len(seen) < _MOST:
            value = ahead.popleft()
            if id(value) not in seen:
                seen[id(value)] = value
                ahead.extend(each for each in self._visit(value) if not is_atom(each))

    def _visit(self, value: Any) -> Iterable[Any]:
        """Note a value; what it holds."""
        if isinstance(value, Tensor):
            self.tensors.append(value)
        elif isinstance(value, nn.Module):
            self.modules.append(value)
        elif isinstance(value, _CODE):
            self.code.append(value)
            return (value.__self__,) if isinstance(value, types.MethodType) else ()
        elif is_container(value):
            self._containers.append(value)
            return list(value.values() if isinstance(value, dict) else value)
        elif isinstance(value, tuple | frozenset):
            return value
        elif _is_array(value):
            self.arrays.append(value)
        elif isinstance(value, functools.partial):
            return value.func, value.args, value.keywords
        elif is_plain(value):
            found = values_of(value)
            if hasattr(value, "__dict__"):
                self.things.append(value)
            elif found:
                self.slotted.append(value)
            return found
        return ()

    def same(self, *, faked: bool = False) -> bool:
        """Whether everything is what it was.

        Args:
            faked: fake tensors stand for the tensors in containers.
        """
        # Lists and dicts compare their items by identity first.
        return (
            not any(self.empty)
            and (self.filled == self.content if not faked else self._same_but_for_fakes())
            and list(map(_attributes_of, self.things)) == self.attributes
            and list(map(type, (*self.things, *self.slotted))) == self.kinds
            and list(map(values_of, self.slotted)) == self.slots
            and list(map(_bytes, self.arrays)) == self.bytes
        )

    def _same_but_for_fakes(self) -> bool:
        for container, saved in zip(self.filled, self.content, strict=True):
            if isinstance(container, dict):
                fakes = {k: saved.get(k) for k, v in container.items() if isinstance(v, FakeTensor)}
                container = {**container, **fakes}
            if container != saved:
                return False
        return True


_CODE = (
    types.FunctionType, types.MethodType, types.BuiltinFunctionType, types.MethodWrapperType, type,
    staticmethod, classmethod, property,
)  # fmt: skip


def _is_array(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    is_numpy = numpy is not None and isinstance(value, numpy.ndarray) and not value.dtype.hasobject
    return is_numpy or isinstance(value, bytearray | array.array)


def _bytes(value: Any) -> bytes:
    return bytes(value) if isinstance(value, bytearray) else value.tobytes()
