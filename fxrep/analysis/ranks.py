"""The rank (number of dimensions) of each value, without running the model.

Given::

    x -> Conv2d -> BatchNorm2d -> flatten(1) -> Linear

Result: x and all values up to the flatten have rank 4, for BatchNorm2d raises at any other; the
values from the flatten on have rank 2.

Values whose ranks differ by a known constant form one class (union-find with offsets). A class is
known once one of its members is: by a module or function that accepts one rank only, an explicit
shape, an assertion in the model. The result of a broadcast has the largest rank of its operands.
Where nothing proves a rank, convolutions are assumed to see batches; a rewrite that uses the
assumption says so (`use_assumption`), and the rewritten graph asserts it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx

from fxrep.analysis.rank_rules import (
    RULES,
    AtLeast,
    Broadcast,
    Exactly,
    Fact,
    Parts,
    Shifted,
    Suggested,
)
from fxrep.ops.assume import assume
from fxrep.ops.calls import Called, Calls, is_function_of, is_item
from fxrep.ops.op import Result, Shape
from fxrep.ops.values import size_type

# Rounds over the broadcasts of a graph; each settles chains of any length in graph order.
_MOST_ROUNDS = 6

_Known = tuple[int, frozenset[int]]  # a rank, and the classes whose assumption it rests on


class Ranks:
    """Ranks of the values of one graph.

    Args:
        graph: as traced.
        calls: the calls of the graph.
        example_ranks: ranks seen when the model ran on an example: assumed where none is proven.
        known: certain ranks, of values that are tensors.
    """

    def __init__(
        self,
        graph: fx.Graph,
        calls: Calls,
        example_ranks: Mapping[fx.Node, int] | None = None,
        known: Mapping[fx.Node, int] | None = None,
    ) -> None:
        self._graph = graph
        self._calls = calls
        self._nodes = list(graph.nodes)
        self._index = {node: i for i, node in enumerate(self._nodes)}
        self._parent = list(range(len(self._nodes)))
        self._offset = [0] * len(self._nodes)  # rank of a node minus that of its parent
        self._least = [0] * len(self._nodes)  # of a root: the rank is at least this
        self._proven: dict[int, int | None] = {}  # of a root; None: contradictory
        self._suggested: dict[int, set[int]] = {}  # of a root: its ranks if layers see batches
        self._broadcasts: list[tuple[fx.Node, list[fx.Node], int]] = []  # not yet proven
        self._tensors: set[fx.Node] = set(known or ())
        self._numbers: set[fx.Node] = set()  # numbers and sizes
        self._masks: dict[fx.Node, bool] = {}  # of a tensor of the model: it is a mask
        self._parts: dict[fx.Node, tuple[fx.Node, int]] = {}  # see `parts_of`
        self._used: set[int] = set()  # roots whose assumed rank a rewrite has used
        self._deferred: set[int] = set()  # roots whose assumed rank it may use later
        for node in self._nodes:
            self._read(node)
        for node, rank in (known or {}).items():
            self._set(node, rank)
        self._prove_broadcasts()
        self._values: dict[int, _Known] = {
            root: (rank, frozenset()) for root, rank in self._proven.items() if rank is not None
        }
        self._assume(example_ranks or {})

    def rank(self, node: fx.Node) -> int | None:
        """The rank of a value if it is certain."""
        known = self._known(node)
        return known[0] if known is not None and not known[1] else None

    def assumed(self, node: fx.Node) -> int | None:
        """The rank of a value, whether it is certain or assumed."""
        known = self._known(node)
        return None if known is None else known[0]

    def least(self, node: fx.Node) -> int:
        """The least rank that a value can have."""
        return max(self._bounds(node)[0], self.rank(node) or 0) if node in self._index else 0

    def use_assumption(self, node: fx.Node) -> None:
        """Note that a rewrite is right only if `assumed(node)` is."""
        known = self._known(node)
        if known is not None:
            self._used |= known[1]

    def assume_for_later(self, node: fx.Node) -> int | None:
        """`assumed(node)`, for a conclusion that a rewrite may use later.

        See `use_deferred_assumptions`.
        """
        known = self._known(node)
        if known is not None:
            self._deferred |= known[1]
        return None if known is None else known[0]

    def use_deferred_assumptions(self) -> None:
        """Note that a rewrite may rest on conclusions drawn with `assume_for_later`."""
        self._used |= self._deferred

    def guards(self) -> list[tuple[fx.Node, int]]:
        """The earliest value of each class whose assumption was used, with the rank to assert."""
        first: dict[int, tuple[fx.Node, int]] = {}
        for node in self._graph.nodes if self._used else ():
            if node in self._index and node.op != "get_attr":
                root, offset = self._find(self._index[node])
                if root in self._used:
                    first.setdefault(root, (node, self._values[root][0] + offset))
        return list(first.values())

    def replacing(self, new: fx.Node, old: fx.Node) -> None:
        """Note that `new`, which may not have been analysed, has the rank of `old`."""
        if old not in self._index:
            return
        if new in self._index:
            known = self._known(old)
            root, offset = self._find(self._index[new])
            if known is not None:
                self._values.setdefault(root, (known[0] - offset, known[1]))
            return
        root, offset = self._find(self._index[old])
        self._index[new] = len(self._parent)
        self._parent.append(root)
        self._offset.append(offset)

    # --- classes of values whose ranks differ by a constant --------------------------------------

    def _find(self, i: int) -> tuple[int, int]:
        """The root of a class, and the rank of `i` minus that of the root."""
        path = []
        while self._parent[i] != i:
            path.append(i)
            i = self._parent[i]
        total = 0
        for each in reversed(path):
            total += self._offset[each]
            self._parent[each], self._offset[each] = i, total
        return i, total

    def _join(self, a: fx.Node, b: fx.Node, difference: int = 0) -> None:
        """rank(a) = rank(b) + difference."""
        (root, low), (other, high) = self._find(self._index[a]), self._find(self._index[b])
        shift = high + difference - low  # rank(root) - rank(other)
        if root == other:
            if shift != 0:
                self._proven[root] = None
            return
        self._parent[root], self._offset[root] = other, shift
        self._least[other] = max(self._least[other], self._least[root] - shift)
        if root in self._proven:
            rank = self._proven.pop(root)
            self._prove(other, None if rank is None else rank - shift)
        if root in self._suggested:
            suggested = {rank - shift for rank in self._suggested.pop(root)}
            self._suggested.setdefault(other, set()).update(suggested)

    def _prove(self, root: int, rank: int | None) -> None:
        if self._proven.setdefault(root, rank) != rank or (rank is not None and rank < 0):
            self._proven[root] = None

    def _set(self, node: fx.Node, rank: int) -> None:
        root, offset = self._find(self._index[node])
        self._prove(root, rank - offset)

    def _at_least(self, node: fx.Node, rank: int) -> None:
        root, offset = self._find(self._index[node])
        self._least[root] = max(self._least[root], rank - offset)

    def _known(self, node: fx.Node) -> _Known | None:
        i = self._index.get(node)
        if i is None:
            return None
        root, offset = self._find(i)
        known = self._values.get(root)
        # Some operations that remove an axis accept a value without axes, and return it.
        return None if known is None or known[0] + offset < 0 else (known[0] + offset, known[1])

    # --- broadcasts ------------------------------------------------------------------------------

    def _prove_broadcasts(self) -> None:
        """Prove the ranks of the results of broadcasts, until no more follows."""
        waiting = self._broadcasts
        for _ in range(_MOST_ROUNDS):
            left = [entry for entry in waiting if not self._prove_broadcast(*entry)]
            if len(left) == len(waiting):
                break
            waiting = left
        self._broadcasts = waiting

    def _prove_broadcast(self, node: fx.Node, operands: list[fx.Node], least: int) -> bool:
        """Give the result the rank of the operand that certainly has the largest, if any has."""
        bounds = [self._bounds(operand) for operand in operands]
        if any(low < least for low, _ in bounds):
            return False
        for operand, (low, _) in zip(operands, bounds, strict=True):
            here = self._find(self._index[operand])
            if all(
                (high is not None and high <= low) or self._below(other, here)
                for other, (_, high) in zip(operands, bounds, strict=True)
            ):
                self._join(node, operand)
                return True
        return False

    def _below(self, node: fx.Node, other: tuple[int, int]) -> bool:
        """Whether a node is in the class of `other` (a root, an offset), and of no larger rank."""
        root, offset = self._find(self._index[node])
        return root == other[0] and offset <= other[1]

    def _bounds(self, node: fx.Node) -> tuple[int, int | None]:
        """The least and the largest rank that a value can have, as far as they are proven."""
        root, offset = self._find(self._index[node])
        rank = self._proven.get(root)
        if rank is not None:
            return rank + offset, rank + offset
        return self._least[root] + offset, None

    def _assume(self, examples: Mapping[fx.Node, int]) -> None:
        """Give the classes without proof the rank of an example, or that of a batch."""
        suggested: dict[int, set[int]] = {}
        for node, rank in examples.items():
            if node in self._index:
                root, offset = self._find(self._index[node])
                suggested.setdefault(root, set()).add(rank - offset)
        for root, ranks in {**self._suggested, **suggested}.items():
            if len(ranks) == 1 and root not in self._proven:
                (rank,) = ranks
                if rank >= self._least[root]:
                    self._values[root] = rank, frozenset({root})
        for _ in range(_MOST_ROUNDS):
            changed = False
            for node, operands, least in self._broadcasts:
                root, offset = self._find(self._index[node])
                known = [self._known(operand) for operand in operands]
                if root in self._values or root in self._proven or None in known:
                    continue
                found = [each[0] for each in known if each is not None]
                if min(found) < least:
                    continue
                rests = frozenset[int]().union(*(each[1] for each in known if each is not None))
                self._values[root] = max(found) - offset, rests
                changed = True
            if not changed:
                break

    # --- from the calls of the graph to facts ----------------------------------------------------

    def _read(self, node: fx.Node) -> None:
        if node.op == "get_attr":
            self._read_attribute(node)
        elif node.target in (torch._assert, assume):
            self._read_assert(node)
        elif is_function_of(node, "_operator", "math") and self._only_numbers(node):
            self._numbers.add(node)
        elif is_item(node):
            self._read_item(node)
        else:
            called = self._calls.of(node)
            if called is not None:
                self._read_call(called)

    def _only_numbers(self, node: fx.Node) -> bool:
        return all(source in self._numbers for source in node.all_input_nodes)

    def _read_call(self, called: Called) -> None:
        if called.op.result in (Result.SIZE, Result.NUMBER):
            self._numbers.add(called.node)
            return
        shape = called.op.shape
        if called.in_place and shape is Shape.BROADCASTS:
            shape = Shape.KEEPS
        rule = RULES.get(shape)
        for fact in () if rule is None or called.arguments is None else rule(called, self):
            self._learn(fact)

    def _learn(self, fact: Fact) -> None:
        match fact:
            case Shifted(node, source, change):
                self._tensors.update((node, source) if source not in self._parts else (node,))
                self._join(node, source, change)
            case Exactly(node, rank):
                self._tensors.add(node)
                self._set(node, rank)
            case AtLeast(node, rank):
                self._at_least(node, rank)
            case Suggested(node, rank):
                root, offset = self._find(self._index[node])
                self._suggested.setdefault(root, set()).add(rank - offset)
            case Parts(node, source, change):
                self._tensors.add(source)
                self._parts[node] = source, change
            case Broadcast(node, operands, least):
                self._learn_broadcast(node, operands, least)

    def _learn_broadcast(self, node: fx.Node, operands: Iterable[fx.Node], least: int) -> None:
        tensors = [operand for operand in operands if operand not in self._numbers]
        if not tensors:
            return
        self._tensors.add(node)
        if len(tensors) == 1 and not least:
            self._learn(Shifted(node, tensors[0]))
            return
        self._broadcasts.append((node, tensors, least))

    # --- questions of the rules ------------------------------------------------------------------

    def size_type(self, node: fx.Node) -> type | None:
        """`int` for one size, `torch.Size` for a whole shape; None if neither is certain."""
        return size_type(self._calls, node)

    def proven(self, node: fx.Node) -> int | None:
        """The rank of a value, if the part of the graph read so far proves it."""
        return self._bounds(node)[1]

    def parts_of(self, node: fx.Node) -> tuple[fx.Node, int] | None:
        """For a tuple of tensors: the value that they are parts of, and their rank minus its."""
        return self._parts.get(node)

    # --- nodes that call no operator of the table ------------------------------------------------

    def _read_attribute(self, node: fx.Node) -> None:
        value = self._calls.tensor(str(node.target))
        if isinstance(value, torch.Tensor):
            self._learn(Exactly(node, value.dim()))
            self._masks[node] = value.dtype in (torch.bool, torch.uint8)

    def _read_assert(self, node: fx.Node) -> None:
        """`torch._assert(x.ndim == 4, ...)`: at any other rank the model raises."""
        equal = node.args[0] if node.args else None
        if not isinstance(equal, fx.Node) or equal.target not in (operator.eq, torch.eq):
            return
        for rank, read in (equal.args, tuple(reversed(equal.args))):
            if isinstance(rank, int) and isinstance(read, fx.Node) and read.args:
                called = self._calls.of(read)
                if called is not None and called.op.name in ("ndim", "dim") and called.source:
                    self._learn(Exactly(called.source, rank))

    def _read_item(self, node: fx.Node) -> None:
        source, key = node.args
        if not isinstance(source, fx.Node):
            return
        if source in self._numbers:
            self._numbers.add(node)
        elif source in self._parts:
            if isinstance(key, int):
                self._learn(Shifted(node, *self._parts[source]))
            elif isinstance(key, slice):
                self._parts[node] = self._parts[source]
        elif isinstance(key, tuple) or source in self._tensors:
            change = self._indexed(key if isinstance(key, tuple) else (key,))
            if change is not None:
                self._learn(Shifted(node, source, change))

    def _indexed(self, key: tuple[Any, ...]) -> int | None:
        """By how much an index changes the rank; None if that is not certain."""
        change, index_tensors = 0, 0
        for entry in key:
            if entry is None:
                change += 1
            elif isinstance(entry, bool):
                return None
            elif isinstance(entry, int) or (isinstance(entry, fx.Node) and entry in self._numbers):
                change -= 1
            elif isinstance(entry, fx.Node) and entry.op == "get_attr":
                # An index tensor of integers puts its own dimensions in place of the indexed one.
                rank, mask = self._bounds(entry)[1], self._masks.get(entry, True)
                index_tensors += 1
                if rank is None or mask or index_tensors > 1:
                    return None
                change += rank - 1
            elif entry is not Ellipsis and not isinstance(entry, slice):
                return None
        if index_tensors and any(isinstance(entry, int) for entry in key):
            return None
        return change
