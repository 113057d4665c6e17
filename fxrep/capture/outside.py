"""What the code of modules reads outside of them, and whether it is what it was.

Given: a forward that reads a global flag, an attribute of a class, ``os.environ``, a context
variable, a variable of an enclosing scope, a default argument. A graph has the values of the time
when it was made.

Result: the values, recorded and compared. Copies of the modules read the same values, so that a
deepcopy of the record is the record. A pickle holds the constants among the values: where it is
loaded, they may be others.

What the comparison does not see: changes inside libraries other than the one that the modules are
written in, but for functions of torch that are replaced.
"""

from __future__ import annotations

import contextvars
import os
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Set
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from fxrep.capture import namespaces
from fxrep.capture.code import Key, mentioned, nested
from fxrep.capture.held import bytes_of, is_array
from fxrep.capture.kept import cell_content, filled_slots, is_container, values_of
from fxrep.capture.namespaces import MISSING
from fxrep.capture.reach import AnyTree, Reach, is_atom
from fxrep.capture.same import Attributes, Items, all_alike
from fxrep.capture.settings import default_device
from fxrep.capture.versions import Versions
from fxrep.ops.owner import EVERY_MODULE

_parts_of = attrgetter("__code__", "__defaults__", "__kwdefaults__", "__dict__")

# Where functions that layers and forwards call are looked up at each call.
_OF_TORCH: tuple[Mapping[str, Any], ...] = (vars(torch), vars(nn.functional), vars(Tensor))

# By these, code reads attributes that it does not name.
_BY_TEXT = frozenset({"getattr", "vars", "__dict__", "asdict", "attrgetter", "__getattribute__"})

_MOST = 20_000  # objects that are looked at

# Constants by their places: a Python module or class, and a name.
_Constants = list[tuple[Any, str, Any]]


class Outside:
    """The state that the code of some classes and functions reads, as it is now.

    Args:
        kinds: classes of modules, and of objects that modules hold.
        code: further functions and classes.
        ran: the code that ran, by `fxrep.capture.code.key`; None if any may have run.

    Attributes:
        names: of the attributes that the code reads; None if it may read any.
        modules: the modules that the code reaches.
    """

    def __init__(
        self,
        kinds: Iterable[type],
        code: Iterable[Any] = (),
        ran: frozenset[Key] | None = None,
    ) -> None:
        kinds, code = list(dict.fromkeys(kinds)), list(code)
        self._origin = kinds, code, ran
        values = [("", each) for each in code]
        reach = Reach(values, kinds, AnyTree(kinds), _MOST, ran)
        if ran is not None and reach.starts_threads:  # what other threads ran is not known
            reach = Reach(values, kinds, AnyTree(kinds), _MOST, None)
        self.is_complete = reach.is_complete
        of_layers = {name for kind in kinds for name in _names_of_layer(kind)}
        known = reach.names | of_layers | EVERY_MODULE
        self.names = None if reach.names & _BY_TEXT else known
        self.modules = list(reach.modules.values())
        self.versions = Versions(reach.tensors.values())
        self._record_names(reach, reach.names | of_layers)
        self._record_objects(reach)
        self.settings = _settings()

    def _record_names(self, reach: Reach, names: Set[str]) -> None:
        self.spaces = [(s, tuple(n & s.keys())) for s, n in reach.namespaces.values()]
        self.values = _named(self.spaces)
        self.of_torch = [(space, tuple(names & space.keys())) for space in _OF_TORCH]
        self.values_of_torch = _named(self.of_torch)
        self.functions = list(reach.functions.values())
        self.parts = _parts(self.functions)
        self.cells = list(reach.cells.values())

    def _record_objects(self, reach: Reach) -> None:
        objects = list(reach.objects.values())
        tables = [each.__kwdefaults__ for each in self.functions if each.__kwdefaults__]
        self.items = Items([*filter(is_container, objects), *tables])
        holders = [*objects, *self.functions]
        self.attributes = Attributes((o for o in holders if hasattr(o, "__dict__")), self.names)
        self.slotted = [o for o in objects if any(True for _ in filled_slots(o))]
        self.slots = self._slots()
        self.contexts = [o for o in objects if isinstance(o, contextvars.ContextVar)]
        self.variables = self._variables()
        self.readers = [reader for each in objects for reader in _readers(each)]
        self.readings = [read() for read in self.readers]

    def _slots(self) -> list[Any]:
        return [value for thing in self.slotted for value in values_of(thing)]

    def _variables(self) -> list[Any]:
        """The values of variables of enclosing scopes and of contexts."""
        return [*map(cell_content, self.cells), *(each.get(MISSING) for each in self.contexts)]

    def same(self, *, exported: bool = False) -> bool:
        """Whether everything is what it was.

        Args:
            exported: torch.export runs, which replaces functions of torch.
        """
        return (
            self.is_complete
            and _settings() == self.settings
            and self.versions.same()
            and all_alike(_named(self.spaces), self.values)
            and (exported or all_alike(_named(self.of_torch), self.values_of_torch))
            and all_alike(_parts(self.functions), self.parts)
            and self.attributes.same()
            and all_alike(self._slots(), self.slots)
            and self.items.same()
            and all_alike(self._variables(), self.variables)
            and [read() for read in self.readers] == self.readings
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Outside:
        return self

    def __reduce__(self) -> Any:
        return _loaded, (*self._origin, self._constants())

    def _constants(self) -> _Constants:
        """The values that a pickle can hold."""
        found: _Constants = []
        names = ((space, name) for space, names in self.spaces for name in names)
        for (space, name), value in zip(names, self.values, strict=True):
            home = str(space.get("__name__"))
            if is_atom(value) and vars(sys.modules.get(home, types)) is space:
                found.append((home, name, value))
        for owner, attributes in zip(self.attributes.owners, self.attributes.saved, strict=True):
            if isinstance(owner, type):
                found += [(owner, n, v) for n, v in attributes.items() if _is_constant(n, v)]
        return found

    def _have(self, constants: _Constants) -> bool:
        """Whether constants are what they were."""
        for home, name, value in constants:
            space = vars(home) if isinstance(home, type) else vars(sys.modules.get(home, types))
            relevant = self.names is None or name in self.names or not isinstance(home, type)
            if relevant and not all_alike([space.get(name, MISSING)], [value]):
                return False
        return True


def _is_constant(name: str, value: Any) -> bool:
    return is_atom(value) and not name.startswith("__")


def _loaded(
    kinds: list[type], code: list[Any], ran: frozenset[Key] | None, constants: _Constants
) -> Outside:
    """The record of a pickle; pickles name this function."""
    made = Outside(kinds, code, ran)
    made.is_complete = made.is_complete and made._have(constants)
    return made


def _settings() -> tuple[Any, ...]:
    """Settings of torch that change the result of a call without a tensor among its arguments."""
    return torch.get_default_dtype(), default_device()


def _named(spaces: list[tuple[Any, tuple[str, ...]]]) -> list[Any]:
    if not namespaces.is_idle():
        return [namespaces.read(space, name) for space, names in spaces for name in names]
    return [space.get(name, MISSING) for space, names in spaces for name in names]


def _parts(functions: list[types.FunctionType]) -> list[Any]:
    return [part for function in functions for part in _parts_of(function)]


def _names_of_layer(kind: type) -> set[str]:
    """The names that the methods of a class of torch mention; () for any other class."""
    found: set[str] = set()
    for each in kind.__mro__:
        if each.__module__.startswith("torch.nn.") and each is not nn.Module:
            for value in vars(each).values():
                if isinstance(value, types.FunctionType):
                    found.update(*map(mentioned, nested(value.__code__)))
    return found - _BY_TEXT


def _readers(value: Any) -> list[Callable[[], Any]]:
    """Functions that read the state of an object that is neither its attributes nor its items."""
    if value is os.environ:
        return [lambda: value.copy()]
    if is_array(value):
        return [lambda: bytes_of(value)]
    if getattr(getattr(value, "dtype", None), "hasobject", False):
        return [lambda: list(map(id, value.flat))]
    return []
