"""State that a forward may write: recorded, compared, and put back in place.

Each class here knows one kind of state. An object stays the same object; only its content is
restored, so that whoever else refers to it sees it as it was.
"""

from __future__ import annotations

import array
import collections
import contextvars
import ctypes
import functools
import gc
import operator
import os
import random
import sys
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from fxrep.capture import namespaces
from fxrep.capture.namespaces import MISSING


class Kept(Protocol):
    """A piece of state as it was when it was recorded.

    Attributes:
        what: the state, as the end of "forward writes ...".
    """

    what: str

    def changed(self) -> bool:
        """Whether the state is another now."""

    def restore(self) -> None:
        """Make the state what it was."""


def _identical(now: Sequence[Any], before: Sequence[Any]) -> bool:
    return len(now) == len(before) and all(map(operator.is_, now, before))


# --- containers ---------------------------------------------------------------------------------

# Their own methods, so that those of a subclass do not run.
_BASES: tuple[Any, ...] = (collections.OrderedDict, dict, list, set, collections.deque)


def is_container(value: object) -> bool:
    """Whether `Items` can keep the content of a value."""
    return isinstance(value, _BASES)


class Items:
    """The items of a dict, list, set or deque."""

    def __init__(self, container: Any) -> None:
        self.container = container
        self.base = next(base for base in _BASES if isinstance(container, base))
        self.is_mapping = isinstance(container, dict)
        self.keys, self.values = self._content()
        self.what = f"into a {type(container).__name__} the module keeps"

    def _content(self) -> tuple[list[Any], list[Any]]:
        if self.is_mapping:
            return list(self.base.keys(self.container)), list(self.base.values(self.container))
        return [], list(self.base.__iter__(self.container))

    @property
    def began_empty(self) -> bool:
        """Whether it had no items."""
        return not self.values

    def changed(self) -> bool:
        """Whether an item was added, removed, replaced or moved."""
        keys, values = self._content()
        return not (_identical(values, self.values) and _identical(keys, self.keys))

    def restore(self) -> None:
        """Put the items back in their order."""
        self.base.clear(self.container)
        if self.is_mapping:
            self.base.update(self.container, zip(self.keys, self.values, strict=True))
        elif self.base is set:
            self.base.update(self.container, self.values)
        else:
            self.base.extend(self.container, self.values)

    def new_values(self) -> list[Any] | None:
        """The values of new keys of a dict; None if anything else has changed."""
        if not self.is_mapping:
            return None
        now = dict(zip(*self._content(), strict=True))
        for key, value in zip(self.keys, self.values, strict=True):
            if now.pop(key, MISSING) is not value:
                return None
        return list(now.values())


class Bytes:
    """The elements of a bytearray, an `array.array`, a NumPy array or a C value."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self.saved = self._content()
        self.what = f"into a {type(value).__name__} the module keeps"

    def _content(self) -> Any:
        if isinstance(self.value, bytearray | array.array):
            return self.value[:]
        return self.value.copy() if hasattr(self.value, "copy") else bytes(self.value)

    def changed(self) -> bool:
        """Whether a bit differs."""
        now, before = self._content(), self.saved
        if hasattr(now, "tobytes"):
            shapes = [getattr(each, "shape", None) for each in (now, before)]
            return bool(shapes[0] != shapes[1] or now.tobytes() != before.tobytes())
        return bool(now != before)

    def restore(self) -> None:
        """Write the old elements."""
        if isinstance(self.saved, bytes):
            memoryview(self.value).cast("B")[:] = self.saved
        elif getattr(self.value, "shape", None) == ():
            self.value[()] = self.saved
        else:
            self.value[:] = self.saved


class TensorContent:
    """The elements of a tensor, in a copy."""

    what = "into a tensor of the model"

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.saved = tensor, tensor.detach().clone()
        self.version = 0 if tensor.is_inference() else tensor._version

    def counted(self) -> bool:
        """Whether torch has counted a write: a question that costs nothing."""
        return not self.tensor.is_inference() and self.tensor._version != self.version

    def changed(self) -> bool:
        """Whether an element was written."""
        if self.counted():
            return True
        with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
            now, before = self.tensor.detach(), self.saved
            if now.shape != before.shape:
                return True
            # Nearly always equal as it is, without the two copies; NaN equals nothing.
            return not torch.equal(now, before) and not torch.equal(
                now.nan_to_num(), before.nan_to_num()
            )

    def restore(self) -> None:
        """Write the old elements, and take back the count of writes."""
        with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction(), torch.no_grad():
            if self.tensor.shape != self.saved.shape:
                self.tensor.data = self.saved
            self.tensor.copy_(self.saved)
            if not self.tensor.is_inference():
                torch._C._autograd._unsafe_set_version_counter((self.tensor,), (self.version,))


# --- objects, classes, names --------------------------------------------------------------------


class Attributes:
    """The attributes of a plain object, in its `__dict__` and its slots, and its class."""

    def __init__(self, thing: Any) -> None:
        self.thing, self.kind = thing, type(thing)
        self.slots = [
            (kind.__dict__[name], kind.__dict__[name].__get__(thing, kind))
            for kind, name in filled_slots(thing)
        ]
        self.own = _own(thing)
        self.what = f"an attribute of a {self.kind.__name__}"

    def changed(self) -> bool:
        """Whether an attribute was set or deleted."""
        if type(self.thing) is not self.kind:
            return True
        now = _own(self.thing)
        if not (
            _identical([*now.values()], [*self.own.values()]) and now.keys() == self.own.keys()
        ):
            return True
        return any(_slot(slot, self.thing) is not value for slot, value in self.slots) or (
            len(list(filled_slots(self.thing))) != len(self.slots)
        )

    def restore(self) -> None:
        """Set what was set or deleted, delete what was added."""
        if type(self.thing) is not self.kind:
            object.__setattr__(self.thing, "__class__", self.kind)
        if hasattr(self.thing, "__dict__"):
            own = vars(self.thing)
            for name in _own(self.thing).keys() - self.own.keys():
                del own[name]
            own.update(self.own)
        known = {id(slot) for slot, _ in self.slots}
        for kind, name in list(filled_slots(self.thing)):
            if id(kind.__dict__[name]) not in known:
                kind.__dict__[name].__delete__(self.thing)
        for slot, value in self.slots:
            slot.__set__(self.thing, value)


def _own(thing: Any) -> dict[str, Any]:
    own = dict(getattr(thing, "__dict__", ()))
    if isinstance(thing, nn.Module):
        own.pop("_compiled_call_impl", None)  # the tracer's, in `fxrep.capture.hollow`
    return own


def filled_slots(thing: Any) -> list[tuple[type, str]]:
    """The slots of an object that hold a value, each with the class that declares it."""
    return [
        (kind, name)
        for kind in type(thing).__mro__
        if "__slots__" in kind.__dict__
        for name, slot in kind.__dict__.items()
        if isinstance(slot, types.MemberDescriptorType) and _slot(slot, thing) is not MISSING
    ]


def _slot(slot: Any, thing: Any) -> Any:
    try:
        return slot.__get__(thing, type(thing))
    except AttributeError:
        return MISSING


def values_of(thing: Any) -> list[Any]:
    """What a plain object holds in its attributes."""
    slots = [_slot(kind.__dict__[name], thing) for kind, name in filled_slots(thing)]
    return [*_own(thing).values(), *slots]


class ClassAttributes:
    """The attributes of a class."""

    def __init__(self, kind: type) -> None:
        self.kind, self.saved = kind, self._content(kind)
        self.what = f"an attribute of the class {kind.__name__}"

    @staticmethod
    def _content(kind: type) -> dict[str, Any]:
        lazy = ("__annotations__", "__annotations_cache__", "__doc__", "__dict__", "__weakref__")
        return {name: value for name, value in vars(kind).items() if name not in lazy}

    def changed(self) -> bool:
        """Whether an attribute was set or deleted."""
        now = self._content(self.kind)
        return not (
            _identical([*now.values()], [*self.saved.values()]) and now.keys() == self.saved.keys()
        )

    def restore(self) -> None:
        """Set what was set or deleted, delete what was added."""
        now = self._content(self.kind)
        for name in now.keys() - self.saved.keys():
            type.__delattr__(self.kind, name)
        for name, value in self.saved.items():
            if now.get(name, MISSING) is not value:
                type.__setattr__(self.kind, name, value)


class Names:
    """Some global names of a Python module."""

    what = "a global name"

    def __init__(self, namespace: dict[str, Any], names: Iterable[str]) -> None:
        self.namespace = namespace
        self.saved = {name: namespaces.read(namespace, name) for name in names}

    def written(self) -> list[str]:
        """The names that were set or deleted."""
        has, namespace = namespaces.has, self.namespace
        return [name for name, value in self.saved.items() if not has(namespace, name, value)]

    def changed(self) -> bool:
        """Whether a name was set or deleted."""
        return bool(self.written())

    def restore(self) -> None:
        """Set what was set or deleted, delete what was added."""
        for name in self.written():
            namespaces.write(self.namespace, name, self.saved[name])


def cell_content(cell: types.CellType) -> Any:
    """The value of a variable of an enclosing scope; MISSING if it has none."""
    try:
        return cell.cell_contents
    except ValueError:
        return MISSING


class Cell:
    """A variable that functions share with the scope in which they were made."""

    what = "a variable of an enclosing scope"

    def __init__(self, cell: types.CellType) -> None:
        self.cell, self.saved = cell, cell_content(cell)

    def changed(self) -> bool:
        """Whether the variable was set."""
        return cell_content(self.cell) is not self.saved

    def restore(self) -> None:
        """Set the variable to what it was."""
        if self.saved is not MISSING:
            self.cell.cell_contents = self.saved
        elif self.changed():
            del self.cell.cell_contents


# --- state that is read and set by functions ----------------------------------------------------


class Setting:
    """State that one function reads and another one sets."""

    def __init__(self, what: str, read: Callable[[], Any], write: Callable[[Any], Any]) -> None:
        self.what, self.read, self.write = what, read, write
        self.saved = read()

    def changed(self) -> bool:
        """Whether a read gives another value."""
        return not _equal(self.read(), self.saved)

    def restore(self) -> None:
        """Set the value."""
        self.write(self.saved)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        with torch._C._DisableTorchDispatch():
            return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if hasattr(a, "tobytes"):
        return bool(a.tobytes() == b.tobytes())
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b)


@dataclass
class Cached:
    """The cache of a function (`functools.lru_cache`). How often it was read does not count."""

    function: Any

    def __post_init__(self) -> None:
        self.saved = self.function.cache_info()
        self.table = _table(self.function)
        self.results = None if self.table is None else dict(self.table)
        self.what = f"the cache of {getattr(self.function, '__name__', 'a function')}()"

    def changed(self) -> bool:
        """Whether a result was stored or dropped."""
        now = self.function.cache_info()
        return bool((now.misses, now.currsize) != (self.saved.misses, self.saved.currsize))

    def new_values(self) -> list[Any] | None:
        """The new results and what they are results of; None if they are not certain."""
        if self.table is None or self.results is None:
            return None
        added = [(key, value) for key, value in self.table.items() if key not in self.results]
        return tree_leaves([(list(k) if isinstance(k, list) else k, v) for k, v in added])

    def restore(self) -> None:
        """Take out the results that were stored: none of a traced forward may stay."""
        if self.table is None or self.results is None:
            self.function.cache_clear()
            self.saved = self.function.cache_info()
            return
        for key in [key for key in self.table if key not in self.results]:
            del self.table[key]
        self.saved = self.function.cache_info()


def _table(function: Any) -> dict[Any, Any] | None:
    """The results that a cache holds, by key; None if they are not certain."""
    size = function.cache_info().currsize
    tables = [each for each in gc.get_referents(function) if type(each) is dict]
    found = [each for each in tables if each is not vars(function) and len(each) == size]
    return found[0] if len(found) == 1 else None


class Drawing(Setting):
    """The state of a generator of random numbers.

    A forward may seed a generator that is in the very state to which the seed leads. To be found
    nevertheless, it is given another state as long as a forward is traced.

    Args:
        read: gives the state.
        write: sets it.
        another: gives a state to which no seed of anybody's leads.
    """

    def __init__(
        self, read: Callable[[], Any], write: Callable[[Any], Any], another: Callable[[], Any]
    ) -> None:
        super().__init__("the state of a generator of random numbers", read, write)
        self.before, self.another = self.saved, another

    def disturb(self) -> None:
        """Give it another state, which `restore` takes for the old one until `calm` is called."""
        self.saved = self.another()
        self.write(self.saved)

    def calm(self) -> None:
        """Give it back its own state. A second call changes nothing."""
        if self.saved is not self.before:
            self.write(self.before)
            self.saved = self.before


def drawing(generator: Any) -> Kept | None:
    """The state of a generator of random numbers; None for any other object."""
    if isinstance(generator, torch.Generator):
        read = lambda: _torch_state(generator)  # noqa: E731
        return Drawing(read, generator.set_state, lambda: _another_torch_state(generator))
    if isinstance(generator, random.SystemRandom):
        return None  # it has no state
    if isinstance(generator, random.Random):
        return Drawing(generator.getstate, generator.setstate, random.Random().getstate)
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return None
    if isinstance(generator, numpy.random.RandomState | numpy.random.Generator):
        generator = generator._bit_generator
    if isinstance(generator, numpy.random.BitGenerator):
        bits = generator
        write = lambda state: setattr(bits, "state", state)  # noqa: E731
        return Drawing(lambda: bits.state, write, lambda: type(bits)().state)
    return None


def _another_torch_state(generator: torch.Generator) -> torch.Tensor:
    with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
        another = torch.Generator(generator.device)
        another.seed()
        return another.get_state()


def _torch_state(generator: torch.Generator) -> torch.Tensor:
    with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
        return generator.get_state()


def in_context(variable: contextvars.ContextVar[Any]) -> Kept:
    """The value of a context variable. One without a value belongs to the trace's own context."""
    what = f"the context variable '{variable.name}'"
    return Setting(
        what,
        lambda: (variable.get(MISSING),),
        lambda saved: None if saved[0] is MISSING else variable.set(saved[0]),
    )


def _set_environment(variables: dict[str, str]) -> None:
    for name in os.environ.keys() - variables.keys():
        del os.environ[name]
    os.environ.update(variables)


def kept(value: Any) -> Kept | None:
    """The state of one object; None if it has none that can be recorded."""
    if isinstance(value, type):
        return ClassAttributes(value)
    if is_container(value):
        return Items(value)
    if isinstance(value, contextvars.ContextVar):
        return in_context(value)
    if value is os.environ:
        return Setting("a variable of the environment", lambda: dict(os.environ), _set_environment)
    if isinstance(value, functools._lru_cache_wrapper):
        return Cached(value)
    numpy = sys.modules.get("numpy")
    is_array = numpy is not None and isinstance(value, numpy.ndarray)
    if is_array and (value.dtype.hasobject or not value.flags.writeable):
        return None
    if is_array or isinstance(value, bytearray | array.array | ctypes._SimpleCData):
        return Bytes(value)
    return drawing(value) or Attributes(value)
