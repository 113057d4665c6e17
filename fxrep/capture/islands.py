"""From a user's model to graphs: one graph of the whole model, or islands where it does not trace.

The user's model is neither run nor changed: everything happens on a skeleton, a copy of the module
tree that shares the parameters and buffers. A forward that a trace would not reproduce (control
flow on values, state kept between calls, autocast, random numbers) stays as it is, and its
submodules are captured on their own: a graph of a submodule is an island in Python code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from fxrep.capture.aten import respelled
from fxrep.capture.mentions import Mentions
from fxrep.capture.signature import Arguments
from fxrep.capture.skeleton import (
    check,
    named_inputs,
    named_tensors,
    skeleton,
    unwrap,
)
from fxrep.capture.state import restore_tensors
from fxrep.capture.substitution import with_names
from fxrep.capture.trace import Traced, Untraceable, trace
from fxrep.ops.owner import foreign_hooks, is_leaf
from fxrep.report import Skip

_PASS = "capture"


_GRAPH_MODULE_NAMES = set(dir(fx.GraphModule)) - set(dir(nn.Module))


def _attributes(module: nn.Module) -> set[str]:
    """The names a module itself gives to submodules, tensors and everything else."""
    return {*vars(module), *module._modules, *module._parameters, *module._buffers}


@dataclass
class Program:
    """One forward as a graph, to be rewritten in place.

    Attributes:
        path: module path in the tree; '' for the whole model.
        module: the skeleton's module whose forward is traced; targets are relative to it.
        graph: the trace; its nodes carry `meta["nn_module_stack"]`.
        arguments: the forward's arguments; specialised ones are constants of the graph.
        keep_modules: other code still calls or reads the submodules, so that none may be removed.
        ranks: the ranks of tensors in the graph, as far as they are certain from outside.
    """

    path: str
    module: nn.Module
    graph: fx.Graph
    arguments: Arguments
    keep_modules: bool = False
    ranks: Mapping[fx.Node, int] = field(default_factory=dict)

    @property
    def is_root(self) -> bool:
        """Whether the graph becomes the whole model as a GraphModule.

        Hooks need the class they were made for, and attributes named like a GraphModule's own
        (`code`, `graph`, `meta`) need one that has them free.
        """
        taken = _GRAPH_MODULE_NAMES & _attributes(self.module)
        is_graph_module = isinstance(self.module, fx.GraphModule)
        free = is_graph_module or not (taken or foreign_hooks(self.module))
        return self.path == "" and free


@dataclass
class Capture:
    """A model's graphs.

    Attributes:
        model: the user's model, without wrappers.
        tree: its skeleton.
        programs: the graphs, parents before children.
        skipped: the modules that were not captured, and why.
    """

    model: nn.Module
    tree: nn.Module
    programs: list[Program] = field(default_factory=list)
    skipped: list[Skip] = field(default_factory=list)


def capture(model: nn.Module, example_inputs: object = None) -> Capture:
    """Trace a model, or every part of it that traces.

    Args:
        model: a module in eval mode, or the module of an exported program; the wrappers of
            torch.compile and DataParallel are taken off.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments.

    Returns:
        The skeleton and its programs: one with path '' when the whole forward traces, otherwise
        one per traceable submodule, parents before children.

    Raises:
        ModelError: no module, in training mode, or weights that are no plain tensors.
        InputError: example_inputs do not fit the forward's signature.
    """
    model = respelled(unwrap(model))
    check(model)
    tree = skeleton(model)
    given = named_inputs(tree, example_inputs)
    explorer = _Explorer(Capture(model, tree), given)
    with_names(tree, lambda: explorer.explore(tree, "", (), mode="whole", keep=False))
    restore_tensors(tree, model)
    _keep_shared(explorer.capture.programs)
    return explorer.capture


@dataclass(frozen=True)
class _Reader:
    """A forward above an island that still runs as Python code.

    Attributes:
        path: path of its module in the tree.
        module: whose forward it is.
        code: the names that the forward mentions.
    """

    path: str
    module: nn.Module
    code: Mentions

    @classmethod
    def of(cls, path: str, module: nn.Module) -> _Reader:
        """The forward of a module."""
        return cls(path, module, Mentions.of_forward(module))


class _Explorer:
    """Captures a module, or goes on with its children if it does not trace; each module once."""

    def __init__(self, capture: Capture, given: Mapping[str, object]) -> None:
        self.capture = capture
        self.given = given
        self.seen: set[int] = set()

    def explore(
        self,
        module: nn.Module,
        path: str,
        readers: tuple[_Reader, ...],
        *,
        mode: str,
        keep: bool,
    ) -> None:
        """Capture the module, or the modules below it.

        Args:
            module: a module of the skeleton.
            path: its path in the tree.
            readers: the Python code above it that still runs.
            mode: how that code uses a Sequential: called 'whole', by 'items', 'both', or 'unknown'.
            keep: the code above may reach into the module's children.
        """
        if id(module) in self.seen:
            return
        self.seen.add(id(module))
        if isinstance(module, nn.ModuleList | nn.ModuleDict):
            self._children(module, path, readers)
            return
        if path and (is_leaf(module) or not any(True for _ in named_tensors(module))):
            return
        hooks = foreign_hooks(module)
        reason = _weights_are_read(readers, hooks)
        if reason is not None:
            self._skip(path, reason)
            return
        if mode == "items" and isinstance(module, nn.Sequential):
            self._children(module, path, readers)
            return
        try:
            traced = trace(module, self.given if not path else None)
        except Untraceable as error:
            self._leave_as_it_is(module, path, readers, error)
            return
        # A hook is given the module, and may reach into it.
        self._add_program(module, path, readers, traced, keep=keep or bool(hooks))
        if path and traced.arguments.are_narrowed:
            readers = (*readers, _Reader.of(path, module))
        self._opaque(path, readers, traced)
        if mode == "both" and isinstance(module, nn.Sequential):
            self._children(module, path, readers)

    def _leave_as_it_is(
        self, module: nn.Module, path: str, readers: tuple[_Reader, ...], error: Untraceable
    ) -> None:
        """Go on below a module that does not trace, unless it writes parameters."""
        if error.frozen:
            self._skip(path, f"left alone: {error.reason}")
            return
        self._skip(path, f"runs as it is: {error.reason}")
        self._children(module, path, (*readers, _Reader.of(path, module)))

    def _add_program(
        self,
        module: nn.Module,
        path: str,
        readers: tuple[_Reader, ...],
        traced: Traced,
        *,
        keep: bool,
    ) -> None:
        program = Program(path, module, traced.graph, traced.arguments)
        program.keep_modules = (
            keep
            or (traced.arguments.are_narrowed and not program.is_root)
            or any(reader.code.reaches(module) for reader in readers)
        )
        self.capture.programs.append(program)

    def _opaque(self, path: str, readers: tuple[_Reader, ...], traced: Traced) -> None:
        """Go on with the modules that a graph calls as they are."""
        for opaque in traced.opaque:
            where = f"{path}.{opaque.path}" if path else opaque.path
            if opaque.frozen:
                self.seen.add(id(opaque.module))
                self._skip(where, f"left alone: {opaque.reason}")
                continue
            if opaque.reason == "hook registered":
                self._skip(where, "hook registered: captured on its own")
            self.explore(opaque.module, where, readers, mode="whole", keep=False)

    def _children(self, module: nn.Module, path: str, readers: tuple[_Reader, ...]) -> None:
        """Go on with the children of a module."""
        direct = bool(readers) and readers[-1].module is module
        for name, child in module.named_children():
            where = f"{path}.{name}" if path else name
            mode, keep = "whole", False
            if isinstance(child, nn.Sequential):
                mode = readers[-1].code.use(name) if direct else "unknown"
                keep = mode != "whole"
            self.explore(child, where, readers, mode=mode, keep=keep)

    def _skip(self, path: str, reason: str) -> None:
        self.capture.skipped.append(Skip(_PASS, path, reason))


def _weights_are_read(readers: tuple[_Reader, ...], hooks: Sequence[Any]) -> str | None:
    """Why the weights of a module must stay: Python code that still runs reads weights by name."""
    names = Mentions.of_hooks(hooks).weights(None) if hooks else ""
    if names:
        return f"a hook reads {names} below it"
    for reader in readers:
        names = reader.code.weights(reader.module)
        if names:
            where = reader.path or "the model"
            return f"the forward of {where} stays and reads {names} of modules"
    return None


def _keep_shared(programs: list[Program]) -> None:
    """Keep the modules that several programs call: none may take them away from the others."""
    users: dict[int, list[Program]] = {}
    for program in programs:
        for key in {id(module) for module in _called(program)}:
            users.setdefault(key, []).append(program)
    islands = {id(program.module) for program in programs}
    for key, sharing in users.items():
        if len(sharing) > 1 and key not in islands:
            for program in sharing:
                program.keep_modules = True


def _called(program: Program) -> Iterator[nn.Module]:
    """The modules that a graph calls, or whose tensors it reads."""
    for node in program.graph.nodes:
        if node.op == "call_module":
            yield program.module.get_submodule(str(node.target))
        elif node.op == "get_attr":
            yield program.module.get_submodule(str(node.target).rpartition(".")[0])
