"""From a module's forward to a graph: which arguments are values, what a trace must not hide."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx, nn

from fxrep.capture.proxies import ParameterWrite, Unfaithful
from fxrep.capture.signature import Arguments, is_variadic
from fxrep.capture.state import (
    is_only_thread,
    tensor_versions,
    unchanged_random_state,
    written_tensor,
)
from fxrep.capture.tracer import Absent, Opaque, Restart, Tracer, explain
from fxrep.errors import FxrepError
from fxrep.ops.calls import Calls
from fxrep.ops.effects import effect


@dataclass(frozen=True)
class Traced:
    """A graph, its arguments, and the modules it calls as they are.

    `drew` says that numbers were drawn meanwhile, by a forward that is called as it is.
    """

    graph: fx.Graph
    arguments: Arguments
    opaque: tuple[Opaque, ...]
    drew: bool = False


class Untraceable(FxrepError):
    """A forward that cannot be traced as a root, and why.

    Attributes:
        reason: for the report.
        frozen: it writes parameters: nothing below it may be rewritten.
        absent: it would not run either as it is called, without a tensor for some argument.
        progress: how many nodes the trace had by then.
        drew: numbers were drawn meanwhile.
    """

    def __init__(
        self,
        reason: str,
        *,
        frozen: bool = False,
        absent: bool = False,
        progress: int = 0,
        drew: bool = False,
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.frozen = frozen
        self.absent = absent
        self.progress = progress
        self.drew = drew


def trace(module: nn.Module, given: Mapping[str, object] | None = None) -> Traced:
    """Trace one module's forward as a root.

    Args:
        module: a module of the skeleton.
        given: example values of some of its arguments.

    Raises:
        Untraceable: with the reason; `.frozen` is set where it writes parameters.
    """
    trials = _arguments(module, given or {})
    best: Traced | None = None
    problem: Untraceable | None = None
    for arguments in trials:
        try:
            traced = _supplied(module, arguments)
        except Untraceable as error:
            problem = problem or error
            continue
        if best is None or len(traced.opaque) < len(best.opaque):
            best = traced
        if not traced.opaque:
            break
    if best is None:
        assert problem is not None
        raise problem
    return best


def _supplied(module: nn.Module, arguments: Arguments) -> Traced:
    """Trace; an argument without which the forward cannot run is a tensor, whatever its default.

    ``forward(self, image=None, labels=None)`` cannot run without an image: those of its arguments
    that default to None are taken for tensors, in order, for as long as that gets the trace on.
    Those that then turn out not to be needed are None again.
    """
    supplied: list[str] = []
    while True:
        try:
            return _trace(module, arguments)
        except Untraceable as error:
            problem = error
        if not problem.absent:
            raise problem
        for name in arguments.left_out:
            trial = arguments.given(name)
            try:
                traced = _trace(module, trial)
            except Untraceable as error:
                if error.progress > problem.progress:
                    arguments = trial
                    supplied.append(name)
                    break
            else:
                return _without(module, traced, trial, supplied)
        else:
            raise problem


def _without(
    module: nn.Module, traced: Traced, arguments: Arguments, supplied: list[str]
) -> Traced:
    """The trace that takes as few of the arguments supplied as it can do with."""
    for name in supplied:
        fewer = arguments.omitted(name)
        try:
            traced, arguments = _trace(module, fewer), fewer
        except Untraceable:
            continue
    return traced


def _arguments(module: nn.Module, given: Mapping[str, object]) -> list[Arguments]:
    """The ways to try a forward's arguments: numbers as values first, then baked in."""
    try:
        signature = inspect.signature(module.forward)
    except (TypeError, ValueError) as error:
        raise Untraceable(f"forward has no signature: {error}") from error
    declared = list(signature.parameters.values())
    parameters = tuple(p for p in declared if not is_variadic(p))
    variadic = [p for p in declared if is_variadic(p)]
    if any(p.name in given and given[p.name] for p in variadic) or (variadic and not parameters):
        raise Untraceable("forward takes *args or **kwargs")
    specialized: dict[str, object] = {}
    required: set[str] = set()
    numbers: dict[str, object] = {}
    for parameter in parameters:
        if parameter.name in given:
            value = given[parameter.name]
            if _has_tensor(value):
                if parameter.default is None:
                    required.add(parameter.name)
            else:
                specialized[parameter.name] = value
        elif parameter.default is not parameter.empty and not _has_tensor(parameter.default):
            default = parameter.default
            numeric = type(default) in (int, float)
            (numbers if numeric else specialized)[parameter.name] = default
    first = Arguments(
        parameters,
        specialized,
        frozenset(required),
        returns=signature.return_annotation,
        takes_more=bool(variadic),
    )
    if not numbers:
        return [first]
    both = {**specialized, **numbers}
    baked = {p.name: both[p.name] for p in parameters if p.name in both}
    return [first, dataclasses.replace(first, specialized=baked)]


def _has_tensor(value: object) -> bool:
    if isinstance(value, tuple | list):
        return any(_has_tensor(item) for item in value)
    if isinstance(value, Mapping):
        return any(_has_tensor(item) for item in value.values())
    return isinstance(value, torch.Tensor)


# Another thread that draws numbers meanwhile cannot be told from the forward, but by luck.
_MOST_TRIALS = 3


def _trace(module: nn.Module, arguments: Arguments) -> Traced:
    for trial in range(_MOST_TRIALS):
        last = trial == _MOST_TRIALS - 1
        try:
            traced = _trace_once(module, arguments)
        except Untraceable as error:
            if last or not error.drew or is_only_thread():
                raise
        else:
            if last or not traced.drew or is_only_thread():
                return traced
    raise AssertionError("the last trial returns or raises")


def _trace_once(module: nn.Module, arguments: Arguments) -> Traced:
    closed: dict[int, Opaque] = {}
    while True:
        tracer = Tracer(module, arguments, closed)
        versions = tensor_versions(module)
        try:
            graph = tracer.run()
            if tracer.violations:
                raise tracer.violations[0]
            tracer.expect_none_drawn(tracer.numbers)
            if any(i._erased for node in graph.nodes for i in node.all_input_nodes):
                raise Unfaithful("forward keeps values of a submodule that does not trace")
            if any(t._version != version for t, version in tracer.constants.values()):
                raise Unfaithful("forward changes a tensor of its own between two uses")
            state = tracer.containers.written() or written_tensor(versions)
            if state is not None and state[0] is module:
                raise Unfaithful(state[1])
        except Restart:
            continue  # closed has grown
        except (Exception, Absent) as error:
            # What is called without any tensor is not traced but run: it raises what a call would.
            runs = not arguments.values and not isinstance(error, Unfaithful)
            raise Untraceable(
                explain(error),
                frozen=isinstance(error, ParameterWrite),
                absent=isinstance(error, Absent) or runs,
                progress=len(tracer.graph.nodes),
                drew=tracer.drew,
            ) from error
        finally:
            tracer.containers.restore()
        if state is not None:
            if id(state[0]) in closed:  # the write is its parent's
                raise Untraceable(state[1])
            path = next(n for n, m in module.named_modules() if m is state[0])
            closed[id(state[0])] = Opaque(state[0], path, state[1])
            continue
        _install_constants(module, graph, tracer.constants)
        if not arguments.values and _lacks_input(module, graph, arguments):
            raise Untraceable(
                "no argument is left that could be its input",
                absent=True,
                progress=len(graph.nodes),
            )
        arguments = dataclasses.replace(arguments, tensors=frozenset(tracer.tensors))
        return Traced(graph, arguments, tuple(tracer.opaque.values()), tracer.drew)


def _lacks_input(module: nn.Module, graph: fx.Graph, arguments: Arguments) -> bool:
    """Whether a graph that takes no values at all is one of a forward that does.

    A generator computes something, and runs as it is called; who defaults to an empty list waits
    for one that is not.
    """
    if arguments.left_out and not any(node.op.startswith("call_") for node in graph.nodes):
        return True
    if any(isinstance(v, tuple | list | dict) for v in arguments.specialized.values()):
        return True
    return bool(arguments.left_out) and not _runs(module, graph)


def _runs(module: nn.Module, graph: fx.Graph) -> bool:
    """Whether a graph that takes no values at all runs; on a copy, for it is the user's code."""
    try:
        with torch.no_grad(), unchanged_random_state():
            taken = [None] * len(graph.find_nodes(op="placeholder"))
            fx.Interpreter(copy.deepcopy(module), graph=graph).run(*taken)
    except Exception:
        return False
    return True


def _install_constants(
    module: nn.Module, graph: fx.Graph, constants: dict[str, tuple[torch.Tensor, int]]
) -> None:
    """Keep tensors the forward makes itself; a fresh copy per call where it writes into them."""
    calls = Calls(module)
    for node in list(graph.nodes):
        if node.op != "get_attr" or node.target not in constants:
            continue
        name = str(node.target)
        if name not in module._buffers:
            module.register_buffer(name, constants[name][0].detach(), persistent=False)
        if _is_written(calls, node):
            with graph.inserting_after(node):
                fresh = graph.call_method("clone", (node,))
            fresh.meta["nn_module_stack"] = node.meta["nn_module_stack"]
            node.replace_all_uses_with(
                fresh, delete_user_cb=lambda user, fresh=fresh: user != fresh
            )


def _is_written(calls: Calls, node: fx.Node) -> bool:
    """Whether an operation may write into the value, through views or directly."""
    stack, seen = [node], {node}
    while stack:
        value = stack.pop()
        for user in value.users:
            does = effect(calls, user)
            if value in does.writes:
                return True
            if value in does.aliases and user not in seen:
                seen.add(user)
                stack.append(user)
    return False
