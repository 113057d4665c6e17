"""State behind objects that are looked into, and behind functions to which no name leads.

A graph beside Python code stands only for what its code reads, as long as that is what it was.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import enum
import functools
import importlib
import operator
import sys
import types
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxrep
from support.check import randomize

SCALES = {"n": 2.0}
CALLS: list[int] = []


@pytest.fixture(autouse=True)
def _state() -> Any:
    SCALES["n"] = 2.0
    CALLS.clear()
    yield
    SCALES["n"] = 2.0
    CALLS.clear()


def read(*_: Any) -> float:
    """Read a number that changes, and note it."""
    CALLS.append(1)
    return SCALES["n"]


class Block(nn.Module):
    """A convolution and a BatchNorm, scaled."""

    mode = "scaled"

    def __init__(self, scale: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.norm, self.scale = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), scale

    def body(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))

    def run_scaled(self, x: Tensor) -> Tensor:
        return self.body(x) * read()

    def forward(self, x: Tensor) -> Any:
        return self.scale(self, x)


class Deciding(nn.Module):
    """Python code above an island."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Any:
        return x if x.sum() > 1e9 else self.block(x)


# --- functions --------------------------------------------------------------------------------


@contextlib.contextmanager
def scaled() -> Any:
    yield read()


class Meta(type):
    @property
    def factor(cls) -> float:
        return read()


class OfMeta(metaclass=Meta):
    pass


class Text:
    def __str__(self) -> str:
        return str(read())

    def __class_getitem__(cls, item: Any) -> float:
        return read()


def within(m: Any, x: Tensor) -> Any:
    with scaled() as factor:
        return m.body(x) * factor


def in_a_thread(m: Any, x: Tensor) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return m.body(x) * pool.submit(read).result()


HOME = __name__
WAYS: dict[str, Callable[[Any, Tensor], Any]] = {
    "a name that is put together": lambda m, x: getattr(m, f"run_{m.mode}")(x),
    "a context manager": within,
    "a property of a metaclass": lambda m, x: m.body(x) * OfMeta.factor,
    "the text of an object": lambda m, x: m.body(x) * float(f"{Text()}"),
    "an item of a class": lambda m, x: m.body(x) * Text["n"],
    "another thread": in_a_thread,
    "a factory": lambda m, x: m.body(x) * collections.defaultdict(read)["n"],
    "a module of Python by name": lambda m, x: m.body(x) * sys.modules[HOME].read(),
    "an import": lambda m, x: m.body(x) * importlib.import_module(HOME).read(),
    "a computed global name": lambda m, x: m.body(x) * globals()["re" + "ad"](),
    "text that is evaluated": lambda m, x: m.body(x) * eval("read()"),
    "methodcaller": lambda m, x: operator.methodcaller("run_" + m.mode, x)(m),
    "attrgetter": lambda m, x: operator.attrgetter("run_" + m.mode)(m)(x),
}


@pytest.mark.parametrize("examples", [False, True], ids=["", "example inputs"])
@pytest.mark.parametrize("whole", [False, True], ids=["island", "whole"])
@pytest.mark.parametrize("way", WAYS)
def test_functions_to_which_no_name_leads(way: str, whole: bool, examples: bool) -> None:
    block = randomize(Block(WAYS[way]).eval())
    model = block if whole else Deciding(block).eval()
    x = torch.randn(2, 3, 5, 6)
    optimized = fxrep.optimize(model, x if examples else None)
    assert not CALLS  # what they write is put back
    for number in (2.0, 2.0) if whole else (2.0, 5.0, 2.0):
        SCALES["n"] = number
        torch.testing.assert_close(optimized(x), model(x), rtol=1e-4, atol=1e-5)
    calls = len(CALLS)
    optimized(x)
    assert len(CALLS) == calls + 1


# --- holders ----------------------------------------------------------------------------------


class Held:
    def __init__(self) -> None:
        self.n = 2.0


@dataclasses.dataclass(slots=True)
class Slotted:
    n: float = 2.0


def follows(model: nn.Module, optimized: nn.Module, held: Any) -> None:
    """Both give the same while a number changes and changes back."""
    x = torch.randn(2, 3, 5, 6)
    for number in (2.0, 5.0, 2.0):
        held.n = number
        torch.testing.assert_close(optimized(x), model(x), rtol=1e-4, atol=1e-5)


Pair = collections.namedtuple("Pair", "first second")
HOLDERS: dict[str, tuple[Callable[[Held], Any], Callable[[Any], float]]] = {
    "itself": (lambda c: c, lambda h: h.n),
    "a weak reference": (weakref.ref, lambda h: h().n),
    "weak values": (lambda c: weakref.WeakValueDictionary(a=c), lambda h: h["a"].n),
    "a namedtuple": (lambda c: Pair(c, 1), lambda h: h.first.n),
    "a set": (lambda c: {c}, lambda h: next(iter(h)).n),
    "a frozenset": (lambda c: frozenset({c}), lambda h: next(iter(h)).n),
    "the key of a dict": (lambda c: {c: 1}, lambda h: next(iter(h)).n),
    "a proxy of a dict": (lambda c: types.MappingProxyType({"a": c}), lambda h: h["a"].n),
    "a view of a dict": (lambda c: {"a": c}.values(), lambda h: next(iter(h)).n),
    "a slice": (slice, lambda h: h.stop.n),
    "an exception": (ValueError, lambda h: h.args[0].n),
    "an array of objects": (lambda c: np.array([c], dtype=object), lambda h: h[0].n),
    "an Enum": (lambda c: enum.Enum("Kinds", {"A": c}), lambda h: next(iter(h)).value.n),
    "a partial function": (lambda c: functools.partial(lambda each: each.n, c), lambda h: h()),
}


@pytest.mark.parametrize("place", ["scope", "class"])
@pytest.mark.parametrize("holder", HOLDERS)
def test_an_object_that_something_holds(holder: str, place: str) -> None:
    make, get = HOLDERS[holder]
    held = Held()
    kept = make(held)

    class Of(Block):
        holder = staticmethod(lambda: kept) if place == "scope" else kept

    def forward(m: Any, x: Tensor) -> Any:
        return m.body(x) * get(kept if place == "scope" else type(m).__dict__["holder"])

    model = Deciding(randomize(Of(forward).eval())).eval()
    optimized = fxrep.optimize(model)
    follows(model, optimized, held)


def test_slots_outside_of_modules() -> None:
    held = Slotted()
    model = Deciding(randomize(Block(lambda m, x: m.body(x) * held.n).eval())).eval()
    optimized = fxrep.optimize(model)
    assert fxrep.report(optimized).rewrites
    follows(model, optimized, held)


def test_names_in_a_pattern() -> None:
    held = Held()

    def forward(m: Any, x: Tensor) -> Any:
        match held:
            case Held(n=2.0):
                return m.body(x) * 2
            case Held(n=number):
                return m.body(x) * number

    model = Deciding(randomize(Block(forward).eval())).eval()
    optimized = fxrep.optimize(model)
    follows(model, optimized, held)


def test_a_forward_that_is_set_on_the_module() -> None:
    block = randomize(Block(lambda m, x: m.body(x)).eval())
    block.forward = functools.partial(type(block).run_scaled, block)  # type: ignore[method-assign]
    model, x = Deciding(block).eval(), torch.randn(2, 3, 5, 6)
    optimized = fxrep.optimize(model)
    for number in (2.0, 5.0, 2.0):
        SCALES["n"] = number
        torch.testing.assert_close(optimized(x), model(x), rtol=1e-4, atol=1e-5)
