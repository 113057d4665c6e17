"""A capture is run before it is rewritten: each graph beside the forward it was traced from.

A forward is Python code, and a trace of it is one of the paths through that code. Where a graph and
its forward, run one after the other on the same inputs, give different results, the trace is wrong,
whatever the reason; the module then stays Python code.

Given: a model and its graphs. Two copies of the model are made. One runs twice in a row, and the
calls of all captured modules are recorded; the graphs run on the other copy with the recorded
arguments. So whatever a forward writes stays on the copies, and a second call that differs from the
first is seen.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from fxrep.analysis.inputs import possible_inputs
from fxrep.capture.islands import Capture, Program
from fxrep.capture.skeleton import call_arguments, skeleton

# How often the model runs, and how many calls of one module are compared.
_RUNS = 2
_MOST_CALLS = 8

# The largest difference between two runs of equal operations, in epsilons of the dtype.
_ROUNDING = 1000


@dataclass(frozen=True)
class Trial:
    """What came of running a capture.

    Attributes:
        differing: the modules whose graph differs from their forward, by path, and how.
        not_run: why the capture was not run; None if it was.
    """

    differing: Mapping[str, str] = field(default_factory=dict)
    not_run: str | None = None


@dataclass(frozen=True, eq=False)
class _Call:
    """A call of a module: its arguments before the call, and its result.

    Attributes:
        generator: the state of torch's random numbers before the call.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    result: Any
    generator: Tensor


def run_beside(captured: Capture, example_inputs: object = None) -> Trial:
    """Run the graphs of a capture and the forwards they were traced from.

    Args:
        captured: the graphs, before they are rewritten.
        example_inputs: the user's inputs; None to make small ones.
    """
    state = torch.get_rng_state()
    try:
        for inputs in _inputs(captured, example_inputs):
            calls = _recorded_calls(captured, inputs)
            if calls is not None:
                return Trial(_differing(captured, calls))
    finally:
        torch.set_rng_state(state)
    return Trial(not_run="no inputs were found on which the model runs")


def _inputs(captured: Capture, example_inputs: object) -> Iterator[Any]:
    return possible_inputs(captured) if example_inputs is None else iter([example_inputs])


def _recorded_calls(captured: Capture, inputs: object) -> dict[str, list[_Call]] | None:
    """The calls of the captured modules in some runs of a copy of the model.

    None if the model does not run on the inputs.
    """
    twin = _copy_of(captured.model)
    if twin is None:
        return None
    calls: dict[str, list[_Call]] = {program.path: [] for program in captured.programs}
    for path, found in calls.items():
        if path:
            _record(twin.get_submodule(path), found)
    for _ in range(_RUNS):
        args, kwargs = _cloned(call_arguments(inputs))
        given, named = _cloned((args, kwargs))
        generator = torch.get_rng_state()
        try:
            result = twin(*args, **kwargs)
        except Exception:  # whatever the user's code raises
            return None
        if "" in calls:
            calls[""].append(_Call(given, named, _cloned(result), generator))
    return calls


def _record(module: nn.Module, calls: list[_Call]) -> None:
    """Let a module record its calls."""
    waiting: list[tuple[Any, Any, Tensor]] = []

    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        waiting.append((*_cloned((args, kwargs)), torch.get_rng_state()))

    def after(_: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        given, named, generator = waiting.pop()
        if len(calls) < _MOST_CALLS:
            calls.append(_Call(given, named, _cloned(result), generator))

    module.register_forward_pre_hook(before, with_kwargs=True, prepend=True)
    module.register_forward_hook(after, with_kwargs=True)


def _cloned(value: Any) -> Any:
    return tree_map_only(Tensor, lambda t: t.detach().clone(), value)


def _copy_of(model: nn.Module) -> nn.Module | None:
    """A copy that shares nothing with the model; None if a module's copy is the module itself."""
    twin = skeleton(model, share_tensors=False)
    known = {id(module) for module in model.modules()}
    return None if any(id(module) in known for module in twin.modules()) else twin


def _differing(captured: Capture, calls: Mapping[str, Sequence[_Call]]) -> dict[str, str]:
    """The modules whose graph differs from their forward, and how, the graphs run on a copy."""
    found: dict[str, str] = {}
    twin = _copy_of(captured.model)
    assert twin is not None  # the first copy was one
    for program in captured.programs:
        for number, call in enumerate(calls[program.path], 1):
            how = _difference(program, twin.get_submodule(program.path), call)
            if how is not None:
                found[program.path] = how if number == 1 else f"{how} at call {number}"
                break
    return found


def _difference(program: Program, module: nn.Module, call: _Call) -> str | None:
    values = _placeholder_values(program, call)
    if values is None:
        return None
    torch.set_rng_state(call.generator)
    try:
        interpreter = fx.Interpreter(module, graph=program.graph)
        result = interpreter.run(*values, enable_io_processing=False)
    except Exception as error:
        return f"its graph raises {type(error).__name__} where its forward runs"
    if _agrees(result, call.result):
        return None
    return "its graph gives another result than its forward"


def _placeholder_values(program: Program, call: _Call) -> list[Any] | None:
    """The inputs of a graph for a call; None if the call has other constants than the graph."""
    arguments = program.arguments
    try:
        bound = inspect.signature(program.module.forward).bind(*call.args, **call.kwargs)
    except TypeError:
        return None
    bound.apply_defaults()
    given = _cloned(dict(bound.arguments))
    for name, value in arguments.specialized.items():
        other = given.get(name, value)
        if isinstance(other, Tensor) or isinstance(value, Tensor) or other != value:
            return None
    if arguments.takes_more and any(given.get(p.name) for p in _variadic(program.module)):
        return None
    nodes = program.graph.find_nodes(op="placeholder")
    if any(given.get(name) is None for name in arguments.required):
        return None
    return [given.get(str(node.target), node.args[0] if node.args else None) for node in nodes]


def _variadic(module: nn.Module) -> list[inspect.Parameter]:
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p for p in inspect.signature(module.forward).parameters.values() if p.kind in kinds]


def _agrees(got: Any, expected: Any) -> bool:
    """Whether two results have the same structure, and tensors that are equal up to rounding."""
    (a, _), (b, _) = tree_flatten(got), tree_flatten(expected)
    return len(a) == len(b) and all(map(_equal, a, b))


def _equal(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        plain = isinstance(b, int | float | str | bool | None)
        return type(a) is type(b) and (not plain or a == b or a != a)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if torch.equal(a, b) or not b.is_floating_point():
        return torch.equal(a, b)
    limit = _ROUNDING * torch.finfo(b.dtype).eps
    scale = float(b.nan_to_num().abs().max())
    return torch.allclose(a, b, rtol=limit, atol=limit * scale, equal_nan=True)
