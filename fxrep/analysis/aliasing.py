"""Whether an operation that writes in place may be read as the pure operation of the same name.

Given::

    y = conv(x) ;  z = y * 2 ;  y += a ;  use(y, z)

The y of ``y += a`` is another value than that of ``conv(x)``. Values that may share memory form an
alias set (union-find over views, in-place results, containers, and unknown operations). A write is
harmless if no value of the set that was made before it is read after it, except for the shape, and
no value of the set is an argument or tensor of the model. Then every later reader reads the result
of the write, and nothing shows that memory was reused.

An unknown operation counts as sharing the memory of its operands (`fxrep.ops.effects`). That costs
little: a value that is written later can still be replaced by an equal value; a walk only cannot
pass it.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx
from torch.nn.utils import parametrize

from fxrep.analysis.computed import KeepsState, module_tensor
from fxrep.analysis.memory import Write, WrittenMemory, held, reached_by_hooks
from fxrep.ops.calls import Calls
from fxrep.ops.effects import Effect, effect, reads_no_values
from fxrep.ops.memory import addresses
from fxrep.ops.op import Memory
from fxrep.ops.values import value_type

_Key = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Aliasing:
    """The effects of in-place operations on the values of one graph.

    The answers stay valid while nodes are erased and new values take their place: a node that was
    not analysed counts as a value with memory of its own, written by its present readers.
    """

    _calls: Calls = field(repr=False)
    _group: Mapping[fx.Node, int]
    _writes: Mapping[int, tuple[tuple[_Key, fx.Node], ...]]
    _irreplaceable: frozenset[fx.Node]
    _stale: frozenset[fx.Node]
    _written_memory: WrittenMemory
    _joined: dict[fx.Node, list[int]] = field(default_factory=dict)

    def replaceable(self, node: fx.Node) -> bool:
        """Whether an equal value with memory of its own may take the place of `node`.

        An operation that writes in place may then be read as the pure operation. Later writes are
        no obstacle: they write the new value.
        """
        return node not in self._irreplaceable

    def stale(self, node: fx.Node) -> bool:
        """Whether `node` may be written before its last reader."""
        if node in self._group:
            return node in self._stale
        last = max(
            (user._sort_key for user in node.users if not reads_no_values(self._calls, user)),
            default=(),
        )
        return self._any_write(node, node._sort_key, last)

    def pinned(self, node: fx.Node) -> bool:
        """Whether the graph must keep computing `node`: it is not replaceable, or it is stale."""
        return not self.replaceable(node) or self.stale(node)

    def written(self, node: fx.Node) -> bool:
        """Whether the memory of `node` may be written after `node` was computed.

        Such a value must not become a stored tensor: the write would change it for good.
        """
        return self.written_since(node, node)

    def written_since(self, node: fx.Node, since: fx.Node) -> bool:
        """Whether the memory of `node` may be written after the node `since`."""
        return self._any_write(node, since._sort_key, None)

    def has_effects(self, node: fx.Node) -> bool:
        """Whether a node may write memory, or run code that is not torch's."""
        does = effect(self._calls, node)
        return bool(does.writes) or does.escapes

    def owns_memory(self, node: fx.Node) -> bool:
        """Whether a node makes a value with new memory, which no other code has."""
        does = effect(self._calls, node)
        return not does.touched and not does.escapes

    def is_dense(self, node: fx.Node) -> bool:
        """Whether a value, or the value that it was written over, has memory of its own."""
        while self.gives_back(node, *node.all_input_nodes[:1]):
            node = node.all_input_nodes[0]
        return self.owns_memory(node)

    def gives_back(self, node: fx.Node, *operand: fx.Node) -> bool:
        """Whether a node writes an operand, and that only, and returns it."""
        return bool(operand) and operand == _given_back(node, self._calls)

    def returned(self, node: fx.Node) -> bool:
        """Whether the graph returns a value, or another value that may share its memory."""
        ahead = [node]
        for each in ahead:  # grows while it is read
            for user in each.users:
                if user.op == "output":
                    return True
                if each in effect(self._calls, user).aliases and user not in ahead:
                    ahead.append(user)
        return False

    def writes_attribute(self, node: fx.Node) -> bool:
        """Whether the model may write the parameter or buffer that a `get_attr` node reads."""
        if self._any_write(node, (), None):
            return True
        tensor = self._calls.tensor(str(node.target)) if node.op == "get_attr" else None
        return isinstance(tensor, Tensor) and self.writer(tensor) is not None

    def writer(self, tensor: Tensor) -> str | None:
        """The code that may write a tensor of the model at any time, for a reason; None if none.

        A write that comes after the last reader counts: the next call reads it.
        """
        return self._written_memory.by(tensor)

    def writes_between(
        self,
        first: fx.Node,
        last: fx.Node,
        nodes: Iterable[fx.Node],
        dying: Container[fx.Node] | None = None,
    ) -> bool:
        """Whether any of `nodes` may be written strictly between `first` and `last`.

        Args:
            first: the earliest node of a region.
            last: the root of the region.
            nodes: the values that will be read at `last` only.
            dying: nodes whose writes do not count. If given, a write by `first` itself counts.
        """
        low = first._sort_key
        return any(self._any_write(n, low, last._sort_key, dying, first) for n in nodes)

    def _any_write(
        self,
        node: fx.Node,
        after: _Key,
        before: _Key | None,
        dying: Container[fx.Node] | None = None,
        first: fx.Node | None = None,
    ) -> bool:
        for group in self._groups(node) if self._writes else ():
            writes = self._writes.get(group)
            if not writes:
                continue
            cut = bisect_left if dying is not None else bisect_right
            start = cut(writes, after, key=lambda entry: entry[0])
            for position, write in writes[start:]:
                if before is not None and position >= before:
                    break
                if not write._erased and (dying is None or write not in dying):
                    return True
        return False

    def replacing(self, new: fx.Node, old: fx.Node) -> None:
        """Note that `new` takes the place of `old`: a write to one of them writes the other."""
        if new in self._group:  # the groups of a node that was not analysed are its readers'
            self._joined.setdefault(new, []).extend(self._groups(old))

    def _groups(self, node: fx.Node) -> list[int]:
        known = self._group.get(node)
        if known is not None:
            return [known, *self._joined.get(node, ())]
        found = []
        for user in node.users:
            group = self._group.get(user)
            if group is not None and node in effect(self._calls, user).touched:
                found.append(group)
        return found


def written_operand(node: fx.Node, calls: Calls) -> fx.Node | None:
    """The operand that a node writes and returns, if the node has no other effect."""
    written = _given_back(node, calls)
    called = calls.of(node)
    assigns = called is not None and called.op.memory is Memory.WRITES
    if len(written) != 1 or assigns:
        return None
    return written[0] if _is_tensor(calls, written[0]) else None


def _given_back(node: fx.Node, calls: Calls) -> tuple[fx.Node, ...]:
    """The operands that a node writes and gives back, if it has no other effect.

    Operators that write the tensors of a list return a list, not a tensor: they count as none.
    """
    does = effect(calls, node)
    first = node.args[0] if node.args else next(iter(node.kwargs.values()), None)
    other = does.reshapes or does.escapes or isinstance(first, tuple | list)
    return does.writes if does.writes == does.aliases and not other else ()


def _is_tensor(calls: Calls, node: fx.Node) -> bool:
    """Whether a value is certainly a tensor: ``n += 1`` of a number makes a new one."""
    return node.op not in ("placeholder", "get_attr") and value_type(calls, node) is torch.Tensor


def analyse(graph: fx.Graph, calls: Calls, outside: Iterable[Write] = ()) -> Aliasing:
    """Find the alias sets of a graph, and the writes in them that show.

    Args:
        graph: as traced: operators that write in place are nodes like any other.
        calls: the calls of the graph; the module that they refer to is in eval mode.
        outside: the tensors that code outside the graph may write.

    Returns:
        Answers about single nodes, each in constant or logarithmic time.
    """
    nodes = list(graph.nodes)
    index = {node: i for i, node in enumerate(nodes)}
    effects = _effects(nodes, calls)
    roots, writes = _grouped(nodes, effects, calls)
    members: dict[int, list[int]] = {root: [] for root in writes}
    for i, root in enumerate(roots):
        if root in members:
            members[root].append(i)
    irreplaceable: set[fx.Node] = set()
    stale: set[fx.Node] = set()
    for root, group in members.items():
        kept, written = _examined(calls, nodes, index, effects, group, writes[root])
        irreplaceable |= kept
        stale |= written
    return Aliasing(
        calls,
        {node: roots[i] for i, node in enumerate(nodes)},
        {root: tuple((nodes[i]._sort_key, nodes[i]) for i in w) for root, w in writes.items()},
        frozenset(irreplaceable),
        frozenset(stale),
        WrittenMemory(
            [
                *_graph_writes(nodes, calls, roots, writes),
                *(
                    w
                    for n, e in zip(nodes, effects, strict=True)
                    if e.own_state or _computes_with_state(n, calls)
                    for w in _own_writes(n, calls)
                ),
                *outside,
            ]
        ),
    )


def _effects(nodes: list[fx.Node], calls: Calls) -> list[Effect]:
    """The effects of the nodes; a module that writes its own tensors writes what shares them."""
    effects = [effect(calls, node) for node in nodes]
    reads = {n: calls.tensor(str(n.target)) for n in nodes if n.op == "get_attr"}
    for i, each in enumerate(effects):
        if each.own_state and reads:
            memory = WrittenMemory(_own_writes(nodes[i], calls))
            shared = [n for n, t in reads.items() if isinstance(t, Tensor) and memory.by(t)]
            effects[i] = replace(each, writes=(*each.writes, *shared))
    return effects


def _computes_with_state(node: fx.Node, calls: Calls) -> bool:
    """Whether a node calls a layer whose weights are computed by code that keeps a state."""
    if node.op != "call_module":
        return False
    module = calls.submodule(str(node.target))
    if not parametrize.is_parametrized(module):
        return False
    names = list(module.parametrizations)  # type: ignore[arg-type]
    return any(isinstance(module_tensor(module, name), KeepsState) for name in names)


def _own_writes(node: fx.Node, calls: Calls) -> list[Write]:
    """The tensors that a called module may write by itself."""
    module = calls.submodule(str(node.target))
    tensors = (*held(module), *reached_by_hooks(module))
    return [Write(tensor, f"the module '{node.target}'") for tensor in tensors]


def _graph_writes(
    nodes: list[fx.Node], calls: Calls, roots: list[int], writes: Mapping[int, list[int]]
) -> Iterator[Write]:
    """The tensors of the model that the nodes of a graph write.

    Args:
        nodes: the nodes of the graph.
        calls: the calls of the graph.
        roots: the alias sets of the nodes.
        writes: by alias set, the positions of the nodes that write.
    """
    for node, root in zip(nodes, roots, strict=True):
        if node.op == "get_attr" and root in writes:
            tensor = calls.tensor(str(node.target))
            if isinstance(tensor, Tensor):
                yield Write(tensor, nodes[writes[root][0]].name)


def written_tensors(graph: fx.Graph, calls: Calls) -> list[Write]:
    """The tensors of the model that a graph writes, without those that called modules write."""
    nodes = list(graph.nodes)
    effects = [effect(calls, node) for node in nodes]
    roots, writes = _grouped(nodes, effects, calls)
    return list(_graph_writes(nodes, calls, roots, writes))


def _grouped(
    nodes: list[fx.Node], effects: list[Effect], calls: Calls
) -> tuple[list[int], dict[int, list[int]]]:
    """The alias set of each node, and by alias set the positions of the nodes that write."""
    index = {node: i for i, node in enumerate(nodes)}
    roots = _alias_sets(nodes, index, effects, calls)
    writes: dict[int, list[int]] = {}
    for i, each in enumerate(effects):
        if each.writes:
            writes.setdefault(roots[i], []).append(i)
    return roots, writes


def _alias_sets(
    nodes: list[fx.Node], index: dict[fx.Node, int], effects: list[Effect], calls: Calls
) -> list[int]:
    """The alias set of each node, named by the position of one of its members."""
    parent = list(range(len(nodes)))
    of_model = False
    for i, each in enumerate(effects):
        for other in each.touched:
            _union(parent, i, index[other])
            of_model = of_model or other.op in ("placeholder", "get_attr")
    if of_model and any(each.writes for each in effects):
        _join_memory(nodes, parent, calls)
    return [_find(parent, i) for i in range(len(nodes))]


def may_share(node: fx.Node, calls: Calls) -> set[fx.Node]:
    """The `get_attr` nodes of the tensors whose memory a value may share."""
    seen, ahead = {node}, [node]
    for each in ahead:
        sources = effect(calls, each).aliases
        ahead.extend(source for source in sources if source not in seen)
        seen.update(sources)
    return {each for each in seen if each.op == "get_attr"}


def _examined(
    calls: Calls,
    nodes: list[fx.Node],
    index: dict[fx.Node, int],
    effects: list[Effect],
    group: list[int],
    writes: list[int],
) -> tuple[set[fx.Node], set[fx.Node]]:
    """The irreplaceable and the stale values of one alias set.

    Args:
        calls: the calls of the graph.
        nodes: the nodes of the graph.
        index: their positions.
        effects: their effects.
        group: positions of the members of the set, ascending.
        writes: positions of the members that write, ascending.
    """
    irreplaceable: set[fx.Node] = set()
    stale: set[fx.Node] = set()
    is_write = set(writes)
    older = -1.0  # the last read of any member before the current one
    observed: list[int] = []  # writes that show in older members
    doubtful: list[int] = []  # values made from a member while older members are still read
    for i in group:
        node, does = nodes[i], effects[i]
        reads = [index[user] for user in node.users if not reads_no_values(calls, user)]
        last: float = max(reads, default=-1)
        if i in is_write and (older > i or does.reshapes):
            observed.append(i)
        if does.touched and older > i:
            doubtful.append(i)
        following = bisect_right(writes, i)
        if following < len(writes) and writes[following] < last:
            stale.add(node)
        if does.escapes:
            last = math.inf
            if node.op in ("placeholder", "get_attr"):
                irreplaceable.add(node)
        older = max(older, last)
    latest = observed[-1] if observed else -1
    # While older members are read, memory of its own for one of these shows if a write follows.
    irreplaceable.update(nodes[i] for i in doubtful if i <= latest)
    irreplaceable.update(nodes[i] for i in observed)
    return irreplaceable, stale


def _join_memory(nodes: list[fx.Node], parent: list[int], calls: Calls) -> None:
    """Join the nodes that may have one memory: tied tensors, and the arguments of the model."""
    first: dict[object, int] = {}
    tensors: list[tuple[int, int, int]] = []
    for i, node in enumerate(nodes):
        if node.op == "placeholder":
            _union(parent, i, first.setdefault(None, i))
        elif node.op == "get_attr":
            value = calls.tensor(str(node.target))
            if isinstance(value, Tensor):
                tensors.append((*addresses(value), i))
            else:
                _union(parent, i, first.setdefault(str(node.target), i))
    reached, last = None, 0  # the address after the last so far, and the node that reaches it
    for start, stop, i in sorted(tensors):
        if reached is not None and start < reached:
            _union(parent, i, last)
        if reached is None or stop > reached:
            reached, last = stop, i


def _union(parent: list[int], a: int, b: int) -> None:
    parent[_find(parent, a)] = _find(parent, b)


def _find(parent: list[int], i: int) -> int:
    while parent[i] != i:
        parent[i] = parent[parent[i]]
        i = parent[i]
    return i
