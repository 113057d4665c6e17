"""Symbolic tracing that gives up on a submodule rather than on the model."""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import inspect
import operator
import os
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
from torch import fx, nn

from fxrep.errors import FxrepError
from fxrep.owner import called_class, foreign_hooks, is_leaf, weight_hooks
from fxrep.proxies import IN_PLACE, ParameterWrite, TracedValue, Unfaithful, item_count
from fxrep.signature import Arguments, is_literal, is_variadic
from fxrep.skeleton import named_tensors
from fxrep.state import (
    Containers,
    RandomState,
    tensor_versions,
    unchanged_random_state,
    watched,
    written_tensor,
)
from fxrep.words import words


class Restart(BaseException):
    """A module has to be opaque from the start; not an Exception, user code must not catch it."""

    def __init__(self, module: nn.Module, reason: str) -> None:
        super().__init__(reason)
        self.module = module
        self.reason = reason


@dataclass(frozen=True)
class Opaque:
    """A module called as it is; frozen: nothing below it may be rewritten."""

    module: nn.Module
    path: str
    reason: str
    frozen: bool = False


@dataclass(frozen=True)
class Traced:
    """A graph, its arguments, and the modules it calls as they are."""

    graph: fx.Graph
    arguments: Arguments
    opaque: tuple[Opaque, ...]


class Untraceable(FxrepError):
    """A forward that cannot be traced as a root, and why."""

    def __init__(self, reason: str, frozen: bool) -> None:
        super().__init__(reason)
        self.reason = reason
        self.frozen = frozen


_PLAIN = frozenset({str, int, float, bool, type(None), torch.dtype, torch.device, complex})


class Tracer(fx.Tracer):
    """Symbolic tracing that gives up on a submodule rather than on the model."""

    proxy_buffer_attributes = True

    def __init__(self, root: nn.Module, arguments: Arguments, closed: dict[int, Opaque]) -> None:
        super().__init__(param_shapes_constant=False)
        self.root_module = root
        self.arguments = arguments
        self.closed = closed
        self.opaque: dict[int, Opaque] = {}
        self.inlined: set[int] = set()
        self.constants: dict[str, tuple[torch.Tensor, int]] = {}
        self.violations: list[Unfaithful] = []
        self.attributes: dict[str, fx.Proxy] = {}
        self.leaves: dict[int, bool] = {}
        self.tensors: set[str] = set()  # arguments whose type was asked for
        self.names = {id(t): name for name, t in reversed(list(named_tensors(root)))}
        self.members = {id(module) for module in root.modules()}
        self.containers = Containers(root)

    def refuse(self, error: Unfaithful) -> Unfaithful:
        """Note a violation, so that user code that catches the error does not hide it."""
        self.violations.append(error)
        return error

    # values

    def proxy(self, node: fx.Node) -> fx.Proxy:  # noqa: D102
        return TracedValue(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:  # noqa: D102
        node = super().create_node(*args, **kwargs)
        node.meta.setdefault("nn_module_stack", collections.OrderedDict())
        return node

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:  # noqa: D102
        if not isinstance(attr_val, torch.Tensor):
            return attr_val
        name = self.names.get(id(attr_val))
        if name is None:
            return attr_val
        found = self.attributes.get(name)
        if found is None:
            found = self.create_proxy("get_attr", name, (), {})
            self.attributes[name] = found
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
            if tensor.grad_fn is not None:
                raise self.refuse(
                    Unfaithful("forward computes with parameters it does not read as attributes")
                )
            index = len(self.constants)
            while hasattr(self.root, f"_constant{index}"):
                index += 1
            name = f"_constant{index}"
            self.constants[name] = (tensor, tensor._version)
            self.tensor_attrs[tensor] = name
        found = self.attributes.get(name)
        if found is None:  # one node per tensor: a write into it is seen by every use
            found = self.attributes[name] = self.create_proxy("get_attr", name, (), {})
        return found.node

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
        count = item_count(obj.node)
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

    def call_module(  # noqa: D102
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if id(m) not in self.members:
            if self.is_leaf_module(m, "") and not any(m.state_dict()) and not foreign_hooks(m):
                return forward(*args, **kwargs)  # nothing of its own but how it is called
            raise self.refuse(Unfaithful(f"forward calls a {type(m).__name__} made on the fly"))
        path = self.path_of_module(m)
        with self._inside(m, path):
            if self.is_leaf_module(m, path):
                proxy = self.create_proxy("call_module", path, args, kwargs)
                proxy.node.meta["owner"] = called_class(m)
                return proxy
            closed = self._closed(m, path)
            if closed is None:
                closed, result = self._attempt(m, path, args, kwargs)
                if closed is None:
                    return result
            return self._call_opaque(closed, args, kwargs)

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
        seen, numbers = len(self.violations), RandomState()
        try:
            result = m.forward(*args, **kwargs)
            if len(self.violations) > seen:
                raise self.violations[seen]
            if numbers.moved():
                raise Unfaithful("forward draws random numbers")
        except Exception as error:
            del self.violations[seen:]
            self._forget(before, constants)
            self.num_calls = calls
            self.opaque, self.inlined = opaque_before, inlined
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

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Placeholders under the forward's own names; baked-in arguments get their value."""
        positional: list[Any] = []
        named: dict[str, Any] = {}
        for parameter in self.arguments.parameters:
            default: tuple[Any, ...] = ()
            if parameter.default is not parameter.empty:
                default = (parameter.default if is_literal(parameter.default) else None,)
            value: object = self.create_proxy("placeholder", parameter.name, default, {})
            if parameter.name in self.arguments.specialized:
                value = self.arguments.specialized[parameter.name]
            if parameter.kind is parameter.KEYWORD_ONLY:
                named[parameter.name] = value
            else:
                positional.append(value)
        forward = self.root.forward

        def call() -> Any:
            return forward(*positional, **named)

        call.__annotations__ = {}  # fx would print them into the generated code
        return call, []


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
            traced = _trace(module, arguments)
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


def _arguments(module: nn.Module, given: Mapping[str, object]) -> list[Arguments]:
    """The ways to try a forward's arguments: numbers as values first, then baked in."""
    try:
        signature = inspect.signature(module.forward)
    except (TypeError, ValueError) as error:
        raise Untraceable(f"forward has no signature: {error}", False) from error
    declared = list(signature.parameters.values())
    parameters = tuple(p for p in declared if not is_variadic(p))
    variadic = [p for p in declared if is_variadic(p)]
    if any(p.name in given and given[p.name] for p in variadic) or (variadic and not parameters):
        raise Untraceable("forward takes *args or **kwargs", False)
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
        elif parameter.default is not parameter.empty:
            default = parameter.default
            numeric = type(default) in (int, float)
            (numbers if numeric else specialized)[parameter.name] = default
    first = Arguments(
        parameters, specialized, frozenset(required), returns=signature.return_annotation
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


def _trace(module: nn.Module, arguments: Arguments) -> Traced:
    closed: dict[int, Opaque] = {}
    while True:
        tracer = Tracer(module, arguments, closed)
        versions = tensor_versions(module)
        numbers = RandomState()
        try:
            with unchanged_random_state(), watched(tracer):
                graph = tracer.trace(module)
                if tracer.violations:
                    raise tracer.violations[0]
                if numbers.moved():
                    raise Unfaithful("forward draws random numbers")
                if any(i._erased for node in graph.nodes for i in node.all_input_nodes):
                    raise Unfaithful("forward keeps values of a submodule that does not trace")
                if any(t._version != version for t, version in tracer.constants.values()):
                    raise Unfaithful("forward changes a tensor of its own between two uses")
                state = tracer.containers.written() or written_tensor(versions)
            if state is not None and state[0] is module:
                raise Unfaithful(state[1])
        except Restart:
            continue  # closed has grown
        except Exception as error:
            raise Untraceable(explain(error), isinstance(error, ParameterWrite)) from error
        finally:
            tracer.containers.restore()
        if state is not None:
            if id(state[0]) in closed:  # the write is its parent's
                raise Untraceable(state[1], False)
            path = next(n for n, m in module.named_modules() if m is state[0])
            closed[id(state[0])] = Opaque(state[0], path, state[1])
            continue
        _install_constants(module, graph, tracer.constants)
        arguments = dataclasses.replace(arguments, tensors=frozenset(tracer.tensors))
        return Traced(graph, arguments, tuple(tracer.opaque.values()))


def explain(error: BaseException) -> str:
    """One line on why a forward does not trace, with the place in the user's code."""
    text = str(error).strip().splitlines()
    message = text[0] if text else ""
    if not isinstance(error, Unfaithful):
        message = f"{type(error).__name__}: {message}"
    if len(message) > 160:
        message = message[:157] + "..."
    library = os.path.dirname(torch.__file__)
    own = os.path.dirname(os.path.abspath(__file__))
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((library, own, "<"))
    ]
    if frames:
        message += f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})"
    return message


def _install_constants(
    module: nn.Module, graph: fx.Graph, constants: dict[str, tuple[torch.Tensor, int]]
) -> None:
    """Keep tensors the forward makes itself; a fresh copy per call where it writes into them."""
    for node in list(graph.nodes):
        if node.op != "get_attr" or node.target not in constants:
            continue
        name = str(node.target)
        if name not in module._buffers:
            module.register_buffer(name, constants[name][0].detach(), persistent=False)
        if _is_written(node):
            with graph.inserting_after(node):
                fresh = graph.call_method("clone", (node,))
            fresh.meta["nn_module_stack"] = node.meta["nn_module_stack"]
            node.replace_all_uses_with(
                fresh, delete_user_cb=lambda user, fresh=fresh: user != fresh
            )


_PURE = frozenset(
    getattr(operator, name)
    for name in words("add sub mul truediv floordiv mod pow matmul neg eq ne lt le gt ge")
)


def _is_written(node: fx.Node) -> bool:
    """Whether an in-place operation may write into the value, through views or directly."""
    stack, seen = [node], {node}
    while stack:
        value = stack.pop()
        for user in value.users:
            if user.op == "call_module" or user.op == "output" or user.target in _PURE:
                continue
            name = str(getattr(user.target, "__name__", user.target))
            is_operator = getattr(user.target, "__module__", "") == "_operator"
            if (
                (is_operator and (name == "setitem" or name in IN_PLACE))
                or (name.endswith("_") and not name.endswith("__"))
                or name in _IN_PLACE_METHODS
                or "out" in user.kwargs
                or user.kwargs.get("inplace")
            ):
                return True
            if user not in seen:
                seen.add(user)
                stack.append(user)
    return False


_IN_PLACE_METHODS = frozenset({"__setitem__", *(f"__{name}__" for name in IN_PLACE)})
