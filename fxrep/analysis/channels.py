"""The sizes of channel axes, without running the model.

Given::

    y -> PixelUnshuffle(2) -> x -> relu -> Conv2d(8, 16)

Result: axis -3 of x has size 8, for the convolution raises at anything else and relu changes no
size; that of y has size 2, and that of the convolution's result 16.

Axes are counted from the last, so that (C, H, W) and (N, C, H, W) need not be told apart. An
operation that counts from the first (BatchNorm1d, a positive `dim`) is used where the rank is
known.

A size is proven by the operation that makes the value, or by a reader that raises at other sizes;
both also through operations that keep the size. A reader that broadcasts proves nothing. BatchNorm
counts as raising, although it lets a value without elements pass.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, fx, nn

from fxrep.analysis import size_rules
from fxrep.analysis.size_rules import (
    NO_FACTS,
    RULES,
    AxisFacts,
    Proof,
    Size,
    concatenated,
    divided,
    known,
    unchanged,
)
from fxrep.ops.calls import Calls, ModuleTensor, target_name
from fxrep.ops.effects import effect
from fxrep.ops.values import value_type

# The most sizes asked for, and the most readers of a value looked at, to answer one question.
_MOST_ASKED = 128
_MOST_USERS = 32
_MOST_STEPS = 8
_MOST_AXES = 5

_Waiting = tuple[Size, Proof]


class Channels:
    """Sizes of the values of one graph, which may be rewritten meanwhile.

    Args:
        graph: as traced.
        calls: the calls of the graph.
        rank: gives the rank of a value, or None if it is not known.
    """

    def __init__(
        self, graph: fx.Graph, calls: Calls, rank: Callable[[fx.Node], int | None]
    ) -> None:
        self.rank = rank
        self._calls = calls
        self._known: dict[Size, int] = {}
        self._weights: dict[tuple[nn.Module, str], torch.Size | None] = {}
        # Where a shape changes in place, sizes depend on when they are read: none is certain.
        self._reshaped = any(_reshapes(calls, node) for node in graph.nodes)

    def of(self, node: fx.Node, axis: int) -> int | None:
        """The size of a value at an axis, counted from the last (-1); None if it is not certain."""
        goal = node, axis
        if axis >= 0 or self._reshaped or node._erased:
            return None
        # No recursion: graphs are deeper than Python's stack.
        asked, queue = {goal}, deque([goal])
        waiting: dict[Size, list[_Waiting]] = {}
        while queue and goal not in self._known:
            size = queue.popleft()
            for proof in self._proofs(*size):
                self._conclude(size, proof, waiting)
                if size in self._known:
                    break
                for premise in proof.premises:
                    waiting.setdefault(premise, []).append((size, proof))
                    if not (
                        premise in asked or premise in self._known or len(asked) >= _MOST_ASKED
                    ):
                        asked.add(premise)
                        queue.append(premise)
        return self._known.get(goal)

    def replacing(self, new: fx.Node, old: fx.Node) -> None:
        """Note that `new` has the sizes of `old`, whose place it takes."""
        for axis in range(-_MOST_AXES, 0):
            if (old, axis) in self._known:
                self._known.setdefault((new, axis), self._known[old, axis])

    def _conclude(self, size: Size, proof: Proof, waiting: dict[Size, list[_Waiting]]) -> None:
        """Apply a proof if its premises are known, and then the proofs that wait for the result."""
        ready: list[_Waiting] = [(size, proof)]
        while ready:
            size, proof = ready.pop()
            found = [self._known.get(premise) for premise in proof.premises]
            result = None if size in self._known or None in found else proof.conclude(*found)
            if result is not None:
                self._known[size] = result
                ready.extend(waiting.pop(size, ()))

    def _proofs(self, node: fx.Node, axis: int) -> Iterator[Proof]:
        """The proofs of a size: from the operation that makes the value, then from readers."""
        shape = self.shape(node)
        if shape is not None:
            if len(shape) >= -axis:
                yield known(shape[axis])
            return
        yield from self._facts(node, axis).proofs
        for user in itertools.islice(node.users, _MOST_USERS):
            facts = self._facts(user, axis)
            if facts.source is node:
                yield from facts.backward
            parts = concatenated(self._calls.of(user), axis, self)
            if parts and len({self._origin(part, axis) for part in parts}) == 1:
                yield Proof(partial(divided, len(parts)), ((user, axis),))

    def _facts(self, node: fx.Node, axis: int) -> AxisFacts:
        called = self._calls.of(node)
        rule = None if called is None else RULES.get(called.op.shape)
        if rule is None or called is None or called.arguments is None:
            return NO_FACTS
        return rule(called, axis, self)

    def _origin(self, node: fx.Node, axis: int) -> fx.Node:
        """The earliest value, up through first operands, that certainly has the same size."""
        for _ in range(_MOST_STEPS):
            facts = self._facts(node, axis)
            source = facts.source
            if source is None or facts.proofs[:1] != (Proof(unchanged, ((source, axis),)),):
                break
            node = source
        return node

    # --- questions of the rules ------------------------------------------------------------------

    def shape(self, value: object) -> torch.Size | None:
        """The shape of an argument that is a tensor of the model; None for any other argument.

        If the tensor is parametrized, this computes it.
        """
        if isinstance(value, ModuleTensor):
            key = value.module, value.name
            if key not in self._weights:
                with torch.no_grad():
                    self._weights[key] = _shape(getattr(value.module, value.name, None))
            return self._weights[key]
        if not isinstance(value, fx.Node) or value.op != "get_attr":
            return None
        return _shape(self._calls.tensor(str(value.target)))

    def part_facts(self, tensors: fx.Node, index: int, axis: int) -> AxisFacts:
        """The facts about one of the tensors that a chunk or split returns."""
        return size_rules.part(self._calls.of(tensors), index, axis, self)

    def is_tensor(self, node: fx.Node) -> bool:
        """Whether a value is certainly a tensor."""
        return node.op != "placeholder" and value_type(self._calls, node) is Tensor

    def from_last(self, axis: object, node: fx.Node | None) -> int | None:
        """An axis of a value, counted from the last."""
        if not isinstance(axis, int) or axis < 0:
            return axis if isinstance(axis, int) else None
        rank = None if node is None else self.rank(node)
        return None if rank is None or axis >= rank else axis - rank

    def may_have_axis(self, node: fx.Node, axis: int) -> bool:
        """Whether a value may have the axis."""
        shape = self.shape(node)
        rank = self.rank(node) if shape is None else len(shape)
        return rank is None or rank >= -axis


def _shape(value: object) -> torch.Size | None:
    plain = type(value) in (Tensor, nn.Parameter, nn.Buffer)
    return value.shape if plain and isinstance(value, Tensor) else None


def _reshapes(calls: Calls, node: fx.Node) -> bool:
    """Whether an operation changes the shape of an operand in place."""
    named = target_name(node.target).endswith("_")
    writes = node.op != "call_module" and (named or "out" in node.kwargs)
    return writes and effect(calls, node).reshapes
