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
from torch._subclasses.fake_tensor import FakeTensorMode

from fxrep.capture.answers import Given, Prove, unproven
from fxrep.capture.aten import respelled
from fxrep.capture.code import Key
from fxrep.capture.graph_forward import unfused
from fxrep.capture.reach import Reach
from fxrep.capture.recorded import recorded
from fxrep.capture.sharing import Reached, of_tree
from fxrep.capture.signature import Arguments
from fxrep.capture.skeleton import (
    check,
    named_inputs,
    named_tensors,
    skeleton,
    unwrap,
)
from fxrep.capture.snapshot import Snapshot, check_shared_tensors
from fxrep.capture.substitution import with_traceable_names
from fxrep.capture.surroundings import Surroundings
from fxrep.capture.trace import Traced, Untraceable, trace
from fxrep.capture.uses import Use, unseen_write, unseen_write_of_hooks, use_of
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


@dataclass(eq=False)
class Program:
    """One forward as a graph, to be rewritten in place.

    Attributes:
        path: module path in the tree; '' for the whole model.
        module: the module that the targets of the graph refer to. It takes the new layers: nothing
            else refers to it, but for the layers and opaque modules that it has in common with
            `source`.
        graph: the trace; its nodes carry `meta["nn_module_stack"]`.
        arguments: the forward's arguments; specialised ones are constants of the graph.
        source: the module of the tree whose forward is traced; None if there is no tree.
        opaque: the modules below `source` that the graph calls as they are.
        guarded: places where the graph goes on with answers that hold for some inputs only. It
            asserts them; for other inputs the original forward runs.
        ran: the code that was traced, by `fxrep.capture.code.key`; None for any.
        ranks: ranks of values that the caller guarantees.
        dtypes: dtypes of values that the caller guarantees.
    """

    path: str
    module: nn.Module
    graph: fx.Graph
    arguments: Arguments
    source: nn.Module | None = None
    opaque: tuple[nn.Module, ...] = ()
    guarded: tuple[str, ...] = ()
    ran: frozenset[Key] | None = None
    ranks: Mapping[fx.Node, int] = field(default_factory=dict)
    dtypes: Mapping[fx.Node, torch.dtype] = field(default_factory=dict)

    @cached_property
    def calls(self) -> Calls:
        """The operators that the nodes of the graph call."""
        return Calls(self.module)

    @property
    def is_root(self) -> bool:
        """Whether the graph becomes the whole model as a GraphModule.

        A model keeps its class if the graph is guarded, for other inputs run the original; if it
        has hooks or a `__call__` of its own, which may rely on the class; or attributes that a
        GraphModule needs for itself (`code`, `graph`, `meta`).
        """
        if self.path or self.guarded:
            return False
        taken = _GRAPH_MODULE_NAMES & _attributes(self.module)
        return isinstance(self.module, fx.GraphModule) or not (taken or _around(self.module))


@dataclass
class Capture:
    """A model's graphs.

    Attributes:
        model: the user's model, without the wrappers of torch.compile and DataParallel.
        tree: its skeleton, which rewrites leave as it is.
        programs: the graphs, parents before children.
        skipped: the modules that stay Python code, and why.
        reached: the tensors that the model and its code reach.
        strays: what code reaches that ran though no name leads to it.
    """

    model: nn.Module
    tree: nn.Module
    programs: list[Program] = field(default_factory=list)
    skipped: list[Skip] = field(default_factory=list)
    reached: Sequence[Reached] = ()
    strays: dict[Any, Reach] = field(default_factory=dict)

    @cached_property
    def surroundings(self) -> Surroundings:
        """What copies of the model share with it."""
        return Surroundings(self.model, self.reached, self.strays)


def capture(
    model: nn.Module,
    example_inputs: object = None,
    refused: Mapping[str, str] | None = None,
    prove: Prove = unproven,
) -> Capture:
    """Trace a model, or every part of it that traces.

    Args:
        model: a module in eval mode, or the module of an exported program; the wrappers of
            torch.compile and DataParallel are taken off.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments.
        refused: modules that are to stay Python code, by path, and why.
        prove: proves answers to questions of the forwards that need no inputs.

    Returns:
        The skeleton and its programs: one with path '' when the whole forward traces, otherwise
        one per traceable submodule, parents before children.

    Raises:
        ModelError: no module, in training mode, or weights that are no plain tensors.
        InputError: example_inputs do not fit the forward's signature.
    """
    model = respelled(unwrap(model))
    check(model)
    model = unfused(model)
    found = of_tree(model)
    tree = skeleton(model, found)
    examples = _Examples(Capture(model, tree, reached=found), example_inputs)
    return with_traceable_names(tree, lambda: _explored(examples, refused or {}, prove))


class _Examples:
    """The user's inputs.

    Args:
        capture: the model, not yet captured.
        inputs: as given to `optimize`.
    """

    def __init__(self, capture: Capture, inputs: object) -> None:
        self.capture = capture
        self.inputs = inputs
        self.named = named_inputs(capture.tree, inputs)
        if inputs is not None:
            # Torch imports its compiler for the first one, which sets a variable of the
            # environment: not while a forward is watched.
            FakeTensorMode()

    def given(self, path: str) -> Given | None:
        """The arguments of a module, whose answers may be assumed."""
        if not any(isinstance(value, torch.Tensor) for value in self.named.values()):
            return None
        return self._recorded.get(path) if path else Given(self.named)

    @cached_property
    def _recorded(self) -> Mapping[str, Given]:
        capture = self.capture
        return recorded(capture.model, list(capture.reached), capture.surroundings, self.inputs)


def _explored(examples: _Examples, refused: Mapping[str, str], prove: Prove) -> Capture:
    """The graphs of a tree; none reads state that a forward was found to write."""
    capture = examples.capture
    state = Snapshot(capture.tree)
    capture.strays = state.strays
    for path, reason in refused.items():
        state.bar(capture.tree.get_submodule(path), reason)
    while True:
        explorer = _Explorer(capture, examples, state, prove)
        explorer.explore(capture.tree, "", use="whole")
        if not state.careful and state.is_written(whole=True):  # by another thread, uncounted
            state.careful = state.thorough = True
            state.restore()
        elif not state.bars_traced(state.traced):
            if state.refused:
                check_shared_tensors(capture.model, state.refused)
            return capture
        state.traced.clear()
        capture.programs.clear()
        capture.skipped.clear()


class _Explorer:
    """Captures a module or, if it does not trace, the modules below it; each module once.

    Args:
        capture: takes the programs and the skipped modules.
        examples: the example inputs.
        state: all that forwards of the tree can write, as it was before.
        prove: proves answers that need no inputs.
    """

    def __init__(
        self, capture: Capture, examples: _Examples, state: Snapshot, prove: Prove
    ) -> None:
        self.capture = capture
        self.prove = prove
        self.state = state
        self.examples = examples
        self.seen: set[int] = set()
        self.below_guarded = False

    def explore(self, module: nn.Module, path: str, *, use: Use) -> None:
        """Capture the module, or the modules below it.

        Args:
            module: a module of the skeleton.
            path: its path in the tree.
            use: how the code above uses the module, if it is a Sequential.
        """
        if id(module) in self.seen:
            return
        self.seen.add(id(module))
        if isinstance(module, nn.ModuleList | nn.ModuleDict):
            self._explore_children(module, path)
            return
        if path and (is_leaf(module) or not _has_tensors(module)):
            return
        hooks = _around(module)
        name = unseen_write_of_hooks(hooks, module) if hooks else None
        if name is not None:
            self._skip(path, f"left alone: a hook or its own __call__ may write through '{name}'")
            return
        if use == "items":
            self._explore_children(module, path)
            return
        try:
            traced = self._traced(module, path)
        except Untraceable as error:
            self._leave_as_it_is(module, path, error)
            return
        opaque = tuple(each.module for each in traced.opaque)
        program = Program(
            path,
            traced.module,
            traced.graph,
            traced.arguments,
            module,
            opaque,
            traced.guarded,
            traced.ran,
        )
        if traced.stray is not None and not program.is_root:
            # A graph beside Python code stands only for what its code reads, as long as it is that.
            reason = f"what it reads is not known: no name leads to {traced.stray}"
            self._leave_as_it_is(module, path, Untraceable(reason))
            return
        self.capture.programs.append(program)
        if traced.guarded:
            places = ", ".join(dict.fromkeys(traced.guarded))
            self._skip(path, f"guarded: other inputs may run the original forward ({places})")
        self._explore_opaque(path, traced)
        if traced.guarded:  # the original forward runs what traces below without guards
            outside, self.below_guarded = self.below_guarded, True
            self._explore_children(module, path)
            self.below_guarded = outside
        elif use != "whole":
            self._explore_children(module, path)

    def _traced(self, module: nn.Module, path: str) -> Traced:
        named = self.examples.named if not path else None
        given = None if self.below_guarded else self.examples
        inputs = (lambda: given.given(path)) if given else (lambda: None)
        return trace(module, self.state, named, inputs, self.prove)

    def _leave_as_it_is(self, module: nn.Module, path: str, error: Untraceable) -> None:
        """Explore the children of a module that does not trace, unless it writes parameters."""
        if error.frozen:
            self._skip(path, f"left alone: {error.reason}")
            return
        self._skip(path, f"runs as it is: {error.reason}")
        name = unseen_write([module.forward], module)
        if name is not None:
            where = path or "the model"
            self._skip(path, f"left alone below: the forward of {where} may write through '{name}'")
            return
        self._explore_children(module, path)
        for place in _normalizations(module, path):
            self._skip(place, "stays: the forward that calls it runs as it is")

    def _explore_opaque(self, path: str, traced: Traced) -> None:
        """Explore the modules that a graph calls as they are."""
        for opaque in traced.opaque:
            where = f"{path}.{opaque.path}" if path else opaque.path
            if opaque.frozen:
                self.seen.add(id(opaque.module))
                self._skip(where, f"left alone: {opaque.reason}")
                continue
            if opaque.hooked:
                self._skip(where, "hook registered: captured on its own")
            elif id(opaque.module) not in self.seen and not _has_tensors(opaque.module):
                self.seen.add(id(opaque.module))
                self._skip(where, f"runs as it is: {opaque.reason}")
                continue
            self.explore(opaque.module, where, use="whole")

    def _explore_children(self, module: nn.Module, path: str) -> None:
        for name, child in module.named_children():
            where = f"{path}.{name}" if path else name
            is_sequential = isinstance(child, nn.Sequential)
            self.explore(child, where, use=use_of(module, name) if is_sequential else "whole")

    def _skip(self, path: str, reason: str) -> None:
        self.capture.skipped.append(Skip(_PASS, path, reason))


def _normalizations(module: nn.Module, path: str) -> Iterator[str]:
    """The paths of the BatchNorms that the forward of a module calls itself.

    A list of modules has no forward: what it holds is called by the module that has the list.
    """
    for name, child in module.named_children():
        where = f"{path}.{name}" if path else name
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and is_leaf(child):
            yield where
        elif isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _normalizations(child, where)


def _has_tensors(module: nn.Module) -> bool:
    return any(True for _ in named_tensors(module))
