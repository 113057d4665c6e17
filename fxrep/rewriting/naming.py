"""The paths of the layers that fxrep makes: those of the layers that they replace."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import fx, nn

from fxrep.algebra.maps import Map
from fxrep.planning.pieces import Piece
from fxrep.planning.plan import Plan
from fxrep.reading.view import scope
from fxrep.rewriting.layers import Layer


@dataclass(eq=False)
class Names:
    """The paths of modules and tensors that a graph uses, or has used.

    Attributes:
        module: the module that the targets of the graph refer to.
        uses: how many nodes use each path, or a path below it.
        retired: the paths that erased nodes called or read.
    """

    module: nn.Module
    uses: Counter[str] = field(default_factory=Counter)
    retired: set[str] = field(default_factory=set)

    def add(self, node: fx.Node) -> None:
        """Count the path that a new node uses."""
        self._count(node, 1)

    def remove(self, node: fx.Node) -> None:
        """Stop counting an erased node."""
        self._count(node, -1)
        if node.op in ("call_module", "get_attr"):
            self.retired.add(str(node.target))

    def _count(self, node: fx.Node, by: int) -> None:
        if node.op in ("call_module", "get_attr"):
            for path in _prefixes(str(node.target)):
                self.uses[path] += by

    def paths_for(self, plans: Sequence[Plan], layers: Sequence[Layer]) -> list[str]:
        """Free paths for new layers.

        Args:
            plans: equal plans that share the layers.
            layers: the new layers.

        Returns:
            For each layer the path of the layer that it replaces. If it replaces several, a path
            in the innermost module that holds all of them.
        """
        region = {node for plan in plans for node in plan.region}
        reads = {source for node in region for source in node.all_input_nodes}
        unread = {node for node in reads if node.op == "get_attr" and region.issuperset(node.users)}
        dying = Counter[str]()
        for node in region | unread:
            if node.op in ("call_module", "get_attr"):
                dying.update(_prefixes(str(node.target)))
        paths: list[str] = []
        for layer in layers:
            preferred = path = self._preferred_path(plans[0], layer.piece)
            number = 0
            while path in paths or self._taken(path, dying):
                number += 1
                path = f"{preferred}_{number}"
            paths.append(path)
        return paths

    def _preferred_path(self, plan: Plan, piece: Piece) -> str:
        """The path of a new layer, if no other node uses the path."""
        assert isinstance(piece.map, Map)
        word = "conv" if piece.map.axes else "linear"
        nodes = sorted(piece.layers)
        called = [str(node.target) for node in nodes if node.op == "call_module"]
        if len(nodes) == 1 and called:
            return called[0]
        if len(plan.pieces) == 1 or not nodes:
            nodes = list(plan.expanded)
        common = _module_path(nodes[0])
        for node in nodes[1:]:
            same = [a == b for a, b in zip(common, _module_path(node), strict=False)]
            common = common[: same.index(False) if False in same else len(same)]
        return ".".join([*common, word])

    def _taken(self, path: str, dying: Counter[str]) -> bool:
        """Whether a path is in use, by other nodes than those that die or by Python code."""
        if self.uses[path] > dying[path]:
            return True
        owner, _, name = path.rpartition(".")
        try:
            parent = self.module.get_submodule(owner)
        except AttributeError:
            return True
        if not hasattr(parent, name):
            return False
        # A path that only erased nodes have used is free for the layer that replaces them.
        return not (dying[path] or path in self.retired)


def names_of(graph: fx.Graph, module: nn.Module) -> Names:
    """The paths that the nodes of a graph use."""
    names = Names(module)
    for node in graph.nodes:
        names.add(node)
    return names


def _prefixes(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts) + 1)]


def _module_path(node: fx.Node) -> list[str]:
    """The path of the module that a node belongs to, as a list of names."""
    if node.op == "call_module":
        return str(node.target).split(".")[:-1]
    path = scope(node)
    return path.split(".") if path else []
