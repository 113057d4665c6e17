"""Symbolic tracing that gives up on a submodule rather than on the model."""

from __future__ import annotations

import collections
import contextlib
import copy
import os
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
from torch import fx, nn

from fxrep.capture.hollow import Hollow
from fxrep.capture.modes import Watch, contexts
from fxrep.capture.proxies import ParameterWrite, TracedValue, Unfaithful
from fxrep.capture.signature import Arguments, is_literal
from fxrep.capture.skeleton import named_tensors
from fxrep.capture.state import Containers, DrawnNumbers, is_only_thread
from fxrep.capture.substitution import surely
from fxrep.ops.absent import lacks_input, lacks_operand
from fxrep.ops.calls import Calls
from fxrep.ops.owner import called_class, foreign_hooks, is_leaf, weight_hooks
from fxrep.ops.values import item_count


class Restart(BaseException):
    """A module has to be opaque from the start; not an Exception, user code must not catch it."""

    def __init__(self, module: nn.Module, reason: str) -> None:
        super().__init__(reason)
        self.module = module
        self.reason = reason


class Absent(BaseException):
    """A call that cannot run, as it is given None for a tensor; user code must not catch it."""


@dataclass(frozen=True)
class Opaque:
    """A module called as it is; frozen: nothing below it may be rewritten."""

    module: nn.Module
    path: str
    reason: str
    frozen: bool = False


_PLAIN = frozenset({str, int, float, bool, type(None), torch.dtype, torch.device, complex})


class Tracer(fx.Tracer):
    """Symbolic tracing that gives up on a submodule rather than on the model."""

    def __init__(self, root: nn.Module, arguments: Arguments, closed: dict[int, Opaque]) -> None:
        super().__init__(param_shapes_constant=False)
        self.root = root
        self.calls = Calls(root)
        self.graph = fx.Graph(tracer_cls=Tracer)
        self.arguments = arguments
        self.closed = closed
        self.opaque: dict[int, Opaque] = {}
        self.inlined: set[int] = set()
        self.constants: dict[str, tuple[torch.Tensor, int]] = {}
        self.violations: list[Unfaithful] = []
        self.attributes: dict[str, fx.Proxy] = {}
        self.leaves: dict[int, bool] = {}
        self.tensors: set[str] = set()  # arguments whose type was asked for
        self.tensor_attrs: dict[Any, str] = {}  # tensors the forward makes itself
        self.script_object_map: dict[Any, str] = {}
        registered = list(named_tensors(root))
        self.names = {id(t): name for name, t in reversed([*_plain_tensors(root), *registered])}
        self.paths = {id(module): path for path, module in root.named_modules()}
        self.containers = Containers(root)
        self.hollow = Hollow(root, self)
        self.watch = Watch(self, [tensor for _, tensor in registered])
        self.numbers = DrawnNumbers()
        self.drew = False
        self.surroundings = contexts()

    def run(self) -> fx.Graph:
        """Trace the root's forward."""
        return surely(self._run, self._end)

    def _run(self) -> fx.Graph:
        self.hollow.fill()
        call = self._root_call()
        self.watch.begin()
        result = call()
        self.create_node("output", "output", (self.create_arg(result),), {})
        self._expect_unchanged(self.root)
        return self.graph

    def expect_none_drawn(self, numbers: DrawnNumbers) -> None:
        """Refuse a forward while whose trace the process's generators were used."""
        if numbers.moved():
            self.drew = True
            if is_only_thread():
                numbers.give_back()
                raise Unfaithful("forward draws random numbers")
            raise Unfaithful("forward, or another thread meanwhile, draws random numbers")

    def _end(self) -> None:
        self.watch.end()
        self.hollow.empty()

    def refuse(self, error: Unfaithful) -> Unfaithful:
        """Note a violation, so that user code that catches the error does not hide it."""
        self.violations.append(error)
        return error

    # values

    def proxy(self, node: fx.Node) -> fx.Proxy:  # noqa: D102
        return TracedValue(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:  # noqa: D102
        if contexts() != self.surroundings:
            which = "inference_mode" if torch.is_inference_mode_enabled() else "autocast"
            raise self.refuse(Unfaithful(f"forward uses 'with torch.{which}'"))
        if args[0] in ("call_function", "call_method") and lacks_operand(*args[1:4]):
            name = getattr(args[1], "__name__", args[1])
            raise self._absent(f"forward passes None to {name}() for a tensor")
        node = super().create_node(*args, **kwargs)
        node.meta.setdefault("nn_module_stack", collections.OrderedDict())
        return node

    def attribute(self, value: Any) -> Any:
        """The traced value of a parameter or buffer that a module was asked for."""
        name = self.names.get(id(value)) if isinstance(value, torch.Tensor) else None
        return value if name is None else self._get_attr(name)

    def _get_attr(self, name: str) -> fx.Proxy:
        """One node per tensor: a write into it is seen by every use."""
        found = self.attributes.get(name)
        if found is None:
            found = self.attributes[name] = self.create_proxy("get_attr", name, (), {})
        return found

    def create_arg(self, a: Any) -> Any:  # noqa: D102
        kind = type(a)
        if kind in _PLAIN:
            return a
        if isinstance(a, fx.Proxy):
            return a.node
        if kind is tuple:
            return tuple(self.create_arg(item) for item in a)
        if kind is list:
            return [self.create_arg(item) for item in a]
        if isinstance(a, torch.Tensor):
            return self._tensor(a)
        if isinstance(a, dict) and kind not in (dict, fx.immutable_collections.immutable_dict):
            return self._mapping(a)
        if (
            isinstance(a, list)
            and kind is not fx.immutable_collections.immutable_list
            and not hasattr(a, "__fx_create_arg__")
        ):
            return self.create_node("call_function", kind, ([self.create_arg(i) for i in a],), {})
        return super().create_arg(a)

    def _tensor(self, tensor: torch.Tensor) -> fx.Node:
        name = self.names.get(id(tensor)) or self.tensor_attrs.get(tensor)
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

    def _mapping(self, mapping: dict[Any, Any]) -> fx.Node:
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
        raise self.refuse(Unfaithful("forward decides on a traced value"))

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:  # noqa: D102
        count = item_count(self.calls, obj.node)
        if count is None:
            raise self.refuse(Unfaithful("forward iterates over a traced value"))
        items: Any = obj
        return iter([items[index] for index in range(count)])

    # modules

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:  # noqa: D102
        found = self.leaves.get(id(m))
        if found is None:
            found = self.leaves[id(m)] = is_leaf(m)
        return found

    def call(self, m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a call of a module of the tree gives."""
        path = self.paths[id(m)]
        self._expect_unchanged(m)
        with self._inside(m, path):
            if self.is_leaf_module(m, path):
                return self._call_leaf(m, path, args, kwargs)
            closed = self._closed(m, path)
            if closed is None:
                closed, result = self._attempt(m, path, args, kwargs)
                if closed is None:
                    return result
            return self._call_opaque(closed, args, kwargs)

    def _expect_unchanged(self, m: nn.Module) -> None:
        """Refuse a forward that sets attributes or hooks of what it calls: it may restore them."""
        name = self.hollow.written(m)
        if name is not None:
            raise self.refuse(Unfaithful(f"forward sets the attribute '{name}' of a module"))

    def _absent(self, message: str) -> BaseException:
        """What to raise for None in a tensor's place: an argument may be the reason."""
        return Absent(message) if self.arguments.left_out else self.refuse(Unfaithful(message))

    def _call_leaf(
        self, m: nn.Module, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        own = called_class(m)
        if own is not None and lacks_input(m, args, kwargs):
            if own is nn.Identity:
                return None
            raise self._absent(f"forward passes None to '{path}', a {own.__name__}, for a tensor")
        proxy = self.create_proxy("call_module", path, args, kwargs)
        proxy.node.meta["owner"] = own
        return proxy

    @contextlib.contextmanager
    def _inside(self, m: nn.Module, path: str) -> Iterator[None]:
        stack, scope = dict(self.module_stack), copy.copy(self.scope)
        calls = self.num_calls.get(path, 0)
        self.num_calls[path] = calls + 1
        self.module_stack[f"{path}@{calls}" if calls else path] = (path, type(m))
        self.scope.module_path, self.scope.module_type = path, type(m)
        try:
            yield
        finally:
            self.module_stack.clear()
            self.module_stack.update(stack)
            self.scope.module_path, self.scope.module_type = scope.module_path, scope.module_type

    def _closed(self, m: nn.Module, path: str) -> Opaque | None:
        found = self.closed.get(id(m)) or self.opaque.get(id(m))
        if found is None and (foreign_hooks(m) or weight_hooks(m)):
            found = Opaque(m, path, "hook registered")
        return found

    def _attempt(
        self, m: nn.Module, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Opaque | None, Any]:
        before = next(iter(reversed(self.graph.nodes)), None)
        calls = dict(self.num_calls)
        constants = set(self.constants)
        opaque_before, inlined = dict(self.opaque), set(self.inlined)
        seen, numbers = len(self.violations), DrawnNumbers()
        try:
            result = m.forward(*args, **kwargs)
            if len(self.violations) > seen:
                raise self.violations[seen]
            self.expect_none_drawn(numbers)
            self._expect_unchanged(m)
        except Exception as error:
            del self.violations[seen:]
            self._forget(before, constants)
            self.num_calls = calls
            self.opaque, self.inlined = opaque_before, inlined
            self.hollow.restore(m)
            self.containers.restore(m)
            opaque = Opaque(m, path, explain(error), isinstance(error, ParameterWrite))
            if id(m) in self.inlined:
                self.closed[id(m)] = opaque
                raise Restart(m, opaque.reason) from error
            return opaque, None
        self.inlined.add(id(m))
        return None, result

    def _forget(self, before: fx.Node | None, constants: set[str]) -> None:
        for node in reversed(self.graph.nodes):
            if node is before:
                break
            self.graph.erase_node(node)
        for name in [name for name in self.constants if name not in constants]:
            self.tensor_attrs.pop(self.constants.pop(name)[0], None)
        self.attributes = {n: p for n, p in self.attributes.items() if not p.node._erased}

    def _call_opaque(
        self, opaque: Opaque, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> fx.Proxy:
        m = opaque.module
        if any(isinstance(a, list | dict | set) for a in (*args, *kwargs.values())):
            # a graph builds a new list per call: what the callee writes into it would be lost
            raise self.refuse(
                Unfaithful(f"forward passes a list or dict to '{opaque.path}' ({opaque.reason})")
            )
        if type(m).__call__ is not nn.Module.__call__ and not isinstance(m, fx.GraphModule):
            raise self.refuse(Unfaithful(f"'{opaque.path}' has its own __call__"))
        proxy = self.create_proxy("call_module", opaque.path, args, kwargs)
        proxy.node.meta["owner"] = None  # what it returns is not known
        self.opaque[id(m)] = opaque
        return proxy

    # the root

    def _root_call(self) -> Callable[[], Any]:
        """The call of the root's forward on placeholders under its own names.

        What has the value of its default is left out, as a caller would leave it out; what follows
        it is passed by name.
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


def _plain_tensors(root: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors that modules hold as plain attributes, by path."""
    for path, module in root.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                yield f"{path}.{name}" if path else name, value


def explain(error: BaseException) -> str:
    """One line on why a forward does not trace, with the place in the user's code."""
    text = str(error).strip().splitlines()
    message = text[0] if text else ""
    if not isinstance(error, Unfaithful | Absent):
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
