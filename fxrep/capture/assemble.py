"""From rewritten graphs back to a module that looks like the user's.

The graph of a whole model becomes a `torch.fx.GraphModule` with the model's class name, attributes
and signature. A module whose graph is an island keeps its class, attributes and methods, because
the code above it reads them; only its `forward` is replaced.
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

from fxrep.capture.islands import Capture
from fxrep.capture.sharing import of_tree
from fxrep.capture.signature import Arguments, KeepSignature, same_value
from fxrep.capture.skeleton import duplicate, empty_dicts
from fxrep.report import Report

_REPORT = "_fxrep_report"


def assemble(capture: Capture) -> nn.Module:
    """Build the optimized module, which shares nothing with the user's model.

    Args:
        capture: the rewritten programs; `program.module` has the submodules that they call.

    Returns:
        A GraphModule when the whole forward was traced, otherwise the model's own class.
    """
    for program in capture.programs:
        if isinstance(program.module, fx.GraphModule):  # a copy holds only what its graph reads
            program.module.__dict__["_graph"] = program.graph
    memo = _copy_memo(capture)
    tree = duplicate(capture.tree, memo, of_tree(capture.tree, _idle_modules(capture)))
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
    """Store the report on the module, and thereby in its copies and pickles."""
    module.__dict__[_REPORT] = report


def attached(module: nn.Module) -> Report | None:
    """The report stored on the module, if any."""
    found = module.__dict__.get(_REPORT)
    return found if isinstance(found, Report) else None


def _copy_memo(capture: Capture) -> dict[int, Any]:
    """A deepcopy memo with which the user's tensors are copied, those of rewrites are not."""
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


def _idle_modules(capture: Capture) -> set[int]:
    """The modules whose forward a graph has replaced, by id."""
    idle: set[int] = set()
    for program in capture.programs:
        if program.arguments.are_narrowed and not program.is_root:
            continue  # a call that the graph does not take runs the forward
        called = {str(node.target) for node in program.graph.find_nodes(op="call_module")}
        modules = [program.module.get_submodule(path) for path in called]
        running = {id(each) for module in modules for each in module.modules()}
        idle |= {id(module) for module in program.module.modules()} - running
    return idle


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
    """Give a forward the signature of the original forward, annotations included."""
    first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if arguments.parameters and arguments.parameters[0].kind is first.POSITIONAL_ONLY:
        first = first.replace(kind=first.POSITIONAL_ONLY)
    parameters = [first, *arguments.declared]
    forward.__signature__ = inspect.Signature(parameters, return_annotation=arguments.returns)  # type: ignore[attr-defined]


class RewrittenModule(fx.GraphModule):
    """A GraphModule with the root's attributes and signature; copies and pickles keep them."""

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


class GraphForward:
    """The forward of an island: runs the graph on its module.

    A call with other arguments than the constants of the graph runs the original forward.
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
        self.positions = {p.name: index for index, p in enumerate(arguments.parameters)}
        self.names = {p.name for p in arguments.parameters if p.kind is not p.POSITIONAL_ONLY}
        keywords = {p.name for p in arguments.parameters if p.kind is p.KEYWORD_ONLY}
        self.max_positional = len(self.positions) - len(keywords)
        self.constants = [
            (name, None if name in keywords else self.positions[name], value)
            for name, value in arguments.specialized.items()
        ]

    @property
    def __code__(self) -> Any:
        """The code of the function that runs the graph: torch.export reads it of every forward."""
        return self.run.__code__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph or, for arguments that it does not fit, the original forward."""
        if self._fits(args, kwargs):
            return self.run(self.module, *args, **kwargs)
        if self.original is not None:
            return self.original(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def _fits(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the graph computes what the original forward computes of these arguments."""
        if len(args) > self.max_positional:
            return False
        for name in kwargs:
            if name not in self.names:
                return False
        for name, position, value in self.constants:
            if position is not None and position < len(args):
                if not same_value(args[position], value):
                    return False
            elif name in kwargs and not same_value(kwargs[name], value):
                return False
        for name in self.arguments.required:
            position = self.positions[name]
            if (args[position] if position < len(args) else kwargs.get(name)) is None:
                return False
        for name in self.arguments.tensors:
            position = self.positions[name]
            given = args[position] if position < len(args) else kwargs.get(name)
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
# fx pickles the generated source and traces it again. That loses constant arguments and in-place
# operators, which a Proxy cannot express; records of the nodes rebuild the same graph.


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


def _name_of(node: fx.Node) -> Any:
    return _NodeName(node.name)


def encode(graph: fx.Graph) -> list[_NodeRecord]:
    """The graph as plain records."""
    records = []
    for node in graph.nodes:
        target = node.target
        if node.op == "call_function":
            target = _torch_name(target) or target
        args, kwargs = (_plain(fx.map_arg(entry, _name_of)) for entry in (node.args, node.kwargs))
        stack = [
            (key, (path, _type_name(kind)))
            for key, (path, kind) in node.meta.get("nn_module_stack", {}).items()
        ]
        wrapped = bool(node.meta.get("is_wrapped"))
        records.append(_NodeRecord(node.op, node.name, target, args, kwargs, stack, wrapped))
    return records


def decode(records: list[_NodeRecord]) -> fx.Graph:
    """The graph of the records that `encode` made."""
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
    """The name of a function of torch, for builtins that pickle cannot find by itself."""
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
