"""From a module's forward to a graph: which arguments are inputs, and when a trace is refused."""

from __future__ import annotations

import contextlib
import contextvars
import copy
import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import fx, nn

from fxrep.capture.answers import Given, Prove, unproven
from fxrep.capture.askers import place
from fxrep.capture.code import Key, key
from fxrep.capture.proxies import Unfaithful
from fxrep.capture.signature import Arguments, is_variadic
from fxrep.capture.skeleton import private
from fxrep.capture.snapshot import Snapshot
from fxrep.capture.state import is_only_thread, unchanged_random_state
from fxrep.capture.surroundings import Surroundings
from fxrep.capture.tracer import MissingTensor, Opaque, Restart, Tracer
from fxrep.errors import FxrepError
from fxrep.ops.calls import Calls
from fxrep.ops.effects import effect


@dataclass(frozen=True)
class Traced:
    """The graph of a forward.

    Attributes:
        module: the module that the targets of the graph refer to: a private copy of the traced one,
            which has the layers that the graph calls in common with it.
        graph: the trace.
        arguments: the forward's arguments.
        opaque: the modules that the graph calls as they are.
        drew_numbers: an opaque module, or another thread, drew random numbers during the trace.
        guarded: where the forward was given answers that hold for some inputs only.
        lacking: the forward asked what inputs would answer.
        ran: the code that ran, by `fxrep.capture.code.key`.
        stray: code that ran and reads what may change, and to which no name led; None if none did.
    """

    module: nn.Module
    graph: fx.Graph
    arguments: Arguments
    opaque: tuple[Opaque, ...]
    drew_numbers: bool = False
    guarded: tuple[str, ...] = ()
    lacking: bool = False
    ran: frozenset[Key] = frozenset()
    stray: str | None = None


class Untraceable(FxrepError):
    """A forward that cannot be traced as a root.

    Attributes:
        reason: why, for the report.
        frozen: the forward writes parameters: nothing below it may be rewritten.
        lacks_tensor: the forward itself cannot run either without a tensor for some argument.
        progress: how many nodes the trace had when it failed.
        drew_numbers: the forward, or another thread, drew random numbers during the trace.
        lacking: the forward asked what inputs would answer.
    """

    def __init__(
        self,
        reason: str,
        *,
        frozen: bool = False,
        lacks_tensor: bool = False,
        progress: int = 0,
        drew_numbers: bool = False,
        lacking: bool = False,
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.frozen = frozen
        self.lacks_tensor = lacks_tensor
        self.progress = progress
        self.drew_numbers = drew_numbers
        self.lacking = lacking


def trace(
    module: nn.Module,
    state: Snapshot,
    examples: Mapping[str, object] | None = None,
    given: Callable[[], Given | None] = lambda: None,
    prove: Prove = unproven,
) -> Traced:
    """Trace one module's forward as a root.

    Args:
        module: a module of the skeleton.
        state: all that forwards of the skeleton can write, as it was before.
        examples: example values of some of its arguments.
        given: inputs whose answers may be assumed where the forward would not trace otherwise.
        prove: proves answers that need no inputs.

    Raises:
        Untraceable: the forward does not trace, whether numbers are inputs or constants.
    """
    best: Traced | None = None
    try:
        best = _trace_best(module, state, examples or {}, Given(prove=prove))
        lacks = best.lacking and bool(best.opaque)
    except Untraceable as error:
        problem, lacks = error, error.lacking
    inputs = given() if lacks else None
    if inputs is not None:
        with contextlib.suppress(Untraceable):
            inputs = dataclasses.replace(inputs, prove=prove)
            guarded = _trace_best(module, state, examples or {}, inputs)
            if best is None or len(guarded.opaque) < len(best.opaque):
                return guarded
    if best is None:
        raise problem
    return best


def _trace_best(
    module: nn.Module,
    state: Snapshot,
    examples: Mapping[str, object],
    given: Given,
) -> Traced:
    """The trace with the fewest opaque modules, of those with numbers as inputs or constants."""
    best: Traced | None = None
    problem: Untraceable | None = None
    for arguments in _choices_of_inputs(module, examples):
        try:
            traced = _trace_with_tensors(module, arguments, state, given)
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


def _trace_with_tensors(
    module: nn.Module, arguments: Arguments, state: Snapshot, given: Given
) -> Traced:
    """Trace with a tensor for every argument without which the forward cannot run.

    ``forward(self, image=None, labels=None)`` cannot run without an image. The arguments that
    default to None are taken for tensors, in order, as long as each makes the trace reach further.
    Arguments that turn out not to be needed are None again.
    """
    supplied: list[str] = []
    while True:
        try:
            return _trace(module, arguments, state, given)
        except Untraceable as error:
            problem = error
        if not problem.lacks_tensor:
            raise problem
        for name in arguments.left_out:
            trial = arguments.with_input(name)
            try:
                traced = _trace(module, trial, state, given)
            except Untraceable as error:
                if error.progress > problem.progress:
                    arguments = trial
                    supplied.append(name)
                    break
            else:
                return _with_fewest_inputs(module, traced, trial, supplied, state, given)
        else:
            raise problem


def _with_fewest_inputs(
    module: nn.Module,
    traced: Traced,
    arguments: Arguments,
    supplied: list[str],
    state: Snapshot,
    given: Given,
) -> Traced:
    """The trace that takes as few of the supplied arguments as possible."""
    for name in supplied:
        fewer = arguments.without_input(name)
        try:
            traced, arguments = _trace(module, fewer, state, given), fewer
        except Untraceable:
            continue
    return traced


def _choices_of_inputs(module: nn.Module, examples: Mapping[str, object]) -> list[Arguments]:
    """Which arguments may be inputs of the graph: numbers as inputs first, then as constants."""
    try:
        signature = inspect.signature(module.forward)
    except (TypeError, ValueError) as error:
        raise Untraceable(f"forward has no signature: {error}") from error
    declared = list(signature.parameters.values())
    parameters = tuple(p for p in declared if not is_variadic(p))
    variadic = [p for p in declared if is_variadic(p)]
    if any(examples.get(p.name) for p in variadic) or (variadic and not parameters):
        raise Untraceable("forward takes *args or **kwargs")
    specialized: dict[str, object] = {}
    required: set[str] = set()
    numbers: dict[str, object] = {}
    for parameter in parameters:
        if parameter.name in examples:
            value = examples[parameter.name]
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
        variadic=tuple(variadic),
    )
    if not numbers:
        return [first]
    constants = {**specialized, **numbers}
    in_order = {p.name: constants[p.name] for p in parameters if p.name in constants}
    return [first, dataclasses.replace(first, specialized=in_order)]


def _has_tensor(value: object) -> bool:
    if isinstance(value, tuple | list):
        return any(_has_tensor(item) for item in value)
    if isinstance(value, Mapping):
        return any(_has_tensor(item) for item in value.values())
    return isinstance(value, torch.Tensor)


# If random numbers were drawn, the forward may have drawn them, or another thread: trace again.
_MOST_TRIALS = 3


def _trace(module: nn.Module, arguments: Arguments, state: Snapshot, given: Given) -> Traced:
    """Trace, again if another thread may have drawn random numbers meanwhile."""
    for trial in range(_MOST_TRIALS):
        last = trial == _MOST_TRIALS - 1
        try:
            traced = _trace_once(module, arguments, state, given)
        except Untraceable as error:
            if last or not error.drew_numbers or is_only_thread():
                raise
        else:
            if last or not traced.drew_numbers or is_only_thread():
                return traced
    raise AssertionError("the last trial returns or raises")


def _trace_once(module: nn.Module, arguments: Arguments, state: Snapshot, given: Given) -> Traced:
    """Trace; again, with one more submodule opaque, until no submodule stands in the way."""
    known_opaque: dict[int, Opaque] = {}
    while True:
        _refuse_barred(module, state)
        tracer = Tracer(module, arguments, known_opaque, state, given)
        try:
            # A context of its own: what the forward sets in it is gone with it.
            graph = contextvars.copy_context().run(tracer.run)
            _refuse_unfaithful(tracer, graph)
        except Restart:
            continue  # known_opaque has grown, or a closer look is taken
        except (Exception, MissingTensor) as error:
            raise _untraceable(tracer, error) from error
        _refuse_barred(module, state)
        state.traced |= {id(module), *tracer.inlined}
        copied = private(module, {id(module.get_submodule(path)) for path in called(graph)})
        _install_constants(copied, graph, tracer.constants)
        if not arguments.values and _lacks_input(copied, graph, arguments):
            raise Untraceable(
                "no argument is left that could be its input",
                lacks_tensor=True,
                progress=len(graph.nodes),
            )
        arguments = dataclasses.replace(arguments, tensors=frozenset(tracer.tensor_arguments))
        answers = tracer.answers
        return Traced(
            copied,
            graph,
            arguments,
            tuple(tracer.opaque.values()),
            tracer.drew_numbers,
            tuple(answers.guarded),
            answers.lacking,
            frozenset(map(key, tracer.listener.ran)),
            next(map(place, tracer.listener.strays), None),
        )


def _refuse_barred(module: nn.Module, state: Snapshot) -> None:
    reason = state.barred(module)
    if reason is not None:
        raise Untraceable(reason)


def _refuse_unfaithful(tracer: Tracer, graph: fx.Graph) -> None:
    """Refuse a finished trace whose graph would not do what the forward does."""
    if tracer.violations:
        raise tracer.violations[0]
    if any(i._erased for node in graph.nodes for i in node.all_input_nodes):
        raise Unfaithful("forward keeps values of a submodule that does not trace")
    if any(t._version != version for t, version in tracer.constants.values()):
        raise Unfaithful("forward changes a tensor of its own between two uses")


def _untraceable(tracer: Tracer, error: BaseException) -> Untraceable:
    # Without any input the trace runs the forward: its errors are those of a call without tensors.
    runs = not tracer.arguments.values and not isinstance(error, Unfaithful)
    reason, frozen = tracer.why_not(error)
    return Untraceable(
        reason,
        frozen=frozen,
        lacks_tensor=isinstance(error, MissingTensor) or runs,
        progress=len(tracer.graph.nodes),
        drew_numbers=tracer.drew_numbers,
        lacking=tracer.answers.lacking,
    )


def called(graph: fx.Graph) -> set[str]:
    """The paths of the modules that a graph calls."""
    return {str(node.target) for node in graph.nodes if node.op == "call_module"}


def _lacks_input(module: nn.Module, graph: fx.Graph, arguments: Arguments) -> bool:
    """Whether a graph without inputs comes from a forward that needs inputs.

    A forward that needs none (a generator of anchors) calls operators and runs. A default that is
    a tuple, list or dict stands for inputs that the caller is to pass.
    """
    if arguments.left_out and not any(node.op.startswith("call_") for node in graph.nodes):
        return True
    if any(isinstance(v, tuple | list | dict) for v in arguments.specialized.values()):
        return True
    return bool(arguments.left_out) and not _runs(module, graph)


def _runs(module: nn.Module, graph: fx.Graph) -> bool:
    """Whether a graph without inputs runs, tried on a copy of the module."""
    surroundings = Surroundings(module)
    try:
        with torch.no_grad(), unchanged_random_state():
            unused = [None] * len(graph.find_nodes(op="placeholder"))
            surroundings.run(fx.Interpreter(copy.deepcopy(module), graph=graph).run, *unused)
    except Exception:
        return False
    finally:
        surroundings.restore()
    return True


def _install_constants(
    module: nn.Module, graph: fx.Graph, constants: dict[str, tuple[torch.Tensor, int]]
) -> None:
    """Register the tensors that the forward makes itself.

    A tensor that the forward writes, or returns to a caller that may write it, is cloned per call.
    """
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
    """Whether an operation or the caller may write into the value, through views or directly."""
    stack, seen = [node], {node}
    while stack:
        value = stack.pop()
        for user in value.users:
            does = effect(calls, user)
            if value in does.writes or user.op == "output":
                return True
            if value in does.aliases and user not in seen:
                seen.add(user)
                stack.append(user)
    return False
