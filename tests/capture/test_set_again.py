"""A forward sets state of the process to what it already is: its graph must not leave that out."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxrep
from support.check import randomize


@dataclass
class State:
    """A piece of state: `read` may change it, `write` sets it."""

    read: Callable[[], Any]
    write: Callable[[], Any]
    other: Callable[[], Any]


def generators() -> dict[str, Callable[[], State]]:
    def owned(generator: Any, draw: Callable[[], Any], seed: str = "seed") -> State:
        write: Any = getattr(generator, seed)
        # Functions, which a copy of a model does not copy.
        return State(lambda: draw(), lambda: write(1), lambda: write(2))

    def of_torch() -> State:
        own = torch.Generator()
        return owned(own, lambda: torch.rand((), generator=own), "manual_seed")

    def of_numpy() -> State:
        own = np.random.RandomState()
        return owned(own, own.rand)

    def of_bits() -> State:
        own = np.random.default_rng(1)
        start = own.bit_generator.state

        def write() -> None:
            own.bit_generator.state = start

        return State(lambda: own.random(), write, own.random)

    def of_python() -> State:
        own = random.Random()
        return owned(own, own.random)

    return {
        "torch": lambda: owned(torch, lambda: torch.rand(()), "manual_seed"),
        "torch.random": lambda: owned(torch.random, lambda: torch.rand(()), "manual_seed"),
        "a generator of torch": of_torch,
        "random": lambda: owned(random, random.random),
        "an object of random": of_python,
        "numpy": lambda: owned(np.random, np.random.rand),
        "an object of numpy": of_numpy,
        "the bits of a generator of numpy": of_bits,
    }


def variable(value: str) -> None:
    os.environ["OF_FXREP"] = value


def flag(value: bool) -> None:
    torch.backends.cudnn.benchmark = value


SETTINGS: dict[str, Callable[[], State]] = {
    "the default dtype": lambda: State(
        lambda: torch.zeros(()).element_size(),
        lambda: torch.set_default_dtype(torch.float32),
        lambda: torch.set_default_dtype(torch.float64),
    ),
    "the number of threads": lambda: State(
        torch.get_num_threads, lambda: torch.set_num_threads(1), lambda: torch.set_num_threads(2)
    ),
    "the precision of products": lambda: State(
        lambda: len(torch.get_float32_matmul_precision()),
        lambda: torch.set_float32_matmul_precision("highest"),
        lambda: torch.set_float32_matmul_precision("high"),
    ),
    "deterministic algorithms": lambda: State(
        torch.are_deterministic_algorithms_enabled,
        lambda: torch.use_deterministic_algorithms(False),
        lambda: torch.use_deterministic_algorithms(True),
    ),
    "a flag of a backend": lambda: State(
        lambda: torch.backends.cudnn.benchmark, lambda: flag(False), lambda: flag(True)
    ),
    "a variable of the environment": lambda: State(
        lambda: float(os.environ["OF_FXREP"]), lambda: variable("1"), lambda: variable("2")
    ),
}


@pytest.fixture(autouse=True)
def _process() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(torch.float32)
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = False
    os.environ.pop("OF_FXREP", None)


class Setting(nn.Module):
    """Sets the state, and normalizes."""

    def __init__(self, write: Callable[[], Any]) -> None:
        super().__init__()
        self.conv, self.norm, self.write = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), write

    def forward(self, x: Tensor) -> Tensor:
        self.write()
        return self.norm(self.conv(x))


class Reading(nn.Module):
    """Python code that reads the state."""

    def __init__(self, read: Callable[[], Any]) -> None:
        super().__init__()
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + float(self.read())) if x.mean() < 1e3 else x


@pytest.mark.parametrize("examples", [False, True], ids=["", "example inputs"])
@pytest.mark.parametrize("name", [*generators(), *SETTINGS])
def test_state_that_is_set_to_what_it_is(name: str, examples: bool) -> None:
    state = {**generators(), **SETTINGS}[name]()
    model = randomize(nn.Sequential(Setting(state.write), Reading(state.read)).eval())
    x = torch.randn(2, 4, 5, 6)
    state.write()
    optimized = fxrep.optimize(model, x if examples else None)
    results = []
    for each in (model, optimized):
        state.write()
        with torch.no_grad():
            first = each(x)
            state.other()
            results.append((first, each(x)))
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)
    assert any(
        s.where in ("", "0") and s.pass_name == "capture" for s in fxrep.report(optimized).skipped
    )


@pytest.mark.parametrize("name", generators())
def test_the_generators_are_as_they_were(name: str) -> None:
    """They are in another state only as long as a forward is traced."""
    state = generators()[name]()
    state.write()
    numbers = [float(state.read()) for _ in range(2)]
    model = randomize(nn.Sequential(Setting(state.write)).eval())
    state.write()
    for number in numbers:
        fxrep.optimize(model)
        assert float(state.read()) == number


def test_random_numbers_of_the_system_have_no_state() -> None:
    own = random.SystemRandom()
    model = nn.Sequential(Setting(lambda: None), Reading(lambda: 0 * own.random())).eval()
    x = torch.randn(2, 4, 5, 6)
    torch.testing.assert_close(fxrep.optimize(model)(x), model(x))
