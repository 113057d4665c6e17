"""From a user's model to graphs: one graph of the whole model, or islands where it does not trace.

The user's model is neither run nor changed: capture works on a skeleton, a copy of the module tree
that shares the parameters and buffers. A forward that a graph cannot reproduce (control flow on
values, state kept between calls, autocast, random numbers) stays Python code, and its submodules
are captured one by one. The graph of such a submodule is an island: Python code calls it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn

from fxrep.capture.aten import respelled
from fxrep.capture.mentions import Mentions, Use
from fxrep.capture.sharing import Reached, of_tree
from fxrep.capture.signature import Arguments
from fxrep.capture.skeleton import (
    check,
    named_inputs,
    named_tensors,
    skeleton,
    unwrap,
)
from fxrep.capture.state import restore_tensors
from fxrep.capture.substitution import with_traceable_names
from fxrep.capture.trace import Traced, Untraceable, trace
from fxrep.ops.calls import Calls
from fxrep.ops.owner import foreign_hooks, is_leaf, own_calls
from fxrep.report import Skip

_PASS = "capture"

_GRAPH_MODULE_NAMES = set(dir(fx.GraphModule)) - set(dir(nn.Module))


def _around(module: nn.Module) -> list[Any]:
    """The code that a call of a module runs around its forward."""
    return [*foreign_hooks(module), *own_calls(module)]


def _attributes(module: nn.Module) -> set[str]:
    """The names of a module's own submodules, tensors and other attributes."""
    return {*vars(module), *module._modules, *module._parameters, *module._buffers}


@dataclass
class Program:
    """One forward as a graph, to be rewritten in place.

    Attributes:
        path: module path in the tree; '' for the whole model.
        module: the skeleton's module whose forward is traced; targets of nodes start there.
        graph: the trace; its nodes carry `meta["nn_module_stack"]`.
        arguments: the forward's arguments; specialised ones are constants of the graph.
        keep_modules: other code still calls or reads the submodules: none may be removed.
        ranks: ranks of values that the caller guarantees.
        dtypes: dtypes of values that the caller guarantees.
    """

    path: str
    module: nn.Module
    graph: fx.Graph
    arguments: Arguments
    keep_modules: bool = False
    ranks: Mapping[fx.Node, int] = field(default_factory=dict)
    dtypes: Mapping[fx.Node, torch.dtype] = field(default_factory=dict)

    @cached_property
    def calls(self) -> Calls:
        """The operators that the nodes of the graph call."""
        return Calls(self.module)

    @property
    def is_root(self) -> bool:
        """Whether the graph becomes the whole model as a GraphModule.

        A model keeps its class if it has hooks or a `__call__` of its own, which may rely on the
        class, or attributes that a GraphModule needs for itself (`code`, `graph`, `meta`).
        """
        taken = _GRAPH_MODULE_NAMES & _attributes(self.module)
        is_graph_module = isinstance(self.module, fx.GraphModule)
        free = is_graph_module or not (taken or _around(self.module))
        return self.path == "" and free


@dataclass
class Capture:
    """A model's graphs.

    Attributes:
        model: the user's model, without the wrappers of torch.compile and DataParallel.
        tree: its skeleton.
        programs: the graphs, parents before children.
        skipped: the modules that stay Python code, and why.
        reached: the tensors that the model and its code reach.
    """

    model: nn.Module
    tree: nn.Module
    programs: list[Program] = field(default_factory=list)
    skipped: list[Skip] = field(default_factory=list)
    reached: Sequence[Reached] = ()


def capture(
    model: nn.Module, example_inputs: object = None, refused: Mapping[str, str] | None = None
) -> Capture:
    """Trace a model, or every part of it that traces.

    Args:
        model: a module in eval mode, or the module of an exported program; the wrappers of
            torch.compile and DataParallel are taken off.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments.
        refused: modules that are to stay Python code, by path, and why.

    Returns:
        The skeleton and its programs: one with path '' when the whole forward traces, otherwise
        one per traceable submodule, parents before children.

    Raises:
        ModelError: no module, in training mode, or weights that are no plain tensors.
        InputError: example_inputs do not fit the forward's signature.
    """
    model = respelled(unwrap(model))
    check(model)
    found = of_tree(model)
    tree = skeleton(model, found)
    examples = named_inputs(tree, example_inputs)
    explorer = _Explorer(Capture(model, tree, reached=found), examples, refused or {})
    with_traceable_names(
        tree, lambda: explorer.explore(tree, "", (), use="whole", keep_modules=False)
    )
    restore_tensors(tree, model)
    _keep_shared_modules(explorer.capture.programs)
    return explorer.capture


@dataclass(frozen=True)
class _PythonForward:
    """A forward above an island that still runs as Python code.

    Attributes:
        path: path of its module in the tree.
        module: the module.
        mentions: the names in its code.
    """

    path: str
    module: nn.Module
    mentions: Mentions

    @classmethod
    def of(cls, path: str, module: nn.Module) -> _PythonForward:
        """The forward of a module."""
        return cls(path, module, Mentions.of_forward(module))


class _Explorer:
    """Captures a module or, if it does not trace, the modules below it; each module once.

    Args:
        capture: takes the programs and the skipped modules.
        examples: the example inputs of the whole model, by argument.
        refused: modules that are to stay Python code, by path, and why.
    """

    def __init__(
        self, capture: Capture, examples: Mapping[str, object], refused: Mapping[str, str]
    ) -> None:
        self.capture = capture
        self.examples = examples
        self.refused = refused
        tree = capture.tree
        self.refused_modules = {tree.get_submodule(path): why for path, why in refused.items()}
        self.seen: set[int] = set()

    def explore(
        self,
        module: nn.Module,
        path: str,
        above: tuple[_PythonForward, ...],
        *,
        use: Use,
        keep_modules: bool,
    ) -> None:
        """Capture the module, or the modules below it.

        Args:
            module: a module of the skeleton.
            path: its path in the tree.
            above: the forwards above it that still run, from the root down.
            use: how the code above uses the module, if it is a Sequential.
            keep_modules: the code above may read the module's children.
        """
        if id(module) in self.seen:
            return
        self.seen.add(id(module))
        if isinstance(module, nn.ModuleList | nn.ModuleDict):
            self._explore_children(module, path, above)
            return
        if path and (is_leaf(module) or not any(True for _ in named_tensors(module))):
            return
        hooks = _around(module)
        reason = _reads_weights(above, hooks)
        if reason is not None:
            self._skip(path, reason)
            return
        if use == "items" and isinstance(module, nn.Sequential):
            self._explore_children(module, path, above)
            return
        if path in self.refused:
            self._skip(path, f"runs as it is: {self.refused[path]}")
            self._explore_children(module, path, (*above, _PythonForward.of(path, module)))
            return
        try:
            traced = trace(module, None if path else self.examples, self.refused_modules)
        except Untraceable as error:
            self._leave_as_it_is(module, path, above, error)
            return
        # A hook or a `__call__` is called with the module, and may read its children.
        self._add_program(module, path, above, traced, keep_modules=keep_modules or bool(hooks))
        if path and traced.arguments.are_narrowed:
            above = (*above, _PythonForward.of(path, module))
        self._explore_opaque(path, above, traced)
        if use == "both" and isinstance(module, nn.Sequential):
            self._explore_children(module, path, above)

    def _leave_as_it_is(
        self, module: nn.Module, path: str, above: tuple[_PythonForward, ...], error: Untraceable
    ) -> None:
        """Explore the children of a module that does not trace, unless it writes parameters."""
        if error.frozen:
            self._skip(path, f"left alone: {error.reason}")
            return
        self._skip(path, f"runs as it is: {error.reason}")
        self._explore_children(module, path, (*above, _PythonForward.of(path, module)))

    def _add_program(
        self,
        module: nn.Module,
        path: str,
        above: tuple[_PythonForward, ...],
        traced: Traced,
        *,
        keep_modules: bool,
    ) -> None:
        program = Program(path, module, traced.graph, traced.arguments)
        program.keep_modules = (
            keep_modules
            or (traced.arguments.are_narrowed and not program.is_root)
            or any(forward.mentions.reaches(module) for forward in above)
        )
        self.capture.programs.append(program)

    def _explore_opaque(self, path: str, above: tuple[_PythonForward, ...], traced: Traced) -> None:
        """Explore the modules that a graph calls as they are."""
        for opaque in traced.opaque:
            where = f"{path}.{opaque.path}" if path else opaque.path
            if opaque.frozen:
                self.seen.add(id(opaque.module))
                self._skip(where, f"left alone: {opaque.reason}")
                continue
            if opaque.hooked:
                self._skip(where, "hook registered: captured on its own")
            self.explore(opaque.module, where, above, use="whole", keep_modules=False)

    def _explore_children(
        self, module: nn.Module, path: str, above: tuple[_PythonForward, ...]
    ) -> None:
        is_own_forward = bool(above) and above[-1].module is module
        for name, child in module.named_children():
            where = f"{path}.{name}" if path else name
            use: Use = "whole"
            if isinstance(child, nn.Sequential):
                use = above[-1].mentions.use_of(name) if is_own_forward else "unknown"
            self.explore(child, where, above, use=use, keep_modules=use != "whole")

    def _skip(self, path: str, reason: str) -> None:
        self.capture.skipped.append(Skip(_PASS, path, reason))


def _reads_weights(above: tuple[_PythonForward, ...], hooks: Sequence[Any]) -> str | None:
    """Why a module must stay as it is: Python code that still runs reads weights by name."""
    names = Mentions.of_hooks(hooks).weights(None) if hooks else ""
    if names:
        return f"a hook or its own __call__ reads {names} below it"
    for forward in above:
        names = forward.mentions.weights(forward.module)
        if names:
            where = forward.path or "the model"
            return f"the forward of {where} stays and reads {names} of modules"
    return None


def _keep_shared_modules(programs: list[Program]) -> None:
    """Keep all modules of programs that use a module together: each needs it as it was."""
    users: dict[int, list[Program]] = {}
    for program in programs:
        for key in {id(module) for module in _used_modules(program)}:
            users.setdefault(key, []).append(program)
    islands = {id(program.module) for program in programs}
    for key, sharing in users.items():
        if len(sharing) > 1 and key not in islands:
            for program in sharing:
                program.keep_modules = True


def _used_modules(program: Program) -> Iterator[nn.Module]:
    """The modules that a graph calls, or whose tensors it reads."""
    for node in program.graph.nodes:
        if node.op == "call_module":
            yield program.module.get_submodule(str(node.target))
        elif node.op == "get_attr":
            yield program.module.get_submodule(str(node.target).rpartition(".")[0])
