"""What the code of modules reads outside of them, and whether it is what it was.

Given: a forward that reads a global flag, an attribute of a class, ``os.environ``, a context
variable, a variable of an enclosing scope, a default argument. A graph has the values of the time
when it was made.

Result: the values, recorded and compared without a step of Python code for each. Copies of the
modules read the same values, so that a deepcopy of the record is the record.

What the comparison does not see: changes inside libraries other than the one that the modules are
written in, but for functions of torch that are replaced.
"""

from __future__ import annotations

import contextvars
import copy
import os
import types
from collections.abc import Callable, Iterable, Mapping, Set
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from fxrep.capture import namespaces
from fxrep.capture.code import mentioned, nested
from fxrep.capture.kept import default_device, is_container
from fxrep.capture.namespaces import MISSING
from fxrep.capture.reach import AnyTree, Reach
from fxrep.capture.versions import Versions

_attributes_of = attrgetter("__dict__")
_parts_of = attrgetter("__code__", "__defaults__", "__kwdefaults__", "__dict__")

# Where functions that layers and forwards call are looked up at each call.
_OF_TORCH: tuple[Mapping[str, Any], ...] = (vars(torch), vars(nn.functional), vars(Tensor))


class Outside:
    """The state that the code of some classes and functions reads, as it is now.

    Args:
        kinds: classes of modules.
        code: further functions and classes, and the objects whose methods are called.

    Attributes:
        names: the names that the code mentions.
        modules: the modules that the code reaches.
    """

    def __init__(self, kinds: Iterable[type], code: Iterable[Any] = ()) -> None:
        kinds, code = list(dict.fromkeys(kinds)), list(code)
        self._origin = kinds, code
        reach = Reach([("", each) for each in code], kinds, AnyTree(kinds))
        self.names = reach.names
        self.modules = list(reach.modules.values())
        self.versions = Versions(reach.tensors.values())
        self._record_names(reach, kinds)
        self._record_objects(reach)
        self.settings = _settings()

    def _record_names(self, reach: Reach, kinds: list[type]) -> None:
        spaces: list[tuple[Mapping[str, Any], Set[str]]]
        spaces = [(space, names & space.keys()) for space, names in reach.namespaces.values()]
        names = reach.names | {name for kind in kinds for name in _names_of_layer(kind)}
        spaces += [(space, names & space.keys()) for space in _OF_TORCH]
        self.spaces = [(space, tuple(names)) for space, names in spaces if names]
        self.values = self._named()
        self.functions = list(reach.functions.values())
        self.parts = [_parts(function) for function in self.functions]
        self.cells = list(reach.cells.values())
        self.variables = list(map(_content, self.cells))

    def _named(self) -> list[Any]:
        if not namespaces.is_idle():
            return [namespaces.read(space, name) for space, names in self.spaces for name in names]
        return [space.get(name, MISSING) for space, names in self.spaces for name in names]

    def _record_objects(self, reach: Reach) -> None:
        objects = list(reach.objects.values())
        self.containers = [each for each in objects if is_container(each)]
        self.content = list(map(copy.copy, self.containers))
        self.owners = [
            each for each in objects if hasattr(each, "__dict__") and not is_container(each)
        ]
        self.attributes = [dict(vars(each)) for each in self.owners]
        self.readers = [reader for each in objects for reader in _readers(each)]
        self.readings = [read() for read in self.readers]

    def same(self) -> bool:
        """Whether everything is what it was."""
        # Lists and dicts compare their items by identity first.
        return (
            _settings() == self.settings
            and self.versions.same()
            and self._named() == self.values
            and list(map(_parts_of, self.functions)) == self.parts
            and list(map(_attributes_of, self.owners)) == self.attributes
            and self.containers == self.content
            and list(map(_content, self.cells)) == self.variables
            and [read() for read in self.readers] == self.readings
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Outside:
        return self

    def __reduce__(self) -> Any:
        return Outside, self._origin


def _settings() -> tuple[Any, ...]:
    """Settings of torch that change the result of a call without a tensor among its arguments."""
    return torch.get_default_dtype(), default_device()


def _parts(function: types.FunctionType) -> tuple[Any, ...]:
    code, defaults, keywords, attributes = _parts_of(function)
    return code, defaults, copy.copy(keywords), copy.copy(attributes)


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return MISSING


def _names_of_layer(kind: type) -> set[str]:
    """The names that the forward of a class of torch mentions; () for any other class."""
    found: set[str] = set()
    for each in kind.__mro__:
        if each.__module__.startswith("torch.nn.") and each is not nn.Module:
            for value in vars(each).values():
                if isinstance(value, types.FunctionType) and "forward" in value.__name__:
                    found.update(
                        name for code in nested(value.__code__) for name in mentioned(code)
                    )
    return found


def _readers(value: Any) -> list[Callable[[], Any]]:
    """Functions that read the state of an object that is neither its attributes nor its items."""
    if isinstance(value, contextvars.ContextVar):
        return [lambda: value.get(MISSING)]
    if value is os.environ:
        return [lambda: value.copy()]
    if isinstance(value, bytearray) or hasattr(value, "tobytes"):
        return [lambda: bytes(value) if isinstance(value, bytearray) else value.tobytes()]
    return []
