"""From rewritten graphs back to a module that looks like the user's.

A whole graph becomes a `torch.fx.GraphModule` with the model's class name, attributes, hooks and
signature. An island only gets a new `forward` on the object that was there: its class, attributes
and methods stay, because parents read them.
"""

from __future__ import annotations

import collections
import copy
import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx.graph_module import _forward_from_src

from fxrep.capture.islands import Capture, Program
from fxrep.capture.signature import Arguments, KeepSignature, same_value
from fxrep.capture.skeleton import empty_dicts
from fxrep.report import Report

_REPORT = "_fxrep_report"


def assemble(capture: Capture) -> nn.Module:
    """Build the optimized module; nothing in it is shared with the user's model.

    Args:
        capture: programs with their graphs rewritten, submodules added to or removed from
            `program.module`.

    Returns:
        A GraphModule when the whole forward was traced, otherwise the model's own class.
    """
    for program in capture.programs:
        if isinstance(program.module, fx.GraphModule):  # it is copied by what its graph reads
            program.module.__dict__["_graph"] = program.graph
    memo = _own_tensors(capture)
    tree: nn.Module = copy.deepcopy(capture.tree, memo)
    for program in capture.programs:
        if program.is_root:
            continue
        module: nn.Module = memo[id(program.module)]
        module.__dict__["forward"] = GraphForward(module, program.graph, program.arguments)
    for program in capture.programs:
        if program.is_root:
            return RewrittenModule(tree, program.graph, program.arguments)
    return tree


def attach(module: nn.Module, report: Report) -> None:
    """Keep the report on the module; copies and pickles carry it along."""
    module.__dict__[_REPORT] = report


def attached(module: nn.Module) -> Report | None:
    """The report kept on the module, if any."""
    found = module.__dict__.get(_REPORT)
    return found if isinstance(found, Report) else None


def _own_tensors(capture: Capture) -> dict[int, Any]:
    """A deepcopy memo that copies the user's tensors and keeps those made by the rewrite."""
    users: set[int] = set()
    storages: set[int] = set()
    for tensor in _tensors(capture.model):
        users.add(id(tensor))
        storages.add(_storage(tensor))
    memo = empty_dicts(capture.tree)
    for tensor in _tensors(capture.tree):
        if id(tensor) not in users and tensor.is_leaf and _storage(tensor) not in storages:
            memo[id(tensor)] = tensor
    return memo


def _tensors(root: nn.Module) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for module in root.modules():
        for values in (module._parameters, module._buffers, module.__dict__):
            found.extend(value for value in values.values() if isinstance(value, torch.Tensor))
    return found


def _storage(tensor: torch.Tensor) -> int:
    if tensor.layout is not torch.strided or tensor.numel() == 0:
        return id(tensor)
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # a wrapper subclass has no storage of its own
        return id(tensor)


# --- a forward from a graph -----------------------------------------------------------------


def _compile(graph: fx.Graph, arguments: Arguments) -> Callable[..., Any]:
    graph.set_codegen(KeepSignature(arguments))
    code = graph.python_code(root_module="self")
    forward = _forward_from_src(code.src, code.globals)
    _sign(forward, arguments)
    return forward


def _sign(forward: Callable[..., Any], arguments: Arguments) -> None:
    """inspect.signature answers what the original forward's did, annotations included."""
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if arguments.parameters and arguments.parameters[0].kind is own.POSITIONAL_ONLY:
        own = own.replace(kind=own.POSITIONAL_ONLY)
    parameters = [own, *arguments.parameters]
    forward.__signature__ = inspect.Signature(parameters, return_annotation=arguments.returns)  # type: ignore[attr-defined]


class RewrittenModule(fx.GraphModule):
    """A GraphModule that keeps the root's attributes, hooks and signature, copied or pickled."""

    def __init__(self, root: nn.Module, graph: fx.Graph, arguments: Arguments) -> None:
        super().__init__(nn.Module(), fx.Graph(), type(root).__name__)
        own = nn.Module().__dict__.keys()
        for name, value in root.__dict__.items():
            if name in own or name not in self.__dict__:
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
        # the state comes after the object, so that submodules may refer back to it
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


class GraphForward:
    """The forward of an island: runs the graph on the module it belongs to.

    A call whose arguments are not those the graph was specialised to runs the forward of the
    module's class.
    """

    def __init__(self, module: nn.Module, graph: fx.Graph, arguments: Arguments) -> None:
        self.module = module
        self.original = module.__dict__.get("forward")
        self._install(graph, arguments)

    def _install(self, graph: fx.Graph, arguments: Arguments) -> None:
        self.graph = graph
        self.arguments = arguments
        self.run = _compile(graph, arguments)
        self.__signature__ = arguments.signature
        names = [p.name for p in arguments.parameters]
        kinds = [p.kind is p.KEYWORD_ONLY for p in arguments.parameters]
        self.places = dict(zip(names, range(len(names)), strict=True))
        self.keywords = {n for n, keyword in zip(names, kinds, strict=True) if keyword}
        self.checked = [
            (name, None if name in self.keywords else self.places[name], value)
            for name, value in arguments.specialized.items()
        ]
        self.most = len(names) - len(self.keywords)

    @property
    def __code__(self) -> Any:
        """The code of the function it runs: torch.export asks every forward for it."""
        return self.run.__code__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph, or the class's forward for arguments it was not made for."""
        if self._fits(args, kwargs):
            return self.run(self.module, *args, **kwargs)
        if self.original is not None:
            return self.original(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def _fits(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if len(args) > self.most:
            return False
        for name in kwargs:
            if name not in self.places:
                return False
        for name, place, value in self.checked:
            if place is not None and place < len(args):
                if not same_value(args[place], value):
                    return False
            elif name in kwargs and not same_value(kwargs[name], value):
                return False
        for name in self.arguments.required:
            place = self.places[name]
            if (kwargs.get(name) if place >= len(args) else args[place]) is None:
                return False
        for name in self.arguments.tensors:
            place = self.places[name]
            given = kwargs.get(name) if place >= len(args) else args[place]
            if not isinstance(given, torch.Tensor | fx.Proxy):
                return False
        return True

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphForward:
        made = GraphForward.__new__(GraphForward)
        memo[id(self)] = made
        made.module = copy.deepcopy(self.module, memo)
        made.original = copy.deepcopy(self.original, memo)
        made._install(copy.deepcopy(self.graph, memo), self.arguments)
        return made

    def __getstate__(self) -> dict[str, Any]:
        return {
            "module": self.module,
            "original": self.original,
            "nodes": encode(self.graph),
            "arguments": self.arguments,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.module = state["module"]
        self.original = state["original"]
        self._install(decode(state["nodes"]), state["arguments"])


# --- graphs in pickles ----------------------------------------------------------------------
# fx pickles the generated source and traces it again, which loses what a Proxy cannot express
# (baked-in arguments, in-place operators); plain node records give back the same graph.


@dataclass(frozen=True)
class _NodeName:
    name: str


@dataclass(frozen=True)
class _TorchName:
    name: str


@dataclass(frozen=True)
class _NodeRecord:
    op: str
    name: str
    target: Any
    args: Any
    kwargs: Any
    stack: Any
    wrapped: bool


def _named(node: fx.Node) -> Any:
    return _NodeName(node.name)


def encode(graph: fx.Graph) -> list[_NodeRecord]:
    """The graph as plain records."""
    records = []
    for node in graph.nodes:
        target = node.target
        if node.op == "call_function":
            target = _torch_name(target) or target
        args, kwargs = (_plain(fx.map_arg(entry, _named)) for entry in (node.args, node.kwargs))
        stack = [
            (k, (p, _type_name(t))) for k, (p, t) in node.meta.get("nn_module_stack", {}).items()
        ]
        wrapped = bool(node.meta.get("is_wrapped"))
        records.append(_NodeRecord(node.op, node.name, target, args, kwargs, stack, wrapped))
    return records


def decode(records: list[_NodeRecord]) -> fx.Graph:
    """The graph that `encode` was given."""
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}

    def value(entry: Any) -> Any:
        if isinstance(entry, _NodeName):
            return made[entry.name]
        if type(entry) in (tuple, list):
            return type(entry)(value(item) for item in entry)
        if type(entry) is dict:
            return {key: value(item) for key, item in entry.items()}
        if type(entry) is slice:
            return slice(value(entry.start), value(entry.stop), value(entry.step))
        return entry

    for record in records:
        target = record.target
        if isinstance(target, _TorchName):
            target = operator.attrgetter(target.name)(torch)
        node = graph.create_node(
            record.op, target, value(record.args), value(record.kwargs), name=record.name
        )
        node.meta["nn_module_stack"] = collections.OrderedDict(record.stack)
        if record.wrapped:
            node.meta["is_wrapped"] = True
        made[record.name] = node
    return graph


def _plain(value: Any) -> Any:
    """The immutable containers of fx as ordinary ones."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if type(value) is tuple:
        return tuple(_plain(item) for item in value)
    if isinstance(value, slice):
        return slice(_plain(value.start), _plain(value.stop), _plain(value.step))
    return value


def _torch_name(target: Any) -> _TorchName | None:
    """Name a function of torch: pickle cannot find some of its builtins by itself."""
    home = getattr(target, "__module__", None) or "torch"
    name = getattr(target, "__name__", "")
    if home != "torch" and not home.startswith("torch."):
        return None
    for path in (name, f"{home[6:]}.{name}" if home != "torch" else name, f"nn.functional.{name}"):
        try:
            if operator.attrgetter(path)(torch) is target:
                return _TorchName(path)
        except AttributeError:
            continue
    return None


def _type_name(kind: Any) -> str:
    return kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"


__all__ = [
    "GraphForward",
    "Program",
    "RewrittenModule",
    "assemble",
    "attach",
    "attached",
]
