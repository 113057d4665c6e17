"""From dynamo's graph to the graph that the passes take: weights are attributes of a module.

Dynamo passes parameters and buffers as inputs of the graph. Here those that are registered in a
module, and are ordinary tensors, become attributes of a module of the same structure; other inputs
stay inputs.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.source import is_from_unspecialized_param_buffer_source
from torch._subclasses.fake_tensor import FakeTensor

from fxrep.errors import FxrepError
from fxrep.ops import effects
from fxrep.ops.calls import Calls
from fxrep.report import Skip

log = logging.getLogger("fxrep")


class Unfoldable(FxrepError):
    """A graph, or a set of weights, that is left to the inner compiler as it is.

    Attributes:
        skipped: what the passes declined in the graph, and why.
    """

    def __init__(self, reason: str, skipped: Sequence[Skip] = ()) -> None:
        super().__init__(reason)
        self.skipped = tuple(skipped)


def weight_inputs(gm: fx.GraphModule, inputs: Sequence[Any]) -> dict[int, fx.Node]:
    """The inputs that hold a registered parameter or buffer, an ordinary tensor, by position."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    return {
        i: node
        for i, (node, value) in enumerate(zip(placeholders, inputs, strict=True))
        if _registered_path(node) is not None and _is_ordinary(value)
    }


def lasting_copy(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of dynamo's graph that can be rewritten after dynamo has finished.

    Dynamo drops the sources of inputs then: their paths stay in `meta["registered"]`, ranks and
    dtypes in `meta["rank"]` and `meta["dtype"]`. Fake tensors refer to real tensors, and stay only
    where sizes are symbolic.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    nodes = list(graph.nodes)
    fakes = [node.meta.get("example_value") for node in nodes]
    dynamic = any(map(is_symbolic, fakes))
    for node, fake in zip(nodes, fakes, strict=True):
        known = {key: node.meta[key] for key in ("nn_module_stack",) if key in node.meta}
        if isinstance(fake, Tensor):
            known["rank"], known["dtype"] = fake.dim(), fake.dtype
        if node.op == "placeholder":
            known["registered"] = _registered_path(node)
        if dynamic and fake is not None:
            known["example_value"] = fake
        node.meta = known
    return fx.GraphModule(gm, graph)


def is_symbolic(value: object) -> bool:
    """Whether a value is a symbolic number, or a tensor of symbolic sizes."""
    if isinstance(value, FakeTensor):
        return bool(value._has_symbolic_sizes_strides)
    return isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool))


def _registered_path(node: fx.Node) -> str | None:
    """The path of the parameter or buffer that an input holds, if a module registered it."""
    if "registered" in node.meta:
        path: str | None = node.meta["registered"]
        return path
    source = getattr(node.meta.get("grapharg"), "source", None)
    if source is None or not is_from_unspecialized_param_buffer_source(source):
        return None
    return _module_path(source.name)


def _is_ordinary(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and type(value) in (Tensor, nn.Parameter, nn.Buffer)
        and value.layout is torch.strided
        and value.device.type != "meta"
        and not value.is_inference()
        and not torch._C._functorch.is_functorch_wrapped_tensor(value)
    )


def statistics(gm: fx.GraphModule) -> set[fx.Node]:
    """The inputs that are running means and variances, which kernels write without new versions."""
    calls = Calls(gm)
    return {
        source
        for called in map(calls.of, gm.graph.nodes)
        if called is not None and "running_mean" in called.op.parameters
        for source in effects.statistics(called)
        if source.op == "placeholder"
    }


def normalizes(node: fx.Node) -> bool:
    """Whether a node calls a function of BatchNorm or InstanceNorm."""
    name = str(getattr(node.target, "__name__", node.target))
    return node.op == "call_function" and ("batch_norm" in name or "instance_norm" in name)


# --- a copy to rewrite ---------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class AttributeGraph:
    """A copy of dynamo's graph that reads its weights as attributes of a module.

    Attributes:
        graph: the copy.
        root: the module.
        weight_positions: by path of a parameter or buffer, its position among dynamo's inputs.
        graph_attributes: by path, attributes of dynamo's graph (constants, bodies of control flow).
    """

    graph: fx.Graph
    root: nn.Module
    weight_positions: dict[str, int]
    graph_attributes: dict[str, Any]

    @property
    def ranks(self) -> dict[fx.Node, int]:
        """The ranks of tensors, which dynamo guarantees."""
        return {
            node: node.meta["rank"]
            for node in self.graph.nodes
            if node.op != "get_attr" and "rank" in node.meta
        }

    @property
    def dtypes(self) -> dict[fx.Node, torch.dtype]:
        """The dtypes of tensors, which dynamo guarantees."""
        return {node: node.meta["dtype"] for node in self.graph.nodes if "dtype" in node.meta}


def weights_as_attributes(gm: fx.GraphModule, inputs: Sequence[Any]) -> AttributeGraph:
    """Copy dynamo's graph, with its weights as attributes.

    Args:
        gm: made by `lasting_copy`.
        inputs: values of its inputs.

    Raises:
        Unfoldable: the passes do not know all that the graph does.
    """
    positions = weight_inputs(gm, inputs)
    graph, copies = fx.Graph(), {}  # type: ignore[var-annotated]
    graph.output(graph.graph_copy(gm.graph, copies))
    root = nn.Module()
    graph_attributes = {
        str(n.target): _own_attribute(gm, n) for n in gm.graph.find_nodes(op="get_attr")
    }
    for path, value in graph_attributes.items():
        register(root, path, value)
    weight_positions: dict[str, int] = {}
    for position, original in positions.items():
        placeholder = copies[original]
        if placeholder.users:
            path = _register_weight(root, original, inputs[position])
            weight_positions[path] = position
            with graph.inserting_before(placeholder):
                read = graph.get_attr(path)
            read.meta = dict(placeholder.meta)
            placeholder.replace_all_uses_with(read)
        graph.erase_node(placeholder)
    for node in graph.nodes:
        _refuse_unknown(node)
        if normalizes(node):
            _fix_numbers(node)
        _set_module_path(root, node)
    return AttributeGraph(graph, root, weight_positions, graph_attributes)


def _own_attribute(gm: fx.GraphModule, node: fx.Node) -> Any:
    if "." in str(node.target):
        raise Unfoldable(f"it reads {node.target}, which is no attribute of its own")
    return getattr(gm, str(node.target))


_MODES = (
    "_enter_autocast", "_exit_autocast", "_set_grad_enabled", "_enter_inference_mode",
    "_exit_inference_mode", "_enter_torch_function_mode", "push_torch_function_stack",
)  # fmt: skip


def _refuse_unknown(node: fx.Node) -> None:
    name = getattr(node.target, "__name__", "")
    if node.op == "call_module":
        raise Unfoldable(f"it calls the module {node.target}")
    if name in _MODES:
        raise Unfoldable(f"it switches modes inside ({name})")


def _fix_numbers(node: fx.Node) -> None:
    """Make symbolic numbers constants: with dynamic shapes even the eps of a module is an input.

    ``float(value)`` lets dynamo guard the value.
    """
    for each in node.all_input_nodes:
        value = each.meta.get("example_value")
        if isinstance(value, (float, torch.SymFloat)):
            node.replace_input_with(each, float(value))  # type: ignore[arg-type]
            if each.target == "item" and not each.users:
                each.graph.erase_node(each)


def _set_module_path(root: nn.Module, node: fx.Node) -> None:
    """Let `meta["nn_module_stack"]` name the module that made a node, as `view.scope` reads it."""
    stack = node.meta.pop("nn_module_stack", None)
    if not stack:
        return
    name, kind = next(reversed(stack.values()))
    path = _module_path(name)
    if path and _module_at(root, path) is not None:
        node.meta["nn_module_stack"] = {path: (path, kind)}


def _module_path(source: str) -> str:
    """``L['self']._modules['stem']._parameters['weight']`` -> ``stem.weight``."""
    words: list[str] = re.findall(r"\w+", source)
    return ".".join(word for word in words if word not in _FRAMES)


_FRAMES = {"L", "G", "self", "_modules", "_parameters", "_buffers"}


def _register_weight(root: nn.Module, node: fx.Node, value: Tensor) -> str:
    """Register a parameter or buffer, under its path in the model if that is free."""
    path = _registered_path(node) or ""
    owner, _, name = path.rpartition(".")
    parent = _module_at(root, owner)
    if not name or parent is None or hasattr(parent, name):
        path, parent = f"{node.name}_", root
    register(parent, path.rpartition(".")[2], value)
    return path


def _module_at(root: nn.Module, path: str) -> nn.Module | None:
    """The module at a path, made if there is none; None if something else is there."""
    module = root
    for name in path.split(".") if path else ():
        if not hasattr(module, name):
            module.add_module(name, nn.Module())
        found = getattr(module, name)
        if not isinstance(found, nn.Module):
            return None
        module = found
    return module


def register(module: nn.Module, name: str, value: Any) -> None:
    """Set a parameter, buffer, submodule or other attribute of a module."""
    if isinstance(value, nn.Parameter):
        module._parameters[name] = value  # without torch's registration hooks: no new weight
    elif isinstance(value, Tensor):
        module._buffers[name] = value
    elif isinstance(value, nn.Module):
        module.add_module(name, value)
    else:
        setattr(module, name, value)
