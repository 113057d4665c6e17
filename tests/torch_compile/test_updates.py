"""Who sees weights change: each way of `updates.TABLE` through fxrep and through Inductor."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxrep
from fxrep.torch_compile.backend import compile_graph
from support.check import FLOAT32, FLOAT64, distance, randomize
from support.compiling import block, folded, image, same, through
from support.compiling import fresh as fresh
from support.updates import TABLE, Way, multiply_data, numpy

SLOW = pytest.mark.slow
ways = pytest.mark.parametrize("way", TABLE, ids=[way.name for way in TABLE])
freezings = pytest.mark.parametrize("freezing", [False, True])


@pytest.fixture
def named() -> None:
    """The backend under its name: dynamo tidies up after those it knows."""
    if "fxrep" not in torch._dynamo.backends.registry._COMPILER_FNS:
        torch._dynamo.register_backend(compile_graph, name="fxrep")


def what_happens(way: Way, dtype: torch.dtype, **compile: Any) -> str:
    """Compile, run, change the weights and run again."""
    torch.manual_seed(0)
    model, x = randomize(way.model().eval()).to(dtype), image(dtype=dtype)
    compiled = torch.compile(model, **compile)
    tolerance = FLOAT64 if dtype == torch.float64 else FLOAT32
    for _ in range(2):
        same(compiled, model, x, tolerance=tolerance)
    with torch.no_grad():
        before = model(x)
    try:
        way.update(model)
    except RuntimeError:
        return "raises"
    with torch.no_grad():
        expected, got = model(x), compiled(x)
    assert distance(expected, before) > 1e-3
    if distance(got, expected) <= tolerance:
        return "fresh"
    assert distance(got, expected) > 1e-3
    return "**stale**"


@ways
@freezings
@pytest.mark.parametrize("inner", ["eager", "aot_eager", pytest.param("inductor", marks=SLOW)])
def test_fxrep(way: Way, freezing: bool, inner: str, named: None) -> None:
    dtype = torch.float32 if inner == "inductor" else torch.float64
    options = {"inner": inner, "freezing": freezing}
    gc.collect()
    gc.disable()  # nobody can count on it having run
    try:
        seen = what_happens(way, dtype, backend="fxrep", options=options)
    finally:
        gc.enable()
    assert seen == (way.freezing if freezing else way.fxrep)
    assert folded()


@freezings
@pytest.mark.parametrize("way", [TABLE[0], *TABLE[13:15]], ids=lambda way: way.name)
def test_fxrep_on_inductor(way: Way, freezing: bool, named: None) -> None:
    test_fxrep(way, freezing, "inductor", named)


@ways
def test_inductor_freezing(way: Way) -> None:
    with torch._inductor.config.patch(freezing=True):
        assert what_happens(way, torch.float32, backend="inductor") == way.inductor


def test_the_readme_has_the_table() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    rows = [f"| {w.name} | {w.fxrep} | {w.freezing} | {w.inductor} |" for w in TABLE]
    assert "\n" + "\n".join(rows) + "\n\n" in readme


@freezings
@pytest.mark.parametrize("update", [multiply_data, numpy])
def test_a_change_without_a_trace_needs_a_refresh(
    update: Callable[[Any], None], freezing: bool
) -> None:
    model, x = block(), image()
    compiled = through(model, freezing=freezing)
    same(compiled, model, x)
    before = model(x)
    update(model)
    fxrep.refresh(nn.Linear(1, 1))  # another module's
    with torch.no_grad():
        assert distance(compiled(x), before) <= FLOAT64  # documented: the old weights
    fxrep.refresh(compiled)
    same(compiled, model, x)
    update(model)
    fxrep.refresh()
    same(compiled, model, x)


@freezings
def test_parameters_where_others_died(freezing: bool) -> None:
    """At the identity of a dead one, in the same memory, written as often: known by its arrival."""
    model, x = block(), image()
    compiled = through(model, freezing=freezing)
    with torch.no_grad():
        for _ in range(12):  # whether an identity comes again is up to the allocator
            for _ in range(2):
                model.wide.weight = nn.Parameter(model.wide.weight.data)
                model.wide.weight.copy_(torch.randn_like(model.wide.weight))
            same(compiled, model, x)
    (graph,) = folded()
    tensors = {id(model.wide.weight)}
    assert graph.uses(tensors)
    nn.Linear(4, 4)  # others arrive
    assert graph.uses(tensors)
    model.wide.weight = model.wide.weight
    assert not graph.uses(tensors)
    same(compiled, model, x)


@freezings
def test_weights_can_be_swapped(freezing: bool, named: None) -> None:
    model, x = block(), image()
    compiled = torch.compile(
        model, backend="fxrep", options={"inner": "eager", "freezing": freezing}
    )
    same(compiled, model, x)
    torch.utils.swap_tensors(model.wide.weight, nn.Parameter(torch.randn_like(model.wide.weight)))
    same(compiled, model, x)


def test_contents_are_not_compared_while_a_graph_is_captured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The device cannot be waited for then."""
    model, x = block(), image()
    compiled = through(model)
    same(compiled, model, x)

    def waits(*_: object) -> bool:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr("fxrep.torch_compile.compiled._is_capturing", lambda: True)
    monkeypatch.setattr("fxrep.torch_compile.compiled._equal", waits)
    same(compiled, model, x)
