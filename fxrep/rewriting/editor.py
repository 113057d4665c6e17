"""The only door to a graph that is rewritten: every change is made here, and announced here.

Given: a plan for ``x -> conv -> bn -> y`` and the path of its layer.

Result: the graph calls the new layer, ``conv`` and ``bn`` are erased, and whoever keeps facts about
the graph has been told which nodes read other values than before, and which value took the place of
which. A caller cannot forget to tell, for there is no change without the announcement.
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
    """Keeps facts about a graph, and hears of every change of it."""

    def invalidate(self, *nodes: fx.Node) -> None:
        """These nodes have other operands or readers than before, or were erased."""

    def replacing(self, new: fx.Node, old: fx.Node) -> None:
        """The value `new`, equal to `old`, is about to be read in its place."""

    def installed(self, path: str) -> None:
        """Another module is registered at `path`; no node calls it yet."""


@dataclass(eq=False)
class Editor:
    """Changes the graph of one program.

    Attributes:
        graph: of the program.
        module: to which the targets of the graph refer.
        names: of the modules and tensors that the graph uses.
        listeners: hear of every change.
    """

    graph: fx.Graph
    module: nn.Module
    names: Names
    listeners: list[Listener] = field(default_factory=list)

    # --- the changes that a graph can undergo: everything below is made of these -----------------

    def make(
        self, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> fx.Node:
        """Create a node at the graph's insert point."""
        node = self.graph.create_node(op, target, args, kwargs)
        self.names.made(node)
        self._changed(node, *node.all_input_nodes)
        return node

    def reread(self, reader: fx.Node, old: fx.Node, new: Any) -> None:
        """Let `reader` read `new`, a node or a constant, instead of `old`."""
        reader.args = fx.map_arg(reader.args, lambda node: new if node is old else node)
        reader.kwargs = fx.map_arg(reader.kwargs, lambda node: new if node is old else node)
        # A reading can include the readers: the writes to the border of a padding, a part's chunk.
        self._changed(reader, old, *reader.all_input_nodes, *reader.users)

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Let all readers of `old` read `new`, an equal value."""
        for listener in self.listeners:
            listener.replacing(new, old)
        for reader in list(old.users):
            self.reread(reader, old, new)

    def erase(self, node: fx.Node) -> None:
        """Remove a node without readers, and the reads of tensors that only this node had."""
        operands = self._erase(node)
        for operand in operands:
            if operand.op == "get_attr" and not operand.users:
                self._erase(operand)

    def install(self, path: str, module: nn.Module) -> None:
        """Register a layer at a path that is free, before a node calls it."""
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
        self.names.erased(node)
        self._changed(node, *operands)
        return operands

    def _changed(self, *nodes: fx.Node) -> None:
        for listener in self.listeners:
            listener.invalidate(*nodes)

    # --- what rewrites do ------------------------------------------------------------------------

    def carry_out(self, plan: Plan, targets: Sequence[str]) -> fx.Node:
        """Put calls of the layers at `targets` in place of a plan's region.

        Returns:
            The new value.
        """
        readers = metadata_readers(plan)
        single = len(plan.pieces) == 1
        first = min([plan.root, *readers]) if single else plan.root
        if plan.outputs:  # their readers may come before the last of them
            first = plan.region[0]
        total: fx.Node
        with self.graph.inserting_before(first):
            make = functools.partial(self._make_for, plan)
            total, values = replacement(plan, targets, lambda source: source, make)
        for reader in readers:
            for node in reader.all_input_nodes:
                if node in plan.region:
                    self.reread(reader, node, _substitute(plan, node, values))
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

    def write(self, node: fx.Node, value: Any) -> None:
        """Write a constant that is no tensor where the readers of `node` read it."""
        for reader in list(node.users):
            self.reread(reader, node, value)
        self.erase_tree(node)

    def store(self, node: fx.Node, value: Tensor) -> tuple[str, Tensor]:
        """Store the constant value of `node` near where it was computed, and let it be read there.

        A buffer even if it comes from parameters: the value it replaces needed no gradient under
        no_grad, and attention takes a slower kernel for a mask that does.

        Returns:
            The path of the stored tensor, and the tensor.
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
        """Remove a node without readers, and all nodes above it that are left without readers."""
        doomed = [node]
        while doomed:
            each = doomed.pop()
            if each._erased or each.users or each.op in ("placeholder", "output"):
                continue
            doomed.extend(self._erase(each))

    def guard(self, node: fx.Node, rank: int) -> None:
        """Make the rewritten graph refuse inputs of another rank than the one assumed."""
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
    """A value of the same shape, or at least dtype, as a node of the region."""
    if plan.outputs:  # each comes before the output that it leads to
        place = next(i for i, (root, _) in enumerate(plan.outputs) if _leads_to(node, root))
        return values[place]
    return values[0] if len(plan.pieces) == 1 else min(piece.source for piece in plan.pieces)


def _leads_to(node: fx.Node, root: fx.Node) -> bool:
    """Whether a value is that of a root, or reaches it through operations with one operand."""
    while root is not node and len(root.all_input_nodes) == 1:
        root = root.all_input_nodes[0]
    return root is node
