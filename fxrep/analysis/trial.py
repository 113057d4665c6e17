"""A capture is run before it is rewritten: each graph beside the forward it was traced from.

A forward is Python code, and a trace of it is one of the paths through that code. Where a graph
and its forward, run on the same inputs, give different results, the trace is wrong, whatever the
reason.

Given: a model and its graphs. One copy of the model is made. Each captured forward runs on it twice
in a row, so that a second call that differs from the first is seen; the graph runs beside it, on
the weights of the model if it writes nothing, and else on a second copy. What a forward writes
stays on the copies. Code that was not captured runs only inside captured forwards, or if the user
gave inputs.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_flatten, tree_map_only

from fxrep.analysis.aliasing import written_tensors
from fxrep.analysis.inputs import possible_inputs
from fxrep.capture.islands import Capture, Program
from fxrep.capture.skeleton import call_arguments, duplicate
from fxrep.ops.assume import Unmet
from fxrep.ops.calls import Calls
from fxrep.ops.effects import effect
from fxrep.ops.owner import foreign_hooks

# How often a forward runs.
_RUNS = 2

# The largest difference of two runs of equal operations: in epsilons of the dtype, and at most.
_ROUNDING = 1000
_MOST = 2**-4


_Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # positional ones, and those by name


@dataclass(frozen=True)
class Trial:
    """What came of running a capture.

    Attributes:
        differing: the modules whose graph differs from their forward, by path, and how.
        not_run: why other graphs were not run, by path.
    """

    differing: Mapping[str, str] = field(default_factory=dict)
    not_run: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class _Call:
    """A call of a forward.

    Attributes:
        args: its positional arguments before the call.
        kwargs: its keyword arguments before the call.
        result: what it returned.
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
    differing: dict[str, str] = {}
    not_run: dict[str, str] = {}
    if not captured.programs:
        return Trial()
    runner, state = _Runner(captured), torch.get_rng_state()
    outer = runner.surroundings.unrunnable
    runner.surroundings.prepare()
    try:
        arguments = {} if outer else runner.example_arguments(example_inputs)
        for program in captured.programs:
            why = outer or _obstacle(program.module)
            if outer and _hooked_below(program.module):
                differing[program.path] = f"a hook below it may write what it reads, and {outer}"
                continue
            calls = [] if why else runner.calls(program, arguments.get(program.path))
            if not calls:
                not_run[program.path] = why or "no small inputs were found on which it runs"
                continue
            how = runner.difference(program, calls)
            if how is not None:
                differing[program.path] = how
    finally:
        runner.surroundings.restore()
        torch.set_rng_state(state)
    return Trial(differing, not_run)


def _obstacle(module: nn.Module) -> str | None:
    """Why a forward must not be run: it would run code whose effects do not stay on a copy."""
    for each in module.modules():
        if isinstance(each, torch.jit.ScriptModule):
            return "a part of it is scripted"
    return None


def _hooked_below(module: nn.Module) -> bool:
    """Whether a module below has hooks, which may write what a graph has as a constant."""
    return any(foreign_hooks(each) for each in module.modules() if each is not module)


class _Runner:
    """Runs forwards and graphs on copies.

    Args:
        captured: the graphs.

    Attributes:
        surroundings: what the copies share with the model.
    """

    def __init__(self, captured: Capture) -> None:
        self.captured = captured
        self.surroundings = captured.surroundings
        self.writes_nothing = functools.cache(_writes_nothing)
        self._twin: nn.Module | None = None

    def twin(self) -> nn.Module:
        """A copy of the model on which forwards run that write nothing."""
        if self._twin is None:
            self._twin = self.fresh_twin()
        return self._twin

    def fresh_twin(self) -> nn.Module:
        """A copy of the model in the state in which it is given."""
        return duplicate(self.captured.model, found=self.captured.reached)

    def example_arguments(self, example_inputs: object) -> dict[str, _Arguments]:
        """The arguments of the captured forwards when the model runs on the user's inputs."""
        if example_inputs is None:
            return {}
        found = {"": call_arguments(example_inputs)}
        below = [program.path for program in self.captured.programs if program.path]
        if not below or _obstacle(self.captured.model) is not None:
            return found
        twin = self.fresh_twin()
        for path in below:

            def record(_: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
                found.setdefault(path, _cloned((args, kwargs)))

            twin.get_submodule(path).register_forward_pre_hook(record, with_kwargs=True)
        args, kwargs = _cloned(found[""])
        with contextlib.suppress(Exception):  # the user's code; a later step tells the user
            self.surroundings.run(twin, *args, **kwargs)
        self.surroundings.restore()
        return found

    def calls(self, program: Program, given: _Arguments | None) -> list[_Call]:
        """Calls of a forward, twice in a row from the same state; none if it does not run.

        Args:
            program: the forward and its graph.
            given: its arguments; None to make small ones.
        """
        pure = self.writes_nothing(program)
        like = next((p for p in _parameters(program.module, self.captured.tree)), torch.ones(()))
        small = (_by_position(program, each) for each in possible_inputs(program, like))
        state = torch.get_rng_state()
        for args, kwargs in small if given is None else [given]:
            module = (self.twin() if pure else self.fresh_twin()).get_submodule(program.path)
            calls, context = [], contextvars.copy_context()  # the second call finds the first
            try:
                for _ in range(_RUNS):
                    torch.set_rng_state(state)
                    calls.append(context.run(_called, module.forward, args, kwargs))
            except Exception:  # whatever the user's code raises
                continue
            finally:
                self.surroundings.restore(whole=False)
            return calls
        return []

    def difference(self, program: Program, calls: list[_Call]) -> str | None:
        """How a graph differs from the calls of its forward; None if it does not."""
        module, pure = program.module, self.writes_nothing(program)
        if not pure:
            module = duplicate(program.module)
        context = contextvars.copy_context()
        try:
            for number, call in enumerate(calls, 1):
                if pure and number > 1 and _agrees(call.result, calls[0].result):
                    continue
                how = context.run(_difference, program, module, call)
                if how is not None:
                    return how if number == 1 else f"{how} at call {number}"
        finally:
            self.surroundings.restore(whole=False)
        return None


def _parameters(*modules: nn.Module) -> Iterator[Tensor]:
    """The parameters of floating point."""
    for module in modules:
        yield from (each for each in module.parameters() if each.is_floating_point())


def _by_position(program: Program, inputs: Mapping[str, Tensor]) -> _Arguments:
    """Positional and keyword arguments: a few parameters have no keyword."""
    alone = [p.name for p in program.arguments.parameters if p.kind is p.POSITIONAL_ONLY]
    args = tuple(inputs[name] for name in alone if name in inputs)
    return args, {name: value for name, value in inputs.items() if name not in alone}


def _called(forward: Callable[..., Any], args: Any, kwargs: Any) -> _Call:
    """The call of a forward that may write its arguments."""
    given, named = _cloned((args, kwargs))
    generator = torch.get_rng_state()
    result = forward(*_cloned(args), **_cloned(kwargs))
    return _Call(given, named, _cloned(result), generator)


def _cloned(value: Any) -> Any:
    return tree_map_only(Tensor, lambda t: t.detach().clone(), value)


def _writes_nothing(program: Program) -> bool:
    """Whether a graph certainly writes no tensor of the model, and runs torch's code alone."""
    for node in program.graph.find_nodes(op="call_module"):
        module = program.calls.submodule(str(node.target))
        if effect(program.calls, node).own_state or parametrize.is_parametrized(module):
            return False
    if _hooked_below(program.module):
        return False
    reads = program.graph.find_nodes(op="get_attr")
    return not reads or not written_tensors(program.graph, program.calls)


def _difference(program: Program, module: nn.Module, call: _Call) -> str | None:
    values = _placeholder_values(program, call)
    if values is None:
        return None
    torch.set_rng_state(call.generator)
    try:
        result = _run(program.graph, module, values)
    except Exception as error:
        if isinstance(error, Unmet):
            return None  # the graph stands for other inputs
        return f"its graph raises {type(error).__name__} where its forward runs"
    if _agrees(result, call.result):
        return None
    return "its graph gives another result than its forward"


def _placeholder_values(program: Program, call: _Call) -> dict[str, Any] | None:
    """The inputs of a graph for a call, by name; None if the graph does not take the call."""
    arguments = program.arguments
    try:
        bound = inspect.signature(program.module.forward).bind(*call.args, **call.kwargs)
    except TypeError:
        return None
    bound.apply_defaults()
    given: dict[str, Any] = _cloned(dict(bound.arguments))
    for name, value in arguments.specialized.items():
        other = given.get(name, value)
        if isinstance(other, Tensor) or isinstance(value, Tensor) or other != value:
            return None
    if any(given.get(p.name) for p in arguments.variadic):
        return None
    if any(given.get(name) is None for name in arguments.required):
        return None
    return given


def _run(graph: fx.Graph, module: nn.Module, given: Mapping[str, Any]) -> Any:
    """The result of a graph, node by node; values are dropped when nobody reads them any more."""
    values: dict[fx.Node, Any] = {}
    submodule = Calls(module).submodule
    readers = {node: len(node.users) for node in graph.nodes}
    for node in graph.nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
        if node.op == "output":
            return args[0]
        target: Any = node.target
        if node.op == "placeholder":
            values[node] = given[target] if target in given else next(iter(args), None)
        elif node.op == "get_attr":
            owner, _, name = target.rpartition(".")
            values[node] = getattr(submodule(owner), name)
        elif node.op == "call_module":
            values[node] = submodule(target)(*args, **kwargs)
        elif node.op == "call_method":
            values[node] = getattr(args[0], target)(*args[1:], **kwargs)
        else:
            values[node] = target(*args, **kwargs)
        for source in node.all_input_nodes:
            readers[source] -= 1
            if not readers[source]:
                del values[source]
    raise AssertionError("a graph has an output")


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
    limit = min(_ROUNDING * torch.finfo(b.dtype).eps, _MOST)
    scale = float(b.nan_to_num().abs().max())
    return torch.allclose(a, b, rtol=limit, atol=limit * scale, equal_nan=True)
