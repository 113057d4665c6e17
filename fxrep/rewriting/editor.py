"""Carry out a plan: compute its weights, put its layers in the graph, take the old nodes out."""

from __future__ import annotations

import functools
import math
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxrep.algebra import weights
from fxrep.algebra.maps import Map, narrowed, symmetric
from fxrep.algebra.recipe import Call, Expr, Recipe, record
from fxrep.planning.pieces import Piece
from fxrep.planning.plan import Plan, metadata_readers
from fxrep.reading.view import Affine, View, scope
from fxrep.refusal import Refusal
from fxrep.rewriting.replacement import replacement

# A weight row may lose this many epsilons to rounding, relative to its largest value.
WORST_ROUNDING = 4


@dataclass(frozen=True, eq=False)
class Layer:
    """One new convolution or linear layer.

    Attributes:
        piece: what it computes.
        module: the layer, in the dtype, device and memory format of what it replaces.
        exact: its weight and bias in float64, before they were rounded.
        recipe: how both were computed.
        exprs: the same, for later rewrites to build on.
    """

    piece: Piece
    module: nn.Module
    exact: tuple[Tensor, Tensor | None]
    recipe: Recipe
    exprs: tuple[Expr, Expr | None]


Lookup = Callable[[str], Tensor]


def build(plan: Plan, view: View, lookup: Lookup) -> list[Layer] | Refusal:
    """The layers of a plan, one for each piece that is a map."""
    tensors = _weights(plan, view)
    like = _like(plan, view)
    trains = any(w.requires_grad or id(w) in view.trained for w in tensors)
    layers: list[Layer] = []
    for piece in plan.pieces:
        if isinstance(piece.map, Map):
            layer = _layer(piece, lookup, like, trains)
            if isinstance(layer, Refusal):
                return layer
            layers.append(layer)
    return layers


def blank(plan: Plan, view: View) -> list[nn.Module]:
    """Layers like those of a plan that nothing was computed for: their weights are random."""
    like = _like(plan, view)
    generator = torch.Generator(like.device).manual_seed(0)
    found = []
    for piece in plan.pieces:
        if isinstance(piece.map, Map):
            module = _module(symmetric(narrowed(piece.map)), piece.bias is not None)
            for name, empty in list(module.named_parameters()):
                value = torch.empty(empty.shape, dtype=like.dtype, device=like.device)
                value.normal_(generator=generator)
                _assign(module, name, value, like, trains=False)
            found.append(module)
    return found


def _weights(plan: Plan, view: View) -> list[Tensor]:
    readings = [view.read(node) for node in plan.expanded]
    return [r.weight for r in readings if isinstance(r, Affine) and r.weight is not None]


def _like(plan: Plan, view: View) -> Tensor:
    """The weight whose dtype, device and memory format the new ones get."""
    like = max(_weights(plan, view), key=Tensor.numel, default=None)
    if like is None:  # pooling alone: nothing says the dtype but the rest of the model
        like = next((p for p in view.module.parameters() if p.is_floating_point()), torch.ones(()))
    return like


def _assign(module: nn.Module, name: str, value: Tensor, like: Tensor, *, trains: bool) -> None:
    value = value.contiguous(memory_format=_memory_format(like, value))
    setattr(module, name, nn.Parameter(value, requires_grad=trains))


def _layer(piece: Piece, lookup: Lookup, like: Tensor, trains: bool) -> Layer | Refusal:
    assert isinstance(piece.map, Map)
    shape = symmetric(narrowed(piece.map))
    weight = Call(weights.to_convolution, (piece.weight, piece.map))
    bias = piece.bias
    full = None if bias is None else Call(weights.full_bias, (bias, shape.outputs))
    recipe = record(Call(_pair, (weight, full)))
    try:
        computed: tuple[Tensor, Tensor | None] = recipe.run(lookup)
    except RuntimeError as error:  # a weight expression that insists on its own dtype
        return Refusal(f"its weight cannot be computed in float64: {error}")
    # A bias of numbers alone was computed where numbers live.
    shift = computed[1]
    exact = computed[0].to(like.device), None if shift is None else shift.to(like.device)
    module = _module(shape, bias is not None)
    for name, value in zip(("weight", "bias"), exact, strict=True):
        if value is None:
            continue
        rounded = value.to(dtype=like.dtype)
        refusal = rounding(name, value, rounded)
        if refusal is not None:
            return refusal
        _assign(module, name, rounded, like, trains=trains)
    return Layer(piece, module, exact, recipe, (weight, full))


def _pair(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return weight, bias


def _memory_format(like: Tensor, value: Tensor) -> torch.memory_format:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    wanted = formats.get(value.dim())
    if wanted is None or like.dim() != value.dim() or like.is_contiguous():
        return torch.contiguous_format
    return wanted if like.is_contiguous(memory_format=wanted) else torch.contiguous_format


def rounding(name: str, exact: Tensor, rounded: Tensor) -> Refusal | None:
    """Why the dtype cannot hold a fused tensor, or None."""
    limits = torch.finfo(rounded.dtype)
    largest = torch.linalg.vector_norm(exact.reshape(exact.shape[0], -1), math.inf, dim=1)
    if not bool((largest <= limits.max).all()):
        return Refusal(f"its fused {name} is not finite in {rounded.dtype}")
    # Below the smallest normal number rounding errors are absolute: up to tiny * eps / 2.
    lost = (largest > 0) & (largest < limits.tiny / (2 * WORST_ROUNDING))
    if name == "weight" and bool(lost.any()):
        return Refusal(
            f"{int(lost.sum())} rows of its fused weight are too small for {rounded.dtype}"
        )
    return None


_CONVOLUTIONS = {
    False: (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    True: (nn.Linear, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
}


def _module(shape: Map, biased: bool) -> nn.Module:
    """An empty layer: its tensors are set by the caller."""
    kind: Any = _CONVOLUTIONS[shape.transposed][len(shape.axes)]
    module: nn.Module
    if not shape.axes:
        module = kind(shape.inputs, shape.outputs, bias=biased, device="meta")
    else:
        options: dict[str, Any] = {
            "stride": tuple(a.stride for a in shape.axes),
            "padding": tuple(a.low if shape.symmetric else 0 for a in shape.axes),
            "dilation": tuple(a.dilation for a in shape.axes),
            "groups": shape.band.groups,
        }
        if shape.transposed:
            options["output_padding"] = tuple(a.low - a.high for a in shape.axes)
        elif shape.symmetric:
            options["padding_mode"] = shape.padding_mode
        module = kind(
            shape.inputs, shape.outputs, shape.kernel, bias=biased, device="meta", **options
        )
    module.eval()
    return module


def _instead(plan: Plan, node: fx.Node, values: Sequence[fx.Node]) -> fx.Node:
    """A value of the same shape, or at least dtype, as one that dies."""
    if plan.outputs:  # each comes before the output that it leads to
        place = next(i for i, (root, _) in enumerate(plan.outputs) if leads_to(node, root))
        return values[place]
    return values[0] if len(plan.pieces) == 1 else min(piece.source for piece in plan.pieces)


def leads_to(node: fx.Node, root: fx.Node) -> bool:
    """Whether a value is that of a root, or reaches it through operations with one operand."""
    while root is not node and len(root.all_input_nodes) == 1:
        root = root.all_input_nodes[0]
    return root is node


@dataclass(eq=False)
class Editor:
    """The graph of one program, with the names its layers have taken."""

    graph: fx.Graph
    module: nn.Module
    view: View
    keep_modules: bool = False
    uses: Counter[str] = field(default_factory=Counter)
    retired: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for node in self.graph.nodes:
            self._count(node, 1)

    def _count(self, node: fx.Node, by: int) -> None:
        if node.op in ("call_module", "get_attr"):
            for path in _prefixes(str(node.target)):
                self.uses[path] += by

    def replace(self, plan: Plan, targets: Sequence[str]) -> fx.Node:
        """Put calls of the layers at `targets` in place of the region; returns the new value."""
        readers = metadata_readers(plan)
        single = len(plan.pieces) == 1
        first = min([plan.root, *readers]) if single else plan.root
        if plan.outputs:  # their readers may come before the last of them
            first = plan.region[0]
        make = functools.partial(self._new, plan)
        total: fx.Node
        with self.graph.inserting_before(first):
            total, values = replacement(plan, targets, lambda source: source, make)
        self.view.forget(*readers)
        for reader in readers:
            for node in reader.all_input_nodes:
                if node in plan.region:
                    reader.replace_input_with(node, _instead(plan, node, values))
        self.view.ranks.rely_leaned()
        for value in plan.assumes_batched:
            self.view.ranks.rely(value)
        for root, value in zip(plan.roots, values, strict=True):
            self.view.forget(*root.users)
            self.view.ranks.same(value, root)
            root.replace_all_uses_with(value)
        for node in reversed(plan.region):
            self.erase(node)
        return total

    def _new(
        self, plan: Plan, op: str, target: Any, args: tuple[Any, ...], kwargs: Any = None
    ) -> fx.Node:
        node = self.graph.create_node(op, target, args, kwargs)
        stack = plan.root.meta.get("nn_module_stack")
        if stack:
            node.meta["nn_module_stack"] = dict(stack)
        self._count(node, 1)
        return node

    def erase(self, node: fx.Node) -> None:
        """Remove a node nobody reads, and the attribute reads only it had."""
        sources = node.all_input_nodes
        self.graph.erase_node(node)
        self._retire(node)
        for source in sources:
            if source.op == "get_attr" and not source.users:
                self.graph.erase_node(source)
                self._retire(source)

    def _retire(self, node: fx.Node) -> None:
        self._count(node, -1)
        if node.op in ("call_module", "get_attr"):
            self.retired.append(str(node.target))

    def erase_tree(self, node: fx.Node) -> None:
        """Remove a node nobody reads, and all above it that then nobody reads."""
        doomed = [node]
        while doomed:
            each = doomed.pop()
            if each._erased or each.users or each.op in ("placeholder", "output"):
                continue
            sources = each.all_input_nodes
            self.graph.erase_node(each)
            self._retire(each)
            doomed.extend(sources)

    def track(self, node: fx.Node) -> None:
        """Count a node made elsewhere among the users of its target."""
        self._count(node, 1)

    def store(self, node: fx.Node, value: Tensor, trains: bool) -> str:
        """Register the value of a constant node near where it was computed.

        A buffer even if it comes from parameters: the value it replaces needed no gradient under
        no_grad, and attention takes a slower kernel for a mask that does.
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
        if trains:
            self.view.trained.add(id(value))
        return f"{owner}.{name}" if owner else name

    def guard(self, node: fx.Node, rank: int) -> None:
        """Make the rewritten graph refuse inputs of another rank than the one assumed."""
        message = (
            f"fxrep: this model was optimized for a batched input of {rank} dimensions; "
            "pass example_inputs of another rank to fxrep.optimize to allow that"
        )
        with self.graph.inserting_after(node):
            ndim = self.graph.call_function(getattr, (node, "ndim"))
        with self.graph.inserting_after(ndim):
            equal = self.graph.call_function(operator.eq, (ndim, rank))
        with self.graph.inserting_after(equal):
            self.graph.call_function(torch._assert, (equal, message))

    def install(self, path: str, module: nn.Module) -> None:
        """Register a layer at a path that is free."""
        owner, _, name = path.rpartition(".")
        parent = self.module.get_submodule(owner)
        if name in parent._parameters or name in parent._buffers:
            delattr(parent, name)
        parent.add_module(name, module)
        self.view.calls.forget(path)

    def place(self, plans: Sequence[Plan], layers: Sequence[Layer]) -> list[str]:
        """Free paths: that of the one layer a new one replaces, or in their common block."""
        region = {node for plan in plans for node in plan.region}
        reads = {source for node in region for source in node.all_input_nodes}
        unread = {node for node in reads if node.op == "get_attr" and region.issuperset(node.users)}
        dying = Counter[str]()
        for node in region | unread:
            if node.op in ("call_module", "get_attr"):
                dying.update(_prefixes(str(node.target)))
        paths: list[str] = []
        for layer in layers:
            wanted = path = self._wanted(plans[0], layer.piece)
            number = 0
            while path in paths or self._taken(path, dying):
                number += 1
                path = f"{wanted}_{number}"
            paths.append(path)
        return paths

    def _wanted(self, plan: Plan, piece: Piece) -> str:
        """The path a fused layer would have if it were free."""
        assert isinstance(piece.map, Map)
        word = "conv" if piece.map.axes else "linear"
        nodes = sorted(piece.layers)
        called = [str(node.target) for node in nodes if node.op == "call_module"]
        if self.keep_modules and called:
            # Below the old layer: a new child of a Sequential would run when code iterates it.
            return f"{called[0]}.{word}"
        if len(nodes) == 1 and called:
            return called[0]
        if len(plan.pieces) == 1 or not nodes:
            nodes = list(plan.expanded)
        common = _owner(nodes[0])
        for node in nodes[1:]:
            same = [a == b for a, b in zip(common, _owner(node), strict=False)]
            common = common[: same.index(False) if False in same else len(same)]
        return ".".join([*common, word])

    def _taken(self, path: str, dying: Counter[str]) -> bool:
        if self.uses[path] > dying[path]:
            return True
        owner, _, name = path.rpartition(".")
        try:
            parent = self.module.get_submodule(owner)
        except AttributeError:
            return True
        if not hasattr(parent, name):
            return False
        # An attribute that only what dies has used gives its place to what replaces it.
        return self.keep_modules or not (dying[path] or path in self.retired)


def _prefixes(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts) + 1)]


def _owner(node: fx.Node) -> list[str]:
    """The module a node belongs to, as the parts of its path."""
    if node.op == "call_module":
        return str(node.target).split(".")[:-1]
    path = scope(node)
    return path.split(".") if path else []
