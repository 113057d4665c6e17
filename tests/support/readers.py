"""State that the forward of a block reads, and that other code changes: one member for each place.

A member is a block, whose result is scaled by what `scale(block)` reads, and a function that sets
the scale and gives the function that sets it back.
"""

from __future__ import annotations

import argparse
import collections
import contextvars
import functools
import os
import threading
import types
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support import settings

Undo = Callable[[], None]


class Block(nn.Module):
    """Conv and BatchNorm, scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.bn = nn.BatchNorm2d(4)
        self.made()

    def made(self) -> None:
        """Make what a member holds."""

    def scale(self) -> Any:
        """What the result is multiplied by."""
        return 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) * self.scale()

    def change(self) -> Undo:
        """Set the scale; returns what sets it back."""
        raise NotImplementedError


def setting(owner: Any, name: str, value: Any) -> Undo:
    """Set an attribute."""
    inherited = not name.startswith("__") and name not in getattr(owner, "__dict__", {name: None})
    before = getattr(owner, name)
    setattr(owner, name, value)
    return lambda: delattr(owner, name) if inherited else setattr(owner, name, before)


def item(container: Any, key: Any, value: Any) -> Undo:
    """Set an item."""
    before = container[key]
    if isinstance(before, np.ndarray | Tensor):
        before = before.copy() if isinstance(before, np.ndarray) else before.clone()
    container[key] = value

    def undo() -> None:
        container[key] = before

    return undo


MEMBERS: dict[str, type[Block]] = {}


def member(name: str) -> Callable[[type[Block]], type[Block]]:
    """Register a member."""

    def register(kind: type[Block]) -> type[Block]:
        assert name not in MEMBERS
        MEMBERS[name] = kind
        kind.__name__ = kind.__qualname__ = f"Block_{len(MEMBERS)}"
        globals()[kind.__name__] = kind  # to be found by pickle
        return kind

    return register


# --- held by the module -------------------------------------------------------------------------


@dataclass
class Options:
    """A plain object."""

    scale: float = 1.0


class Slotted:
    """An object without a `__dict__`."""

    __slots__ = ("scale",)

    def __init__(self) -> None:
        self.scale = 1.0


class Computed:
    """An object whose property reads another."""

    def __init__(self) -> None:
        self._options = Options()

    @property
    def scale(self) -> float:
        """From the options."""
        return self._options.scale


def _held(make: Callable[[], Any], inner: Callable[[Any], Any] = lambda held: held) -> type[Block]:
    class Held(Block):
        def made(self) -> None:
            self.held = make()

        def scale(self) -> float:
            return float(self.held.scale)

        def change(self) -> Undo:
            return setting(inner(self.held), "scale", 3.0)

    return Held


member("object")(_held(Options))
member("slots")(_held(Slotted))
member("namespace")(_held(lambda: types.SimpleNamespace(scale=1.0)))
member("arguments")(_held(lambda: argparse.Namespace(scale=1.0)))
member("property of an object")(_held(Computed, lambda held: held._options))


@member("object in an object in lists")
class _Nested(Block):
    def made(self) -> None:
        self.held = types.SimpleNamespace(options=[[[[[[Options()]]]]]])

    def scale(self) -> float:
        return self.held.options[0][0][0][0][0][0].scale

    def change(self) -> Undo:
        return setting(self.held.options[0][0][0][0][0][0], "scale", 3.0)


@member("list, six deep")
class _Deep(Block):
    def made(self) -> None:
        self.held = [[[[[[1.0]]]]]]

    def scale(self) -> float:
        return self.held[0][0][0][0][0][0]

    def change(self) -> Undo:
        return item(self.held[0][0][0][0][0], 0, 3.0)


@member("ordered dict of a tuple")
class _Ordered(Block):
    def made(self) -> None:
        self.held = ("a", collections.OrderedDict(scale=1.0))

    def scale(self) -> float:
        return self.held[1]["scale"]

    def change(self) -> Undo:
        return item(self.held[1], "scale", 3.0)


@member("array")
class _Array(Block):
    def made(self) -> None:
        self.held = np.ones(3)

    def scale(self) -> float:
        return float(self.held[1])

    def change(self) -> Undo:
        return item(self.held, slice(None), 3.0)


@member("bytes")
class _Bytes(Block):
    def made(self) -> None:
        self.held = bytearray(b"\x01")

    def scale(self) -> float:
        return float(self.held[0])

    def change(self) -> Undo:
        return item(self.held, 0, 3)


@member("tensor in a list, written in place")
class _Tensor(Block):
    def made(self) -> None:
        self.held = [torch.ones(1)]

    def scale(self) -> Tensor:
        return self.held[0]

    def change(self) -> Undo:
        return item(self.held[0], slice(None), 3.0)


@member("partial")
class _Partial(Block):
    def made(self) -> None:
        self.options = Options()
        self.held = functools.partial(getattr, self.options, "scale")

    def scale(self) -> float:
        return float(self.held())

    def change(self) -> Undo:
        return setting(self.options, "scale", 3.0)


@member("method of an object")
class _Method(Block):
    def made(self) -> None:
        self.held: Any = Chooser().choose

    def scale(self) -> float:
        return float(self.held())

    def change(self) -> Undo:
        return setting(self.held.__self__, "scale", 3.0)


class Chooser:
    """An object whose method is called."""

    def __init__(self) -> None:
        self.scale = 1.0

    def choose(self) -> float:
        """The scale."""
        return self.scale


@member("class of an object")
class _Switched(Block):
    def made(self) -> None:
        self.held = Chooser()

    def scale(self) -> float:
        return self.held.choose()

    def change(self) -> Undo:
        class Other(Chooser):
            def choose(self) -> float:
                return 3.0

        return setting(self.held, "__class__", Other)


# --- classes and functions ----------------------------------------------------------------------


class Flags:
    """A class that is used as a namespace."""

    scale = 1.0

    class Inner:
        """A class in a class."""

        scale = 1.0


@member("attribute of a class")
class _ClassAttribute(Block):
    def scale(self) -> float:
        return Flags.scale

    def change(self) -> Undo:
        return setting(Flags, "scale", 3.0)


@member("attribute of a class in a class")
class _InnerClass(Block):
    def scale(self) -> float:
        return Flags.Inner.scale

    def change(self) -> Undo:
        return setting(Flags.Inner, "scale", 3.0)


@member("attribute of the module's class")
class _Own(Block):
    factor = 1.0

    def scale(self) -> float:
        return type(self).factor

    def change(self) -> Undo:
        return setting(type(self), "factor", 3.0)


class Level(Enum):
    """A choice."""

    LOW, HIGH = 1, 3


@member("method that is replaced")
class _Replaced(Block):
    def scale(self) -> float:
        return Chooser().choose()

    def change(self) -> Undo:
        return setting(Chooser, "choose", lambda self: 3.0)


@member("default of the forward")
class _Default(Block):
    def scale(self, value: float = 1.0) -> float:
        return value

    def change(self) -> Undo:
        return setting(type(self).scale, "__defaults__", (3.0,))


@member("default of a keyword")
class _Keyword(Block):
    def scale(self, *, value: float = 1.0) -> float:
        return value

    def change(self) -> Undo:
        return item(type(self).scale.__kwdefaults__, "value", 3.0)


def helper(value: float = 1.0) -> float:
    """A function with a default and an attribute."""
    return value * helper.scale  # type: ignore[attr-defined]


helper.scale = 1.0  # type: ignore[attr-defined]


@member("default of a function")
class _HelperDefault(Block):
    def scale(self) -> float:
        return helper()

    def change(self) -> Undo:
        return setting(helper, "__defaults__", (3.0,))


@member("attribute of a function")
class _HelperAttribute(Block):
    def scale(self) -> float:
        return helper()

    def change(self) -> Undo:
        return setting(helper, "scale", 3.0)


@member("code of a function")
class _HelperCode(Block):
    def scale(self) -> float:
        return helper()

    def change(self) -> Undo:
        return setting(helper, "__code__", (lambda value=1.0: 3.0).__code__)


def _counter() -> tuple[Callable[[], float], Callable[[float], None]]:
    current = 1.0

    def read() -> float:
        return current

    def write(value: float) -> None:
        nonlocal current
        current = value

    return read, write


read_cell, write_cell = _counter()


@member("variable of an enclosing scope")
class _Cell(Block):
    def scale(self) -> float:
        return read_cell()

    def change(self) -> Undo:
        write_cell(3.0)
        return lambda: write_cell(1.0)


# --- global names -------------------------------------------------------------------------------

SCALE = 1.0
TABLE: dict[str, Any] = {"scale": 1.0, "deep": {"scale": [1.0]}}
ARRAY = np.ones(2)
WEIGHT = torch.ones(1)
CHOICE = Level.LOW
SHARED = Options()


def _set_global(name: str, value: Any) -> Undo:
    return item(globals(), name, value)


@member("global name")
class _Global(Block):
    def scale(self) -> float:
        return SCALE

    def change(self) -> Undo:
        return _set_global("SCALE", 3.0)


@member("global dict")
class _GlobalDict(Block):
    def scale(self) -> float:
        return float(TABLE["scale"])

    def change(self) -> Undo:
        return item(TABLE, "scale", 3.0)


@member("global dict, deep")
class _GlobalDeep(Block):
    def scale(self) -> float:
        return float(TABLE["deep"]["scale"][0])

    def change(self) -> Undo:
        return item(TABLE["deep"]["scale"], 0, 3.0)


@member("global array")
class _GlobalArray(Block):
    def scale(self) -> float:
        return float(ARRAY[0])

    def change(self) -> Undo:
        return item(ARRAY, 0, 3.0)


@member("global tensor, written in place")
class _GlobalTensor(Block):
    def scale(self) -> Tensor:
        return WEIGHT

    def change(self) -> Undo:
        return item(WEIGHT, slice(None), 3.0)


@member("global choice")
class _Choice(Block):
    def scale(self) -> float:
        return float(CHOICE.value)

    def change(self) -> Undo:
        return _set_global("CHOICE", Level.HIGH)


@member("global object")
class _GlobalObject(Block):
    def scale(self) -> float:
        return SHARED.scale

    def change(self) -> Undo:
        return setting(SHARED, "scale", 3.0)


@member("global function that is replaced")
class _GlobalFunction(Block):
    def scale(self) -> float:
        return helper()

    def change(self) -> Undo:
        return _set_global("helper", lambda: 3.0)


@member("name of another file")
class _OtherFile(Block):
    def scale(self) -> float:
        return settings.SCALE

    def change(self) -> Undo:
        return setting(settings, "SCALE", 3.0)


@member("function of another file that reads a name there")
class _OtherFunction(Block):
    def scale(self) -> float:
        return settings.scale()

    def change(self) -> Undo:
        return setting(settings, "SCALE", 3.0)


# --- the process and the thread -----------------------------------------------------------------

VARIABLE = contextvars.ContextVar("VARIABLE", default=1.0)
LOCAL = threading.local()
LOCAL.scale = 1.0


@member("environment")
class _Environment(Block):
    def scale(self) -> float:
        return float(os.environ.get("FXREP_TEST_SCALE", "1"))

    def change(self) -> Undo:
        os.environ["FXREP_TEST_SCALE"] = "3"

        def undo() -> None:
            os.environ.pop("FXREP_TEST_SCALE", None)

        return undo


@member("getenv")
class _Getenv(_Environment):
    def scale(self) -> float:
        return float(os.getenv("FXREP_TEST_SCALE", "1"))


@member("context variable")
class _Context(Block):
    def scale(self) -> float:
        return VARIABLE.get()

    def change(self) -> Undo:
        token = VARIABLE.set(3.0)
        return lambda: VARIABLE.reset(token)


@member("attribute of a thread")
class _Local(Block):
    def scale(self) -> float:
        return float(LOCAL.scale)

    def change(self) -> Undo:
        return setting(LOCAL, "scale", 3.0)


@member("default dtype of a new tensor")
class _Dtype(Block):
    def scale(self) -> Tensor:
        return torch.full((4, 1, 1), 2.5)

    def change(self) -> Undo:
        torch.set_default_dtype(torch.float64)
        return lambda: torch.set_default_dtype(torch.float32)


@member("function of torch that is replaced")
class _Torch(Block):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)))

    def change(self) -> Undo:
        return setting(torch, "relu", lambda x: x * 3.0)


@member("function of torch that a layer calls is replaced")
class _LayerFunction(Block):
    def change(self) -> Undo:
        return setting(F, "batch_norm", lambda x, *_, **__: x * 3.0)


# --- other modules ------------------------------------------------------------------------------


class Gauge(nn.Module):
    """A module with a number."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0
        self.below = nn.Identity()
        self.register_buffer("buffer", torch.ones(1))


@member("module in a list")
class _Parent(Block):
    def made(self) -> None:
        self.others = [Gauge()]

    def scale(self) -> float:
        return self.others[0].scale

    def change(self) -> Undo:
        return setting(self.others[0], "scale", 3.0)


@member("buffer of a module in a list, written in place")
class _ParentBuffer(Block):
    def made(self) -> None:
        self.others = [Gauge()]

    def scale(self) -> Any:
        return self.others[0].buffer

    def change(self) -> Undo:
        return item(self.others[0].buffer, slice(None), 3.0)


@member("child of a module in a list")
class _ParentChild(Block):
    def made(self) -> None:
        self.others = [Gauge()]

    def scale(self) -> float:
        return 3.0 if self.others[0].below.training else 1.0

    def change(self) -> Undo:
        return setting(self.others[0].below, "training", True)
