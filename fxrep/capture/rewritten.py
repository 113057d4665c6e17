"""The GraphModule of a whole model, and how a graph becomes a forward."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

from torch import fx, nn
from torch.fx.graph_module import _forward_from_src

from fxrep.capture.records import decode, encode
from fxrep.capture.signature import Arguments, KeepSignature
from fxrep.ops.owner import EVERY_MODULE


def compiled(graph: fx.Graph, arguments: Arguments) -> Callable[..., Any]:
    """A function of a module and the arguments that runs the graph."""
    graph.set_codegen(KeepSignature(arguments))
    code = graph.python_code(root_module="self")
    forward = _forward_from_src(code.src, code.globals)
    _sign(forward, arguments)
    return forward


def _sign(forward: Callable[..., Any], arguments: Arguments) -> None:
    """Give a forward the signature of the original forward, annotations included."""
    first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if arguments.parameters and arguments.parameters[0].kind is first.POSITIONAL_ONLY:
        first = first.replace(kind=first.POSITIONAL_ONLY)
    parameters = [first, *arguments.declared]
    forward.__signature__ = inspect.Signature(parameters, return_annotation=arguments.returns)  # type: ignore[attr-defined]


class RewrittenModule(fx.GraphModule):
    """A GraphModule with the root's attributes and signature; copies and pickles keep them."""

    def __init__(self, root: nn.Module, graph: fx.Graph, arguments: Arguments, name: str) -> None:
        super().__init__(nn.Module(), fx.Graph(), name)
        for name, value in root.__dict__.items():
            if name in EVERY_MODULE or name not in self.__dict__:
                self.__dict__[name] = value
        self._install(graph, arguments)

    def _install(self, graph: fx.Graph, arguments: Arguments) -> None:
        self.__dict__["_arguments"] = arguments
        graph.set_codegen(KeepSignature(arguments))
        self.graph = graph

    def recompile(self) -> Any:
        """Generate the forward again after an edit of the graph."""
        code = super().recompile()
        if isinstance(self._graph._codegen, KeepSignature):
            _sign(type(self).forward, self._graph._codegen.arguments)
        return code

    def __deepcopy__(self, memo: dict[int, Any]) -> RewrittenModule:
        body = self.__dict__.copy()
        graph = body.pop("_graph")
        return _new(self, type(self).__name__, memo, body, copy.deepcopy(graph, memo))

    def __copy__(self) -> RewrittenModule:
        body = self.__dict__.copy()
        graph = body.pop("_graph")
        return _new(self, type(self).__name__, None, body, copy.deepcopy(graph))

    def __reduce__(self) -> tuple[Any, ...]:
        # The state follows the object, so that submodules may refer back to it.
        return _empty, (type(self).__name__,), self.__getstate__()

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        graph = state.pop("_graph")
        state["_tracer_cls"] = None
        state["_fxrep_nodes"] = encode(graph)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        nodes = state.pop("_fxrep_nodes")
        self.__dict__.update(state)
        self._install(decode(nodes), state["_arguments"])


def _empty(name: str) -> RewrittenModule:
    """A module without state; pickles name this function."""
    module = RewrittenModule.__new__(RewrittenModule)
    nn.Module.__init__(module)
    type(module).__name__ = name
    return module


def _new(
    source: RewrittenModule,
    name: str,
    memo: dict[int, Any] | None,
    body: dict[str, Any],
    graph: fx.Graph,
) -> RewrittenModule:
    """A deep copy of a module where there is a memo, otherwise a shallow copy."""
    module = _empty(name)
    if memo is not None:
        memo[id(source)] = module
        body = copy.deepcopy(body, memo)
    else:
        own = ("_modules", "_parameters", "_buffers")
        body = {key: copy.copy(value) if key in own else value for key, value in body.items()}
    module.__dict__.update(body)
    module._install(graph, body["_arguments"])
    return module
