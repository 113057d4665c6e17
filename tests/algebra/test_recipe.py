"""Recipes: how a tensor is computed, replayed on any weights."""

from __future__ import annotations

import copy
import pickle

import torch
from torch import Tensor

from fxrep.algebra.recipe import Call, Load, Ref, record

TENSORS = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 5.0])}


def double(value: Tensor) -> Tensor:
    return value * 2


def total(values: tuple[Tensor, ...], *, scale: float = 1.0) -> Tensor:
    return sum(values) * scale  # type: ignore[return-value]


def test_replays_on_other_tensors() -> None:
    recipe = record(Call(total, ((Load("a"), Call(double, (Load("b"),))),), {"scale": 0.5}))
    assert recipe.run(TENSORS.__getitem__).tolist() == [3.5, 6.0]
    assert recipe.run(lambda path: torch.ones(2)).tolist() == [1.5, 1.5]
    assert sorted(recipe.paths) == ["a", "b"]


def test_what_is_shared_is_loaded_and_computed_once() -> None:
    calls = []

    def counted(value: Tensor) -> Tensor:
        calls.append(1)
        return value + 1

    shared = Call(counted, (Load("a"),))
    recipe = record(Call(torch.add, (shared, Call(torch.mul, (shared, Load("a"))))))
    assert recipe.paths == ("a",)
    assert recipe.run(TENSORS.__getitem__).tolist() == [4.0, 9.0]
    assert len(calls) == 1


def test_a_load_alone() -> None:
    assert record(Load("b")).run(TENSORS.__getitem__) is TENSORS["b"]


def test_arguments_may_be_nested() -> None:
    picked = Call(lambda items, index: items[0][index], ([[Load("a")]], 0))
    assert record(picked).run(TENSORS.__getitem__).tolist() == [1.0, 2.0]


def test_long_chains_need_no_recursion() -> None:
    expression: Load | Call = Load("a")
    for _ in range(20_000):
        expression = Call(torch.neg, (expression,))
    recipe = record(expression)
    assert recipe.run(TENSORS.__getitem__).tolist() == [1.0, 2.0]
    copied = pickle.loads(pickle.dumps(copy.deepcopy(recipe)))
    assert copied.run(TENSORS.__getitem__).tolist() == [1.0, 2.0]


def test_no_gradient_is_recorded() -> None:
    weight = torch.ones(2, requires_grad=True)
    assert not record(Call(double, (Load("a"),))).run(lambda path: weight).requires_grad


def test_steps_refer_backwards_only() -> None:
    recipe = record(Call(torch.add, (Load("a"), Call(double, (Load("a"),)))))
    for number, step in enumerate(recipe.steps):
        refs = [arg for arg in getattr(step, "args", ()) if isinstance(arg, Ref)]
        assert all(ref.step < number for ref in refs)
