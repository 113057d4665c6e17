"""Symbolic tracing of one forward, submodule by submodule.

A submodule of torch.nn is a leaf: one node of the graph. Any other submodule is traced into; where
that fails, the graph calls the submodule as it is (opaque), and the trace of the root goes on.
"""

from __future__ import annotations

import collections
import os
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, is_dataclass
from itertools import chain
from typing import Any

import torch
from torch import fx, nn

from fxrep.capture.answers import Answers, Given
from fxrep.capture.askers import is_machinery, is_users, place
from fxrep.capture.hidden import expected_exceptions, may_return_none
from fxrep.capture.hollow import Hollow
from fxrep.capture.listening import listener
from fxrep.capture.modes import Watch, contexts
from fxrep.capture.proxies import ParameterWrite, TracedValue, Unfaithful
from fxrep.capture.signature import Arguments, is_literal
from fxrep.capture.skeleton import named_tensors
from fxrep.capture.snapshot import Snapshot
from fxrep.capture.state import GeneratorStates, is_only_thread
from fxrep.capture.substitution import run_and_undo
from fxrep.ops.absent import check_arguments, lacks_input, lacks_operand
from fxrep.ops.assume import assume
from fxrep.ops.calls import Calls
from fxrep.ops.owner import (
    foreign_hooks,
    leaf_class,
    own_call_impls,
    weight_hooks,
)
from fxrep.ops.values import item_count


class Restart(BaseException):
    """The root is to be traced again.

    A module that was traced into before has to be opaque, or a look at each module is needed.
    No Exception, so that the user's code does not catch it.
    """


class MissingTensor(BaseException):
    """A call is given None for a tensor and cannot run.

    No Exception, so that the user's code does not catch it.
    """


@dataclass(frozen=True)
class Opaque:
    """A submodule that the graph calls as it is, because it does not trace.

    Attributes:
        module: the submodule.
        path: its path below the root.
        reason: why it does not trace, for the report.
        frozen: nothing below it may be rewritten, because its forward writes parameters.
        hooked: it has hooks, which run around its call; its forward may trace.
    """

    module: nn.Module
    path: str
    reason: str
    frozen: bool = False
    hooked: bool = False


_PLAIN_TYPES = frozenset({str, int, float, bool, type(None), torch.dtype, torch.device, complex})


@dataclass(frozen=True)
class _Checkpoint:
    """The state of a trace before a submodule is traced into."""

    last: fx.Node | None
    constants: frozenset[str]
    num_calls: dict[str, int]
    opaque: dict[int, Opaque]
    inlined: set[int]
    violations: int
    guarded: int
    tensor_arguments: frozenset[str]


class Tracer(fx.Tracer):
    """One trace of a root's forward.

    Args:
        root: a module of the skeleton.
        arguments: its forward's arguments; specialised ones are constants of the graph.
        known_opaque: by id, modules that earlier traces of the root found to be opaque.
        state: all that forwards of the tree can write, as it was before.
        given: inputs whose answers may be assumed.

    Attributes:
        answers: what was assumed.
        opaque: by id, the modules that the graph calls as they are.
        calling: the modules whose calls are being traced, as nodes keep them in
            `meta["nn_module_stack"]`; each node of one call has the same object.
        inlined: ids of the modules that were traced into.
        constants: by name, tensors that the forward makes itself, and their versions when read.
        violations: why the graph would not do what the forward does.
        tensor_arguments: names of arguments that the forward took for tensors when it asked for
            their type.
        drew_numbers: random numbers were drawn meanwhile, by the forward or another thread.
    """

    def __init__(
        self,
        root: nn.Module,
        arguments: Arguments,
        known_opaque: dict[int, Opaque],
        state: Snapshot,
        given: Given,
    ) -> None:
        super().__init__(param_shapes_constant=False)
        self.root = root
        self.calls = Calls(root)
        self.graph = fx.Graph(tracer_cls=Tracer)
        self.arguments = arguments
        self.known_opaque = known_opaque
        self.opaque: dict[int, Opaque] = {}
        self.calling: collections.OrderedDict[str, Any] = collections.OrderedDict()
        self.inlined: set[int] = set()
        self.constants: dict[str, tuple[torch.Tensor, int]] = {}
        self.violations: list[Unfaithful] = []
        self.attribute_proxies: dict[str, fx.Proxy] = {}
        self.leaves: dict[int, type[nn.Module] | None] = {}
        self.tensor_arguments: set[str] = set()
        self.tensor_attrs: dict[Any, str] = {}  # names of `constants`, in fx's own attribute
        self.script_object_map: dict[Any, str] = {}
        self.named_tensors = dict(chain(_plain_tensors(root), named_tensors(root)))
        self.tensor_names = {id(t): name for name, t in reversed(self.named_tensors.items())}
        self.module_paths = {id(module): path for path, module in root.named_modules()}
        self.state = state
        self.hollow = Hollow(root, self)
        self.answers = Answers(self, given)
        self.watch = Watch(self, state.tensors, self.tensor_names)
        self.listener = listener(self)
        self.generators = GeneratorStates()
        self.drew_numbers = False
        self.contexts = contexts()
        self.finished = False
        self.expected_outside: tuple[str | None, str | None] = (None, None)
        self.suspicion: tuple[types.CodeType, int, Unfaithful] | None = None

    def run(self) -> fx.Graph:
        """Trace the root's forward."""
        return run_and_undo(self._trace_root, self._restore)

    def _trace_root(self) -> fx.Graph:
        try:
            return self._root_graph()
        except Exception:
            self._look_closer()
            raise

    def _root_graph(self) -> fx.Graph:
        self.hollow.install()
        self.state.disturb()
        self.generators = GeneratorStates()
        call = self._root_call()
        self.watch.start()
        self.listener.start()
        result = self._run_forward(call)
        self.create_node("output", "output", (self.create_arg(result),), {})
        self._settle_suspicion(None)
        self._refuse_written_attributes(self.root)
        self._look_closer()
        if self.state.careful:
            self._refuse_written(self.generators)
        return self.graph

    def _look_closer(self) -> None:
        """Trace again, with a look at each submodule, if any forward was found to write.

        The first trace looks once, or it would look at the whole tree for each submodule; where one
        is rolled back, what was written is gone.

        Raises:
            Restart: something was written.
        """
        if self.state.careful:
            return
        drew = self.generators.changed()
        if drew or self.state.is_written():
            self.state.careful = True
            if drew and is_only_thread():
                self.generators.restore()
            raise Restart("which forward writes?")

    def _refuse_written(self, generators: GeneratorStates) -> None:
        """Refuse a forward that wrote state, or drew random numbers since `generators`."""
        self._refuse_written_state()
        self._refuse_attributes_of_tensors()
        self._refuse_drawn_numbers(generators)

    def _refuse_attributes_of_tensors(self) -> None:
        """Refuse a forward that set an attribute of a tensor, or the class of a module."""
        reason = self.state.tensor_attribute() or self.state.class_set()
        if reason is not None:
            raise self.refuse(Unfaithful(reason))

    def _refuse_written_state(self) -> None:
        """Refuse a forward that wrote state which is no attribute of a module."""
        reason = self.state.find_written()
        if reason is not None:
            raise self.refuse(Unfaithful(reason))

    def _refuse_drawn_numbers(self, generators: GeneratorStates) -> None:
        """Refuse a forward if `random` or NumPy drew numbers since `generators` was recorded."""
        if generators.changed():
            self.drew_numbers = True
            if is_only_thread():
                generators.restore()
                raise Unfaithful("forward draws random numbers")
            raise Unfaithful("forward, or another thread meanwhile, draws random numbers")

    def _restore(self) -> None:
        self.listener.stop()
        self.finished = True
        try:
            self.state.restore(whole=False)
            self.state.calm()
        finally:
            self.watch.stop()
            self.hollow.uninstall()

    def refuse(self, error: Unfaithful) -> Unfaithful:
        """Record a violation and return it, to be raised: user code may catch the error."""
        self.violations.append(error)
        return error

    def why_not(self, error: BaseException, known: int = 0) -> tuple[str, bool]:
        """Why a forward does not trace, for the report; and whether it replaces parameters.

        Args:
            error: what ended the trace; a violation before it, which was not raised, is the reason.
            known: violations before the trace of the forward.
        """
        found = self.violations[known:]
        frozen = any(isinstance(each, ParameterWrite) for each in (error, *found))
        return explain(found[0] if found else error), frozen

    # questions

    def suspect(self, frame: types.FrameType, reason: str) -> None:
        """Remember what may be a question: it is none if torch records a call right there."""
        self._settle_suspicion(frame)
        self.suspicion = frame.f_code, frame.f_lasti, Unfaithful(reason)

    def _settle_suspicion(self, frame: types.FrameType | None) -> None:
        """Refuse what was suspected, unless the user's code is still at the same instruction."""
        if self.suspicion is None:
            return
        code, at, error = self.suspicion
        self.suspicion = None
        if frame is None or (frame.f_code, frame.f_lasti) != (code, at):
            raise self.refuse(error)

    def _check_operation(self, kind: str) -> None:
        """Refuse an operation whose exceptions the code expects; settle what was suspected."""
        frame = sys._getframe(2)
        reason = self._expected(frame, kind == "call_module")
        if reason is not None:
            raise self.refuse(Unfaithful(reason))
        if self.suspicion is not None:
            self._settle_suspicion(_innermost_of_users(frame))

    def _expected(self, frame: types.FrameType | None, layer: bool) -> str | None:
        """Which exceptions of an operation would be caught by the code that runs, for a reason.

        Args:
            frame: the innermost frame to look at.
            layer: the operation is the call of a layer.
        """
        while frame is not None:
            code = frame.f_code
            if code is _RUN_FORWARD or code is _TRACE_ROOT:
                break
            if code.co_exceptiontable and is_users(code.co_filename):
                reason = expected_exceptions(code, frame.f_lasti, layer)
                if reason is not None:
                    return f"{reason} ({place(code)})"
            frame = frame.f_back
        return self.expected_outside[layer]

    def _run_forward(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The result of a forward; what the code around its call expects is found once."""
        outside = self.expected_outside
        around = sys._getframe(1)
        self.expected_outside = self._expected(around, False), self._expected(around, True)
        try:
            return self.listener.within(forward, *args, **kwargs)
        finally:
            self.expected_outside = outside

    def expected_exception(self, frame: types.FrameType) -> bool:
        """Whether the user's code expects an exception at this instruction."""
        return expected_exceptions(frame.f_code, frame.f_lasti, False) is not None

    def tensor(self, target: str) -> torch.Tensor:
        """The tensor that a node reads."""
        if target in self.constants:
            return self.constants[target][0]
        return self.named_tensors[target]

    # values

    def proxy(self, node: fx.Node) -> fx.Proxy:  # noqa: D102
        return TracedValue(node, self)

    def create_proxy(self, *args: Any, **kwargs: Any) -> fx.Proxy:  # noqa: D102
        return self.listener.without(super().create_proxy, *args, **kwargs)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:  # noqa: D102
        if contexts() != self.contexts:
            which = "inference_mode" if torch.is_inference_mode_enabled() else "autocast"
            raise self.refuse(Unfaithful(f"forward uses 'with torch.{which}'"))
        if args[0].startswith("call_"):
            self._check_operation(args[0])
        if args[0] in ("call_function", "call_method") and lacks_operand(*args[1:4]):
            name = getattr(args[1], "__name__", args[1])
            raise self._missing_tensor(f"forward passes None to {name}() for a tensor")
        if args[1] is assume and not self.answers.guarded:  # of a graph that was made before
            self.answers.guarded.append(str(args[2][1]))
        node = super().create_node(*args, **kwargs)
        node.meta["nn_module_stack"] = self.calling
        return node

    def attribute(self, value: Any) -> Any:
        """The traced value of a parameter or buffer; any other value as it is."""
        name = self.tensor_names.get(id(value)) if isinstance(value, torch.Tensor) else None
        return value if name is None else self._get_attr(name)

    def _get_attr(self, name: str) -> fx.Proxy:
        """One node for each tensor, so that every use sees a write into it."""
        found = self.attribute_proxies.get(name)
        if found is None:
            found = self.attribute_proxies[name] = self.create_proxy("get_attr", name, (), {})
        return found

    def create_arg(self, a: Any) -> Any:  # noqa: D102
        kind = type(a)
        if kind in _PLAIN_TYPES:
            return a
        if isinstance(a, fx.Proxy):
            return a.node
        if kind is tuple:
            return tuple(self.create_arg(item) for item in a)
        if kind is list:
            return [self.create_arg(item) for item in a]
        if isinstance(a, torch.Tensor):
            return self._tensor_arg(a)
        if isinstance(a, dict) and kind not in (dict, fx.immutable_collections.immutable_dict):
            return self._mapping_arg(a)
        if (
            isinstance(a, list)
            and kind is not fx.immutable_collections.immutable_list
            and not hasattr(a, "__fx_create_arg__")
        ):
            return self.create_node("call_function", kind, ([self.create_arg(i) for i in a],), {})
        return super().create_arg(a)

    def _tensor_arg(self, tensor: torch.Tensor) -> fx.Node:
        name = self.tensor_names.get(id(tensor)) or self.tensor_attrs.get(tensor)
        if name is None:
            if tensor.grad_fn is not None or isinstance(tensor, nn.Parameter):
                raise self.refuse(
                    Unfaithful("forward computes with parameters it does not read as attributes")
                )
            index = len(self.constants)
            while hasattr(self.root, f"_constant{index}"):
                index += 1
            name = f"_constant{index}"
            self.constants[name] = (tensor, tensor._version)
            self.tensor_attrs[tensor] = name
        return self._get_attr(name).node

    def _mapping_arg(self, mapping: dict[Any, Any]) -> fx.Node:
        """An OrderedDict (torchvision's segmentation output) or ModelOutput keeps its type."""
        kind = type(mapping)
        if isinstance(mapping, collections.defaultdict):
            raise self.refuse(Unfaithful("forward passes a defaultdict on"))
        if is_dataclass(mapping):
            values = {str(key): self.create_arg(value) for key, value in mapping.items()}
            return self.create_node("call_function", kind, (), values)
        pairs = [(self.create_arg(key), self.create_arg(value)) for key, value in mapping.items()]
        return self.create_node("call_function", kind, (pairs,), {})

    def to_bool(self, obj: fx.Proxy) -> bool:  # noqa: D102
        answer = self._answered(self.answers.truth, obj)
        if answer is None:
            raise self.refuse(Unfaithful("forward decides on a traced value"))
        return bool(answer)

    def number(self, obj: fx.Proxy) -> Any:
        """The number that a traced value is assumed to be, or None."""
        return self._answered(self.answers.number, obj)

    def text(self, obj: fx.Proxy) -> str | None:
        """The text of a traced value that is no tensor, or None."""
        answer: str | None = self._answered(self.answers.text, obj)
        return answer

    def count(self, obj: fx.Proxy) -> int | None:
        """How many items a traced value has, or None."""
        known = item_count(self.calls, obj.node)
        return known if known is not None else self._answered(self.answers.count, obj)

    def _answered(self, answer: Callable[..., Any], obj: fx.Proxy) -> Any:
        asker = _innermost_asker(sys._getframe(2))
        return self.listener.without(answer, obj.node, asker)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:  # noqa: D102
        count = self.count(obj)
        if count is None:
            raise self.refuse(Unfaithful("forward iterates over a traced value"))
        items: Any = obj
        return iter([items[index] for index in range(count)])

    # modules

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:  # noqa: D102
        return isinstance(m, torch.jit.ScriptModule) or self._leaf_class(m) is not None

    def _leaf_class(self, m: nn.Module) -> type[nn.Module] | None:
        """`leaf_class`, remembered."""
        if id(m) not in self.leaves:
            self.leaves[id(m)] = leaf_class(m)
        return self.leaves[id(m)]

    def call(self, m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The traced result of a call of a module of the tree."""
        return self.listener.without(self._call, m, args, kwargs)

    def _call(self, m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        path = self.module_paths[id(m)]
        self._refuse_written_attributes(m)
        if not foreign_hooks(m):  # a hook may change the arguments
            check_arguments(m, args, kwargs)
        around, self.calling = self.calling, self._calling(m, path)
        try:
            if self.is_leaf_module(m, path):
                return self._call_leaf(m, path, args, kwargs)
            opaque = self._find_opaque(m, path)
            if opaque is None:
                opaque, result = self._trace_into(m, path, args, kwargs)
                if opaque is None:
                    return result
            return self._call_opaque(opaque, args, kwargs)
        finally:
            self.calling = around

    def _refuse_written_attributes(self, m: nn.Module) -> None:
        """Refuse a forward that sets attributes or hooks of a module that it calls.

        Checked at each call, because the forward may set them back afterwards.
        """
        name = self.hollow.written_attribute(m)
        if name is not None:
            raise self.refuse(Unfaithful(f"forward sets the attribute '{name}' of a module"))

    def _missing_tensor(self, message: str) -> BaseException:
        """The error for None in a tensor's place.

        `MissingTensor` if an argument that was left out may be the reason.
        """
        return (
            MissingTensor(message) if self.arguments.left_out else self.refuse(Unfaithful(message))
        )

    def _call_leaf(
        self, m: nn.Module, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        own = None if foreign_hooks(m) else self._leaf_class(m)
        if own is not None and lacks_input(m, args, kwargs):
            if own is nn.Identity:
                return None
            raise self._missing_tensor(
                f"forward passes None to '{path}', a {own.__name__}, for a tensor"
            )
        proxy = self.create_proxy("call_module", path, args, kwargs)
        proxy.node.meta["owner"] = own
        return proxy

    def _calling(self, m: nn.Module, path: str) -> collections.OrderedDict[str, Any]:
        """`calling` while `m` is called too; the key tells the calls of one module apart."""
        calls = self.num_calls.get(path, 0)
        self.num_calls[path] = calls + 1
        found = self.calling.copy()
        found[f"{path}@{calls}" if calls else path] = path, type(m)
        return found

    def _find_opaque(self, m: nn.Module, path: str) -> Opaque | None:
        found = self.known_opaque.get(id(m)) or self.opaque.get(id(m))
        if found is None and (foreign_hooks(m) or weight_hooks(m)):
            found = Opaque(m, path, "hook registered", hooked=True)
        if found is None and own_call_impls(m):
            found = Opaque(m, path, "it has its own _call_impl")
        reason = self.state.barred(m) if found is None else None
        if reason is not None:
            found = Opaque(m, path, reason)
        return found

    def _trace_into(
        self, m: nn.Module, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Opaque | None, Any]:
        """Trace the forward of a submodule: (None, its result), or (why it is opaque, None).

        Raises:
            Restart: it does not trace now, but did at an earlier call; or something was written,
                and which forward did is not known.
        """
        careful = self.state.careful
        generators = GeneratorStates() if careful else self.generators
        if careful:
            self._refuse_attributes_of_tensors()
        checkpoint = self._checkpoint()
        try:
            result = self._run_forward(m.forward, *args, **kwargs)
            if len(self.violations) > checkpoint.violations:
                raise self.violations[checkpoint.violations]
            self._settle_suspicion(None)
            if careful:
                self._refuse_written(generators)
            self._refuse_written_attributes(m)
        except Exception as error:
            self._look_closer()
            reason, frozen = self.why_not(error, checkpoint.violations)
            self._roll_back(checkpoint, m)
            opaque = Opaque(m, path, reason, frozen)
            if id(m) in self.inlined or self.state.bars_traced(self.inlined):
                self.known_opaque[id(m)] = opaque
                raise Restart(opaque.reason) from error
            return opaque, None
        self.inlined.add(id(m))
        return None, result

    def _checkpoint(self) -> _Checkpoint:
        return _Checkpoint(
            next(iter(reversed(self.graph.nodes)), None),
            frozenset(self.constants),
            dict(self.num_calls),
            dict(self.opaque),
            set(self.inlined),
            len(self.violations),
            len(self.answers.guarded),
            frozenset(self.tensor_arguments),
        )

    def _roll_back(self, checkpoint: _Checkpoint, m: nn.Module) -> None:
        """Undo all that the trace of a submodule has changed."""
        del self.violations[checkpoint.violations :]
        del self.answers.guarded[checkpoint.guarded :]
        self.tensor_arguments &= checkpoint.tensor_arguments
        self.suspicion = None
        for node in reversed(self.graph.nodes):
            if node is checkpoint.last:
                break
            self.graph.erase_node(node)
        for name in [name for name in self.constants if name not in checkpoint.constants]:
            self.tensor_attrs.pop(self.constants.pop(name)[0], None)
        self.attribute_proxies = {
            name: proxy for name, proxy in self.attribute_proxies.items() if not proxy.node._erased
        }
        self.num_calls = checkpoint.num_calls
        self.opaque, self.inlined = checkpoint.opaque, checkpoint.inlined
        self.hollow.restore(m)
        self.state.restore(whole=False)

    def _call_opaque(
        self, opaque: Opaque, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> fx.Proxy:
        m = opaque.module
        if any(isinstance(a, list | dict | set) for a in (*args, *kwargs.values())):
            # The graph builds a new list at each call: a write of the callee into it would be lost.
            raise self.refuse(
                Unfaithful(f"forward passes a list or dict to '{opaque.path}' ({opaque.reason})")
            )
        code = getattr(m.forward, "__code__", None)
        if code is not None and may_return_none(code):
            raise self.refuse(Unfaithful(f"'{opaque.path}' may return None ({opaque.reason})"))
        if type(m).__call__ is not nn.Module.__call__ and not isinstance(m, fx.GraphModule):
            raise self.refuse(Unfaithful(f"'{opaque.path}' has its own __call__"))
        self._look_closer()  # the module may read what was written
        if self.state.careful:
            self._refuse_written_state()
        proxy = self.create_proxy("call_module", opaque.path, args, kwargs)
        proxy.node.meta["owner"] = None  # no class of torch.nn: its result is not known
        self.opaque[id(m)] = opaque
        return proxy

    # the root

    def _root_call(self) -> Callable[[], Any]:
        """The call of the root's forward on placeholders under its own names.

        An argument that has the value of its default is left out, as a caller would leave it out;
        the arguments after it are passed by name.
        """
        positional: list[Any] = []
        named: dict[str, Any] = {}
        left_out = False
        for parameter in self.arguments.parameters:
            default: tuple[Any, ...] = ()
            if parameter.default is not parameter.empty:
                default = (parameter.default if is_literal(parameter.default) else None,)
            value: object = self.create_proxy("placeholder", parameter.name, default, {})
            if parameter.name in self.arguments.specialized:
                value = self.arguments.specialized[parameter.name]
            if parameter.kind is parameter.POSITIONAL_ONLY:
                positional.append(value)
            elif value is not parameter.default:
                if parameter.kind is parameter.KEYWORD_ONLY or named or left_out:
                    named[parameter.name] = value
                else:
                    positional.append(value)
            else:
                left_out = True
        forward = self.root.forward
        return lambda: forward(*positional, **named)


# Where the frames of a forward end.
_RUN_FORWARD, _TRACE_ROOT = Tracer._run_forward.__code__, Tracer._trace_root.__code__


def _innermost_of_users(frame: types.FrameType | None) -> types.FrameType | None:
    while frame is not None and not is_users(frame.f_code.co_filename):
        frame = frame.f_back
    return frame


def _innermost_asker(frame: types.FrameType | None) -> types.FrameType | None:
    """The code that asks a traced value: the user's, or torch's own (a check of a BatchNorm)."""
    while frame is not None and is_machinery(frame.f_code.co_filename):
        frame = frame.f_back
    return frame


def _plain_tensors(root: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that modules hold as plain attributes, and their paths."""
    for path, module in root.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                yield f"{path}.{name}" if path else name, value


def explain(error: BaseException) -> str:
    """One line on why a forward does not trace, with the place in the user's code."""
    text = str(error).strip().splitlines()
    message = text[0] if text else ""
    if not isinstance(error, Unfaithful | MissingTensor):
        message = f"{type(error).__name__}: {message}"
    if len(message) > 160:
        message = message[:157] + "..."
    library = os.path.dirname(torch.__file__)
    own = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((library, own, "<"))
    ]
    if frames:
        message += f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})"
    return message
