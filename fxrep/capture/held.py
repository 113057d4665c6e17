"""What modules hold in plain attributes: containers, objects, arrays, and what these hold in turn.

Given: ``self.options = {"scale": 2.0}``, ``self.config.scale``, a NumPy array of anchors.

Result: all of it, recorded and compared. A deepcopy of the record holds the copies that a deepcopy
of the modules holds.
"""

from __future__ import annotations

import array
import functools
import sys
import types
import weakref
from collections import deque
from collections.abc import Iterable, Set
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from fxrep.capture.kept import is_container, values_of
from fxrep.capture.reach import is_atom, is_plain
from fxrep.capture.same import Attributes, Items, Tables, all_alike
from fxrep.ops.owner import EVERY_MODULE

FUSED = "_fxrep_fused"
"""The attribute of an island that holds its fused layers: no part of what the user's module is."""

_MOST = 20_000  # objects that are looked at


class Held:
    """What some modules hold in their attributes, as it is now.

    Args:
        modules: the modules.
        also: other objects.

    Attributes:
        tensors: the tensors held by anything but the modules themselves.
        modules: the modules that are held without being children.
        code: the functions and classes that are held.
        kinds: the classes of the objects that are held.
        is_complete: whether all was looked at.
    """

    def __init__(self, modules: Iterable[nn.Module], also: Iterable[Any] = ()) -> None:
        self.tensors: list[Tensor] = []
        self.modules: list[nn.Module] = []
        self.code: list[Any] = []
        self.things: list[Any] = []
        self.slotted: list[Any] = []
        self.arrays: list[Any] = []
        self.containers: list[Any] = []
        modules = list(modules)
        self.is_complete = self._walk(modules, also)
        self.objects = [*self.things, *self.slotted]
        self.kinds = list(map(type, self.objects))
        self.slots = [value for thing in self.slotted for value in values_of(thing)]
        self.bytes = list(map(bytes_of, self.arrays))
        self.items = Items(self.containers)
        self.tables = Tables(t for m in modules for t in (m._parameters, m._buffers))

    def watch(self, names: Set[str] | None) -> None:
        """Compare the attributes of objects from now on: those of some names, or all."""
        self.attributes = Attributes(self.things, names)

    def _walk(self, modules: Iterable[nn.Module], also: Iterable[Any]) -> bool:
        seen: dict[int, Any] = {}
        ahead: deque[Any] = deque(each for each in also if not is_atom(each))
        for module in modules:
            seen[id(module)] = module
            for name, value in vars(module).items():
                if name not in EVERY_MODULE and name != FUSED:
                    if not (is_atom(value) or isinstance(value, Tensor)):
                        ahead.append(value)
                elif isinstance(value, dict) and name not in ("_parameters", "_buffers"):
                    self.containers.append(value)  # of children and hooks
        most = len(seen) + _MOST
        while ahead and len(seen) < most:
            value = ahead.popleft()
            if id(value) not in seen:
                seen[id(value)] = value
                ahead.extend(each for each in self._visit(value) if not is_atom(each))
        return not ahead

    def _visit(self, value: Any) -> Iterable[Any]:
        """Note a value; what it holds."""
        if isinstance(value, Tensor):
            self.tensors.append(value)
        elif isinstance(value, nn.Module):
            self.modules.append(value)
        elif isinstance(value, _CODE):
            self.code.append(value)
            return (value.__self__,) if isinstance(value, types.MethodType) else ()
        elif isinstance(value, tuple | frozenset):
            return value
        elif isinstance(value, functools.partial):
            return value.func, value.args, value.keywords
        elif isinstance(value, weakref.ref):
            return (value(),)
        elif is_array(value):
            self.arrays.append(value)
        elif is_container(value) or is_plain(value):
            return self._visit_object(value)
        return ()

    def _visit_object(self, value: Any) -> Iterable[Any]:
        found = values_of(value)
        if is_container(value):
            self.containers.append(value)
            found = [*found, *(value.values() if isinstance(value, dict) else value)]
        if hasattr(value, "__dict__"):
            self.things.append(value)
        if any("__slots__" in vars(kind) for kind in type(value).__mro__):
            self.slotted.append(value)
        return found

    def same(self, *, faked: bool = False) -> bool:
        """Whether everything is what it was.

        Args:
            faked: fake tensors stand for parameters and buffers.
        """
        return (
            self.is_complete
            and self.tables.same(_is_fake if faked else None)
            and self.items.same()
            and self.attributes.same()
            and list(map(type, self.objects)) == self.kinds
            and all_alike([v for thing in self.slotted for v in values_of(thing)], self.slots)
            and list(map(bytes_of, self.arrays)) == self.bytes
        )


_CODE = (
    types.FunctionType, types.MethodType, types.BuiltinFunctionType, types.MethodWrapperType, type,
    staticmethod, classmethod, property,
)  # fmt: skip


def _is_fake(value: Any) -> bool:
    return isinstance(value, FakeTensor)


def is_array(value: Any) -> bool:
    """Whether a value holds plain elements: those of NumPy, a bytearray, an `array.array`."""
    numpy = sys.modules.get("numpy")
    is_numpy = numpy is not None and isinstance(value, numpy.ndarray) and not value.dtype.hasobject
    return is_numpy or isinstance(value, bytearray | array.array)


def bytes_of(value: Any) -> bytes:
    """The elements of such a value."""
    return bytes(value) if isinstance(value, bytearray) else value.tobytes()
