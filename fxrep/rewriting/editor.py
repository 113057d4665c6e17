"""The editor of a graph: every change of the graph is made here, and listeners hear of it.

Given: a plan for ``x -> conv -> bn -> y`` and the path of its layer.

Result: the graph calls the new layer, and ``conv`` and ``bn`` are erased. The caches of facts about
the graph, which listen, know which nodes read other values than before and which value took the
place of which. A caller cannot forget to tell them.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from fxrep.planning.plan import Plan, metadata_readers
from fxrep.reading.view import scope
from fxrep.rewriting.naming import Names
from fxrep.rewriting.replacement import replacement


class Listener(Protocol):
    """An object that keeps facts about a graph and hears of every change of the graph."""

    def invalidate(self, *nodes: fx.Node) -> None:
        """Hear that these nodes have other operands or readers than before, or were erased."""

    def replacing(self, new: fx.Node, old: fx.Node) -> None:
        """Hear that the value `new`, equal to `old`, is about to take its place."""

    def installed(self, path: str) -> None:
        """Hear that another module was registered at `path`; no node calls it yet."""


@dataclass(eq=False)
class Editor:
    """Changes the graph of one program.

    Attributes:
        graph: the graph.
        module: the module that the targets of the graph refer to.
        names: the paths of modules and tensors that the graph uses.
        listeners: objects that hear of every change.
    """

    graph: fx.Graph
    module: nn.Module
    names: Names
    listeners: list[Listener] = field(default_factory=list)

    # --- the elementary changes ------------------------------------------------------------------

    def make(
        self, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> fx.Node:
        """Create a node at the graph's insert point."""
        node = self.graph.create_node(op, target, args, kwargs)
        self.names.add(node)
        self._changed(node, *node.all_input_nodes)
        return node

    def replace_input(self, reader: fx.Node, old: fx.Node, new: Any) -> None:
        """Let `reader` read `new`, a node or a constant, instead of `old`."""
        reader.args = fx.map_arg(reader.args, lambda node: new if node is old else node)
        reader.kwargs = fx.map_arg(reader.kwargs, lambda node: new if node is old else node)
        # The operation may be part of the reading of one of its readers, or of a value that it
        # writes: invalidate both.
        self._changed(reader, old, *reader.all_input_nodes, *reader.users)

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Let all readers of `old` read `new`, an equal value."""
        for listener in self.listeners:
            listener.replacing(new, old)
        for reader in list(old.users):
            self.replace_input(reader, old, new)

    def erase(self, node: fx.Node) -> None:
        """Remove a node without readers, and the `get_attr` nodes that it alone read."""
        operands = self._erase(node)
        for operand in operands:
            if operand.op == "get_attr" and not operand.users:
                self._erase(operand)

    def install(self, path: str, module: nn.Module) -> None:
        """Register a layer at a free path, before a node calls it."""
        owner, _, name = path.rpartition(".")
        parent = self.module.get_submodule(owner)
        if name in parent._parameters or name in parent._buffers:
            delattr(parent, name)
        parent.add_module(name, module)
        for listener in self.listeners:
            listener.installed(path)

    def _erase(self, node: fx.Node) -> list[fx.Node]:
        operands = node.all_input_nodes
        self.graph.erase_node(node)
        self.names.remove(node)
        self._changed(node, *operands)
        return operands

    def _changed(self, *nodes: fx.Node) -> None:
        for listener in self.listeners:
            listener.invalidate(*nodes)

    # --- changes that rewrites need --------------------------------------------------------------

    def carry_out(self, plan: Plan, targets: Sequence[str]) -> fx.Node:
        """Put calls of the layers at `targets` in place of a plan's region.

        Returns:
            The new value.
        """
        readers = metadata_readers(plan)
        single = len(plan.pieces) == 1
        first = min([plan.root, *readers]) if single else plan.root
        if plan.outputs:  # readers of one output may come before the next output
            first = plan.region[0]
        total: fx.Node
        with self.graph.inserting_before(first):
            make = functools.partial(self._make_for, plan)
            total, values = replacement(plan, targets, lambda source: source, make)
        for reader in readers:
            for node in reader.all_input_nodes:
                if node in plan.region:
                    self.replace_input(reader, node, _substitute(plan, node, values))
        for root, value in zip(plan.roots, values, strict=True):
            self.replace(root, value)
        for node in reversed(plan.region):
            self.erase(node)
        return total

    def _make_for(
        self, plan: Plan, op: str, target: Any, args: tuple[Any, ...], kwargs: Any = None
    ) -> fx.Node:
        node = self.make(op, target, args, kwargs)
        stack = plan.root.meta.get("nn_module_stack")
        if stack:
            node.meta["nn_module_stack"] = dict(stack)
        return node

    def inline(self, node: fx.Node, value: Any) -> None:
        """Put a constant that is no tensor into the arguments of the readers of `node`."""
        for reader in list(node.users):
            self.replace_input(reader, node, value)
        self.erase_tree(node)

    def store(self, node: fx.Node, value: Tensor) -> tuple[str, Tensor]:
        """Store the constant value of `node` as a buffer of the module that computed it.

        It is a buffer even if it was computed from parameters: under no_grad the value needed no
        gradient, and attention takes a slower kernel for a mask that needs one.

        Returns:
            The path of the buffer, and the buffer.
        """
        owner = scope(node)
        try:
            parent = self.module.get_submodule(owner)
        except AttributeError:
            owner, parent = "", self.module
        name, number = "constant", 0
        while hasattr(parent, name):
            number += 1
            name = f"constant_{number}"
        value = value.detach().clone()
        parent.register_buffer(name, value)
        path = f"{owner}.{name}" if owner else name
        with self.graph.inserting_before(node):
            stored = self.make("get_attr", path, ())
        stored.meta = dict(node.meta)
        self.replace(node, stored)
        self.erase_tree(node)
        return path, value

    def erase_tree(self, node: fx.Node) -> None:
        """Remove a node without readers, and all nodes above it that then have no readers."""
        doomed = [node]
        while doomed:
            each = doomed.pop()
            if each._erased or each.users or each.op in ("placeholder", "output"):
                continue
            doomed.extend(self._erase(each))

    def guard(self, node: fx.Node, rank: int) -> None:
        """Make the graph raise if the value of `node` has another rank."""
        message = (
            f"fxrep: this model was optimized for a batched input of {rank} dimensions; "
            "pass example_inputs of another rank to fxrep.optimize to allow that"
        )
        with self.graph.inserting_after(node):
            ndim = self.make("call_function", getattr, (node, "ndim"))
        with self.graph.inserting_after(ndim):
            equal = self.make("call_function", operator.eq, (ndim, rank))
        with self.graph.inserting_after(equal):
            self.make("call_function", torch._assert, (equal, message))


def _substitute(plan: Plan, node: fx.Node, values: Sequence[fx.Node]) -> fx.Node:
    """A new value of the shape, or at least the dtype, that `node` of the region has."""
    if plan.outputs:  # `node` comes before the output that it leads to
        place = next(i for i, (root, _) in enumerate(plan.outputs) if _leads_to(node, root))
        return values[place]
    return values[0] if len(plan.pieces) == 1 else min(piece.source for piece in plan.pieces)


def _leads_to(node: fx.Node, root: fx.Node) -> bool:
    """Whether `root` is `node`, or is computed from it by operations with one operand each."""
    while root is not node and len(root.all_input_nodes) == 1:
        root = root.all_input_nodes[0]
    return root is node
