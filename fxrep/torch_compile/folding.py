"""From dynamo's graph to one that runs on folded weights, with how these are computed.

Given: a graph whose inputs hold the registered parameters and buffers::

    x, w, mean, var -> conv2d(x, w) -> batch_norm(mean, var) -> y

Result: the same passes as `fxrep.optimize`'s run on a copy, and a graph that takes what they made::

    x, w' -> conv2d(x, w', b') -> y          w', b' = recipe(w, mean, var)

One such graph serves every set of weights, as dynamo's does, but for weights whose content decided
what was rewritten: these are kept, to compare with.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxrep.algebra.recipe import Recipe, record
from fxrep.analysis import aliasing
from fxrep.capture.islands import Capture, Program
from fxrep.capture.signature import Arguments
from fxrep.reading.view import View, double
from fxrep.report import Report
from fxrep.rewriting.layers import rounding
from fxrep.rewriting.session import Settings, rewrite
from fxrep.torch_compile.dynamo import Unfoldable, copied, normalizes, register


@dataclass(frozen=True, eq=False)
class Derived:
    """A tensor that a rewrite made.

    Attributes:
        recipe: how it is computed.
        like: its shape, strides and dtype, on the meta device.
        device: where it lives.
        name: "weight" or "bias" of a layer, computed in float64 and rounded once; "" for a
            constant of the graph, computed as the graph did.
    """

    recipe: Recipe
    like: Tensor
    device: torch.device
    name: str

    def compute(self, lookup: Callable[[str], Tensor]) -> Tensor:
        """Its value for other weights."""
        like = self.like
        exact: Tensor = self.recipe.run(lambda p: double(lookup(p)) if self.name else lookup(p))
        if exact.shape != like.shape or not (self.name or exact.dtype == like.dtype):
            raise Unfoldable(f"a tensor of shape {tuple(exact.shape)}, not {tuple(like.shape)}")
        value = torch.empty_strided(
            like.shape, like.stride(), dtype=like.dtype, device=self.device
        ).copy_(exact)
        refusal = rounding(self.name, exact.to(self.device), value) if self.name else None
        if refusal is not None:
            raise Unfoldable(refusal.reason)
        return value


@dataclass(frozen=True, eq=False)
class Folding:
    """A rewritten graph.

    Attributes:
        graph: calls functions and methods only; its weights are `get_attr` nodes.
        derived: the tensors that rewrites made, by path.
        statics: parameters and buffers, by path: their positions among dynamo's inputs.
        held: what dynamo's graph held itself (constants, bodies of control flow), by path.
        freezable: paths of the statics that may become constants of the graph.
        looked: content that decided what was rewritten, by position.
        sources: positions of the statics that anything here was made from.
        overwritten: positions of the other inputs that the graph writes.
        report: what was done.
    """

    graph: fx.Graph
    derived: Mapping[str, Derived]
    statics: Mapping[str, int]
    held: Mapping[str, Any]
    freezable: frozenset[str]
    looked: Mapping[int, Tensor]
    sources: frozenset[int]
    overwritten: tuple[int, ...]
    report: Report

    def fits(self, inputs: Sequence[Any]) -> bool:
        """Whether what was decided by content holds for these inputs of dynamo's graph."""
        return all(torch.equal(inputs[i], content) for i, content in self.looked.items())

    def compute(self, inputs: Sequence[Any]) -> dict[str, Tensor]:
        """The folded tensors for the weights among the inputs of dynamo's graph.

        Raises:
            Unfoldable: these weights cannot be folded in the same way.
        """

        def lookup(path: str) -> Tensor:
            found: Tensor = inputs[self.statics[path]] if path in self.statics else self.held[path]
            return found.detach()

        with plain_arithmetic():
            return {path: each.compute(lookup) for path, each in self.derived.items()}


@contextmanager
def plain_arithmetic() -> Iterator[None]:
    """Neither autocast, nor gradients, nor tensors that only inference may use."""
    with torch.inference_mode(False), torch.no_grad(), torch._C._DisableAutocast():
        yield


def fold(
    gm: fx.GraphModule, inputs: Sequence[Any], settings: Settings
) -> tuple[Folding, dict[str, Tensor]]:
    """Rewrite a copy of dynamo's graph.

    Args:
        gm: a lasting copy of dynamo's; it is not changed.
        inputs: values of its inputs.
        settings: the passes and how to judge them.

    Returns:
        The rewritten graph, and its folded tensors for the weights among `inputs`.

    Raises:
        Unfoldable: the graph has to stay as it is.
    """
    given = copied(gm, inputs)
    graph, root, statics = given.graph, given.root, given.statics
    program = Program("", root, graph, Arguments(()), ranks=given.ranks)
    with plain_arithmetic():
        session = rewrite(Capture(root, root, [program]), settings)
        view = session.parts[0].view
        written = _written(graph, view)
        returned = _returned(graph, view)
        values, derived = _made(graph, view)
        for node in graph.nodes:
            if node.op == "call_module":
                _call(graph, node, root.get_submodule(str(node.target)))
        looked = {
            statics[path]: view.originals[path].detach().clone()
            for path in view.content_read
            if path in statics
        }
    graph.lint()
    sources = {path for each in derived.values() for path in each.recipe.paths} | set(
        view.content_read
    )
    inputs_by_name = {node.name: i for i, node in enumerate(gm.graph.find_nodes(op="placeholder"))}
    overwritten = tuple(inputs_by_name[node.name] for node in _overwritten(graph, view))
    normalizing = {n for node in graph.nodes if normalizes(node) for n in node.all_input_nodes}
    freezable = frozenset(
        str(node.target)
        for node in graph.find_nodes(op="get_attr")
        # Inductor folds what is left of a BatchNorm once more, and not always right.
        if node.target in statics.keys() - derived.keys()
        and node not in written | returned | normalizing
    )
    folding = Folding(
        graph,
        derived,
        statics,
        given.held,
        freezable,
        looked,
        frozenset(statics[path] for path in sources if path in statics),
        overwritten,
        session.report(),
    )
    return folding, values


# --- a graph of functions ------------------------------------------------------------------------


def _written(graph: fx.Graph, view: View) -> set[fx.Node]:
    """Weights that the graph writes."""
    inputs = [node for node in graph.find_nodes(op="placeholder") if "rank" in node.meta]
    if len(inputs) > 1 and _overwritten(graph, view):
        raise Unfoldable("it writes an input that may share its memory with another one")
    reads = graph.find_nodes(op="get_attr")
    return {node for node in reads if view.aliasing.writes_attribute(node)}


def _overwritten(graph: fx.Graph, view: View) -> list[fx.Node]:
    """Inputs that the graph writes."""
    inputs = graph.find_nodes(op="placeholder")
    return [node for node in inputs if "rank" in node.meta and view.aliasing.writes_attribute(node)]


def _returned(graph: fx.Graph, view: View) -> set[fx.Node]:
    """Weights that the caller gets, whole or a view of; what was made here, as a copy."""
    (output,) = graph.find_nodes(op="output")
    found: set[fx.Node] = set()
    for node in output.all_input_nodes:
        shared = aliasing.may_share(node, view.calls)
        if any(str(each.target) in view.derived for each in shared):
            with graph.inserting_before(output):
                copy = graph.call_method("clone", (node,))
            copy.meta = dict(node.meta)
            output.replace_input_with(node, copy)
        else:
            found |= shared
    return found


def _made(graph: fx.Graph, view: View) -> tuple[dict[str, Tensor], dict[str, Derived]]:
    """The tensors that rewrites made and the graph reads, and how each is computed."""
    values: dict[str, Tensor] = {}
    derived: dict[str, Derived] = {}
    for node in graph.nodes:
        names: tuple[str, ...] = ()
        if node.op == "call_module":
            names = ("weight", "bias")
        elif node.op == "get_attr" and node.target in view.derived:
            names = ("",)
        for name in names:
            path = f"{node.target}.{name}" if name else str(node.target)
            if path in view.derived:
                value = view.tensor(path).detach()
                values[path] = value
                like = torch.empty_like(value, device="meta")
                derived[path] = Derived(record(view.derived[path]), like, value.device, name)
    return values, derived


def _call(graph: fx.Graph, node: fx.Node, layer: nn.Module) -> None:
    """Call a layer as a function of its weight and bias."""
    source = node.args[0]
    with graph.inserting_before(node):
        weight = graph.get_attr(f"{node.target}.weight")
        bias = None if layer.bias is None else graph.get_attr(f"{node.target}.bias")
        if isinstance(layer, nn.Linear):
            new = graph.call_function(F.linear, (source, weight, bias))
        else:
            assert isinstance(layer, nn.modules.conv._ConvNd)
            padding: Any = layer.padding
            if layer.padding_mode != "zeros":
                around = tuple(layer._reversed_padding_repeated_twice)
                source = graph.call_function(F.pad, (source, around, layer.padding_mode))
                padding = (0,) * len(layer.kernel_size)
            name = f"conv{'_transpose' * layer.transposed}{len(layer.kernel_size)}d"
            how = {"stride": layer.stride, "padding": padding, "dilation": layer.dilation}
            if layer.transposed:
                how["output_padding"] = layer.output_padding
            how["groups"] = layer.groups
            new = graph.call_function(getattr(torch, name), (source, weight, bias), how)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)


# --- the graph bound to its weights --------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Bound:
    """A graph for the inner compiler.

    Attributes:
        module: takes some of dynamo's inputs, then folded tensors.
        positions: of dynamo's inputs that it takes.
        paths: of the folded tensors that it takes.
    """

    module: fx.GraphModule
    positions: tuple[int, ...]
    paths: tuple[str, ...]


def bind(folding: Folding, gm: fx.GraphModule, frozen: Mapping[str, Tensor]) -> Bound:
    """A graph whose weights are inputs or, by path, constants.

    Args:
        folding: the rewritten graph.
        gm: the graph it was made from.
        frozen: the tensors that are to be constants, by path.
    """
    root, graph = nn.Module(), fx.Graph()
    given = gm.graph.find_nodes(op="placeholder")
    index = {node.name: i for i, node in enumerate(given)}
    copies = {
        node: _input(graph, node)
        for node in folding.graph.find_nodes(op="placeholder")
        if node.users or "rank" not in node.meta
    }
    positions = [index[node.name] for node in copies]
    weights: dict[str, fx.Node] = {}
    reads = folding.graph.find_nodes(op="get_attr")
    open_paths = [p for p in dict.fromkeys(str(n.target) for n in reads) if p not in frozen]
    for path in open_paths:
        if path in folding.statics and path not in folding.derived:
            weights[path] = _input(graph, given[folding.statics[path]])
            positions.append(folding.statics[path])
    made = [path for path in open_paths if path in folding.derived]
    for path in made:
        weights[path] = graph.placeholder(re.sub(r"\W", "_", f"folded_{path}"))
    names = {path: f"frozen_{i}" for i, path in enumerate(frozen)}
    for path, value in frozen.items():
        root.register_buffer(names[path], value.detach())
    for path in open_paths:
        if path not in weights:
            register(root, path, folding.held[path])
    for node in folding.graph.nodes:
        if node.op == "get_attr":
            path = str(node.target)
            if path not in weights:
                weights[path] = graph.get_attr(names.get(path, path))
            copies[node] = weights[path]
        elif node.op != "placeholder":
            copies[node] = graph.node_copy(node, copies.__getitem__)
    return Bound(fx.GraphModule(root, graph), tuple(positions), tuple(made))


def _input(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """An input of dynamo's, with all that is known of it."""
    copy = graph.node_copy(node)
    copy.name = node.name
    return copy
