"""From dynamo's graph to a graph that runs on folded weights, and the recipes of those weights.

Given: a graph whose inputs hold the registered parameters and buffers::

    x, w, mean, var -> conv2d(x, w) -> batch_norm(mean, var) -> y

Result: a graph that takes the tensors that the passes of `fxrep.optimize` made, and recipes::

    x, w', b' -> conv2d(x, w', b') -> y      w', b' = recipe(w, mean, var)

One rewritten graph serves every set of weights, as dynamo's graph does. If the content of a weight
decided how the graph was rewritten, the rewritten graph serves weights of equal content only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
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
from fxrep.torch_compile.dynamo import Unfoldable, normalizes, register, weights_as_attributes


@dataclass(frozen=True, eq=False)
class Derived:
    """A tensor that a rewrite made.

    Attributes:
        recipe: how the tensor is computed.
        like: a meta tensor of its shape, strides and dtype.
        device: its device.
        name: "weight" or "bias" of a layer, computed in float64 and rounded once; "" for a
            constant of the graph, computed in the dtypes of the graph.
    """

    recipe: Recipe
    like: Tensor
    device: torch.device
    name: str

    def compute(self, lookup: Callable[[str], Tensor]) -> Tensor:
        """The value of the tensor for other weights.

        Args:
            lookup: the tensors by path.

        Raises:
            Unfoldable: the value has another shape or dtype, or cannot be rounded.
        """
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
        derived: by path, the tensors that rewrites made.
        weight_positions: by path of a parameter or buffer, its position among dynamo's inputs.
        graph_attributes: by path, attributes of dynamo's graph (constants, bodies of control flow).
        freezable: paths of parameters and buffers that may become constants of the graph.
        decisive: by position, parameters and buffers whose content decided how to rewrite.
        sources: positions of all parameters and buffers that the folding depends on.
        written_inputs: positions of inputs, other than parameters and buffers, that the graph
            writes.
        report: what was rewritten, what not and why.
    """

    graph: fx.Graph
    derived: Mapping[str, Derived]
    weight_positions: Mapping[str, int]
    graph_attributes: Mapping[str, Any]
    freezable: frozenset[str]
    decisive: Mapping[int, Tensor]
    sources: frozenset[int]
    written_inputs: tuple[int, ...]
    report: Report

    def fits(self, inputs: Sequence[Any]) -> bool:
        """Whether decisive parameters and buffers are the same among these inputs."""
        return all(torch.equal(inputs[i], content) for i, content in self.decisive.items())

    def compute(self, inputs: Sequence[Any]) -> dict[str, Tensor]:
        """The folded tensors for the weights among the inputs of dynamo's graph.

        Raises:
            Unfoldable: these weights cannot be folded in the same way.
        """

        def lookup(path: str) -> Tensor:
            found: Tensor = (
                inputs[self.weight_positions[path]]
                if path in self.weight_positions
                else self.graph_attributes[path]
            )
            return found.detach()

        with plain_arithmetic():
            return {path: each.compute(lookup) for path, each in self.derived.items()}


@contextmanager
def plain_arithmetic() -> Iterator[None]:
    """Switch autocast, gradients and inference mode off."""
    with torch.inference_mode(False), torch.no_grad(), torch._C._DisableAutocast():
        yield


def fold(
    gm: fx.GraphModule, inputs: Sequence[Any], settings: Settings
) -> tuple[Folding, dict[str, Tensor]]:
    """Rewrite a copy of dynamo's graph.

    Args:
        gm: dynamo's graph, made by `lasting_copy`; it is not changed.
        inputs: values of its inputs.
        settings: the passes, their cost model and whether to validate.

    Returns:
        The rewritten graph, and its folded tensors for the weights among `inputs`.

    Raises:
        Unfoldable: the graph has to stay as it is.
    """
    given = weights_as_attributes(gm, inputs)
    graph, root, positions = given.graph, given.root, given.weight_positions
    program = Program("", root, graph, Arguments(()), ranks=given.ranks, dtypes=given.dtypes)
    with plain_arithmetic():
        session = rewrite(Capture(root, root, [program]), settings)
        view = session.parts[0].view
        _refuse_shared_writes(graph, view)
        variable = _written_weights(graph, view) | _returned_weights(graph, view)
        values, derived = _derived_tensors(graph, view)
        for node in graph.nodes:
            if node.op == "call_module":
                _inline_layer(graph, node, root.get_submodule(str(node.target)))
        decisive = {
            positions[path]: view.originals[path].detach().clone()
            for path in view.content_read
            if path in positions
        }
    graph.lint()
    sources = {path for each in derived.values() for path in each.recipe.paths} | set(
        view.content_read
    )
    input_positions = {n.name: i for i, n in enumerate(gm.graph.find_nodes(op="placeholder"))}
    folding = Folding(
        graph,
        derived,
        positions,
        given.graph_attributes,
        _freezable(graph, positions.keys() - derived.keys(), variable),
        decisive,
        frozenset(positions[path] for path in sources if path in positions),
        tuple(input_positions[node.name] for node in _written_inputs(graph, view)),
        session.report(),
    )
    return folding, values


def _freezable(graph: fx.Graph, paths: Set[str], variable: set[fx.Node]) -> frozenset[str]:
    """Those of the paths that may become constants: no weight the graph writes or returns."""
    # Nor a BatchNorm's: Inductor would fold the BatchNorm once more, and not always right.
    normalizing = {n for node in graph.nodes if normalizes(node) for n in node.all_input_nodes}
    return frozenset(
        str(node.target)
        for node in graph.find_nodes(op="get_attr")
        if node.target in paths and node not in variable | normalizing
    )


# --- a graph of functions ------------------------------------------------------------------------


def _tensor_inputs(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.find_nodes(op="placeholder") if "rank" in node.meta]


def _written_inputs(graph: fx.Graph, view: View) -> list[fx.Node]:
    """Inputs that the graph writes."""
    return [node for node in _tensor_inputs(graph) if view.aliasing.writes_attribute(node)]


def _refuse_shared_writes(graph: fx.Graph, view: View) -> None:
    if len(_tensor_inputs(graph)) > 1 and _written_inputs(graph, view):
        raise Unfoldable("it writes an input that may share its memory with another one")


def _written_weights(graph: fx.Graph, view: View) -> set[fx.Node]:
    """Weights that the graph writes."""
    reads = graph.find_nodes(op="get_attr")
    return {node for node in reads if view.aliasing.writes_attribute(node)}


def _returned_weights(graph: fx.Graph, view: View) -> set[fx.Node]:
    """Weights that the graph returns, or views of which it returns.

    Of derived tensors it returns clones from now on.
    """
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


def _derived_tensors(graph: fx.Graph, view: View) -> tuple[dict[str, Tensor], dict[str, Derived]]:
    """The tensors that rewrites made and the graph reads: their values, and their recipes."""
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


def _inline_layer(graph: fx.Graph, node: fx.Node, layer: nn.Module) -> None:
    """Replace the call of a layer by a call of its function with weight and bias."""
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
        positions: positions of those inputs among dynamo's.
        paths: paths of those folded tensors.
    """

    module: fx.GraphModule
    positions: tuple[int, ...]
    paths: tuple[str, ...]


def bind(folding: Folding, gm: fx.GraphModule, frozen: Mapping[str, Tensor]) -> Bound:
    """A graph whose weights are inputs or constants.

    Args:
        folding: the rewritten graph.
        gm: the graph it was made from.
        frozen: by path, the tensors that become constants.
    """
    root, graph = nn.Module(), fx.Graph()
    inputs = gm.graph.find_nodes(op="placeholder")
    input_positions = {node.name: i for i, node in enumerate(inputs)}
    copies = {
        node: _input(graph, node)
        for node in folding.graph.find_nodes(op="placeholder")
        if node.users or "rank" not in node.meta
    }
    positions = [input_positions[node.name] for node in copies]
    # Weights that are inputs: first dynamo's, then those that were folded.
    weights: dict[str, fx.Node] = {}
    reads = folding.graph.find_nodes(op="get_attr")
    unfrozen = [p for p in dict.fromkeys(str(n.target) for n in reads) if p not in frozen]
    for path in unfrozen:
        if path in folding.weight_positions and path not in folding.derived:
            weights[path] = _input(graph, inputs[folding.weight_positions[path]])
            positions.append(folding.weight_positions[path])
    derived = [path for path in unfrozen if path in folding.derived]
    for path in derived:
        weights[path] = graph.placeholder(re.sub(r"\W", "_", f"folded_{path}"))
    # Attributes of the graph: frozen weights, and the attributes of dynamo's graph.
    names = {path: f"frozen_{i}" for i, path in enumerate(frozen)}
    for path, value in frozen.items():
        root.register_buffer(names[path], value.detach())
    for path in unfrozen:
        if path not in weights:
            register(root, path, folding.graph_attributes[path])
    for node in folding.graph.nodes:
        if node.op == "get_attr":
            path = str(node.target)
            if path not in weights:
                weights[path] = graph.get_attr(names.get(path, path))
            copies[node] = weights[path]
        elif node.op != "placeholder":
            copies[node] = graph.node_copy(node, copies.__getitem__)
    return Bound(fx.GraphModule(root, graph), tuple(positions), tuple(derived))


def _input(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """A copy of an input of dynamo's graph, with its `meta`."""
    copy = graph.node_copy(node)
    copy.name = node.name
    return copy
