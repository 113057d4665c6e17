"""Forwards with `*args` and `**kwargs`: the graph takes none, and says so."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxrep
from support.check import randomize


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def one(self, x: Tensor) -> Any:
        return self.bn(self.conv(x))


class Skips(Model):
    def forward(self, x: Tensor, *skips: Tensor) -> Any:
        return self.one(x) + sum(skips)


class Rest(Model):
    def forward(self, x: Tensor, **rest: Tensor) -> Any:
        return self.one(x) + sum(rest.values())


class Both(Model):
    def forward(self, x: Tensor, *skips: Tensor, scale: float = 1.0, **rest: Tensor) -> Any:
        return (self.one(x) + sum(skips) + sum(rest.values())) * scale


class Optional(Model):
    def forward(self, x: Tensor, y: Tensor | None = None, *skips: Tensor) -> Any:
        return self.one(x) + sum(skips) + (0 if y is None else y)


class Positional(Model):
    def forward(self, x: Tensor, /, *skips: Tensor, **rest: Tensor) -> Any:
        return self.one(x) + sum(skips) + sum(rest.values())


class Undecided(nn.Module):
    """Python code around an island."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


X, T = torch.randn(2, 3, 5, 5), torch.ones(())
CALLS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((X,), {}), ((X, T), {}), ((X, T, T), {}), ((X,), {"q": T}), ((X, T), {"q": T}),
    ((X,), {"scale": 2.0}), ((X, T), {"scale": 3.0}), ((), {"x": X}), ((X, None, T), {}),
    ((X,), {"y": T}), ((), {}), ((X,), {"x": X}),
]  # fmt: skip
MODELS: list[Callable[[], nn.Module]] = [Skips, Rest, Both, Optional, Positional]


def answer(model: nn.Module, args: Any, kwargs: Any) -> Any:
    try:
        return model(*args, **kwargs)
    except Exception as error:
        return error


@pytest.mark.parametrize("examples", [None, X, {"x": X}], ids=["", "example input", "keyword"])
@pytest.mark.parametrize("island", [False, True], ids=["root", "island"])
@pytest.mark.parametrize("kind", MODELS)
def test_calls_with_more_arguments(
    kind: Callable[[], nn.Module], island: bool, examples: Any
) -> None:
    """The original's result, or an error that says what the network was optimized for."""
    model = randomize(kind().eval())
    model = Undecided(model).eval() if island else model
    try:
        optimized = fxrep.optimize(model, examples)
    except fxrep.InputError:
        return
    for args, kwargs in CALLS:
        expected, got = answer(model, args, kwargs), answer(optimized, args, kwargs)
        if isinstance(got, fxrep.SpecializationError):
            assert not island and (len(args) > 1 or kwargs)
        elif isinstance(expected, Exception):
            assert type(got) is type(expected)
        else:
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", MODELS)
def test_copies_still_refuse_them(kind: Callable[[], nn.Module]) -> None:
    model = randomize(kind().eval())
    optimized = fxrep.optimize(model)
    assert str(inspect.signature(optimized.forward)) == str(inspect.signature(model.forward))
    again = fxrep.optimize(optimized)
    for each in (copy.deepcopy(optimized), pickle.loads(pickle.dumps(optimized)), again):
        torch.testing.assert_close(each(X), model(X), rtol=1e-4, atol=1e-4)
        more: Any = {"q": T} if kind is Rest else {}
        with pytest.raises(fxrep.SpecializationError, match="is not empty"):
            each(X, **more) if more else each(X, None, T)


def test_a_later_trace_keeps_the_check() -> None:
    model = randomize(Skips().eval())
    traced = fx.symbolic_trace(fxrep.optimize(model))
    torch.testing.assert_close(traced(X), model(X), rtol=1e-4, atol=1e-4)
    with pytest.raises(fxrep.SpecializationError, match="is not empty"):
        traced(X, T)
