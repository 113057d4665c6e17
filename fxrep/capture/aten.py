"""ATen operators rewritten as the public functions and methods of torch, which the passes know.

Given: a `GraphModule` of `torch.ops.aten` calls, as `torch.export` or `make_fx` writes it.
Result: a `GraphModule` that calls ``torch.conv2d`` and so on, with the same arguments. An exported
program's module calls a submodule that asserts what the export knows of the sizes of its inputs:
that submodule is traced like any other. Where a hook checks the sizes, asserts replace the hook.

An operator that the table of operators does not know stays as it is.
"""

from __future__ import annotations

import copy
import functools
import inspect
import operator
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._ops import OpOverload

from fxrep.ops.spellings import FUNCTIONS
from fxrep.words import words

_Call = tuple[str, Any, tuple[Any, ...], dict[str, Any]]
_aten = torch.ops.aten


def respelled(model: nn.Module) -> nn.Module:
    """A module of ATen operators as a module of torch's functions; any other module as it is.

    The result shares its parameters and buffers with `model`, which is not changed.
    """
    if not isinstance(model, fx.GraphModule) or not any(map(_is_aten, model.graph.nodes)):
        return model
    guarded = any(_checks_inputs(model, node) for node in model.graph.nodes)
    exported = guarded or _is_checked_by_hook(model)
    graph = fx.Graph()
    graph.output(graph.graph_copy(model.graph, {}))
    graph.set_codegen(copy.deepcopy(model.graph._codegen))
    for node in list(graph.nodes):
        if _is_aten(node):
            _respell(graph, node, model)
    for node in reversed(list(graph.nodes)):
        if not node.users and (node.op == "get_attr" or node.target in (torch.permute, torch.t)):
            graph.erase_node(node)
    if exported and not guarded and not _assert_sizes(graph, model):
        return model
    result = fx.GraphModule(model, graph, type(model).__name__)
    # Each BatchNorm of an exported program says whether it trains; `model.training` means nothing.
    result.training = model.training and not exported
    return result


def _is_aten(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target.namespace == "aten"


def _checks_inputs(model: nn.Module, node: fx.Node) -> bool:
    if node.op != "call_module":
        return False
    kind = type(model.get_submodule(str(node.target)))
    return kind.__name__ == "GuardsFn" and kind.__module__.startswith("torch.export")


def _is_checked_by_hook(model: nn.Module) -> bool:
    """Whether it is an exported program's module without guards (``check_guards=False``)."""
    names = {getattr(hook, "__name__", "") for hook in model._forward_pre_hooks.values()}
    return "_check_input_constraints_pre_hook" in names


def _assert_sizes(graph: fx.Graph, model: fx.GraphModule) -> bool:
    """Assert the sizes of the inputs that an exported program allows; False if they are derived.

    Args:
        graph: gets the asserts.
        model: the module of the exported program.
    """
    if not getattr(model, "validate_inputs", True):
        return True
    ranges: Any = model.range_constraints
    first: dict[Any, fx.Node] = {}
    start = next(node for node in graph.nodes if node.op not in ("placeholder", "get_attr"))
    with graph.inserting_before(start):
        for node in graph.find_nodes(op="placeholder"):
            value = node.meta.get("val")
            for axis, size in enumerate(value.shape if isinstance(value, Tensor) else ()):
                given = graph.call_method("size", (node, axis))
                message = f"{node.name} was exported with size {size} at dimension {axis}"
                if isinstance(size, int):
                    _assert(graph, operator.eq, given, size, message)
                    continue
                symbol = size.node.expr
                if not symbol.is_Symbol or symbol not in ranges:
                    return False
                low, high = ranges[symbol].lower, ranges[symbol].upper
                message += f", between {low} and {high}"
                if low.is_Integer:
                    _assert(graph, operator.ge, given, int(low), message)
                if high.is_Integer:
                    _assert(graph, operator.le, given, int(high), message)
                if symbol in first:
                    _assert(graph, operator.eq, given, first[symbol], message)
                first.setdefault(symbol, given)
    return True


def _assert(graph: fx.Graph, compare: Any, size: fx.Node, other: Any, message: str) -> None:
    graph.call_function(torch._assert, (graph.call_function(compare, (size, other)), message))


def _respell(graph: fx.Graph, node: fx.Node, model: nn.Module) -> None:
    """Put a call of torch's function or method in the place of an ATen operator, if known."""
    schema_name = node.target._schema.name.partition("::")[2]  # type: ignore[union-attr]
    reader, function = _READERS.get(node.target), _torch_function(schema_name)
    if reader is not None:
        call = reader(node, model)
    elif function is not None:
        call = "call_function", function, node.args, dict(node.kwargs)
    elif schema_name in _METHODS:
        call = "call_method", schema_name, node.args, dict(node.kwargs)
    else:
        return
    if call is None:
        return
    op, target, args, kwargs = call
    with graph.inserting_before(node):
        new = graph.create_node(op, target, args, kwargs)
    new.meta = dict(node.meta)
    if node.target in _SEVERAL_RESULTS:
        for user in list(node.users):
            user.replace_all_uses_with(new)
            graph.erase_node(user)
    else:
        node.replace_all_uses_with(new)
    graph.erase_node(node)


def _convolution(node: fx.Node, model: nn.Module) -> _Call | None:
    given: tuple[Any, ...] = node.args
    source, weight, bias, stride, padding, dilation, transposed, extra, groups = given
    shape = _shape(weight, model)
    if shape is None or not 3 <= len(shape) <= 5:
        return None
    how: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation}
    if transposed:
        how["output_padding"] = extra
    name = f"conv{'_transpose' if transposed else ''}{len(shape) - 2}d"
    return "call_function", getattr(torch, name), (source, weight, bias), how | {"groups": groups}


def _shape(weight: Any, model: nn.Module) -> torch.Size | None:
    value = weight.meta.get("val") if isinstance(weight, fx.Node) else None
    if value is None and isinstance(weight, fx.Node) and weight.op == "get_attr":
        owner, _, name = str(weight.target).rpartition(".")
        value = getattr(model.get_submodule(owner), name)
    return value.shape if isinstance(value, Tensor) else None


def _only_first(node: fx.Node) -> bool:
    """Whether no node reads any but the first of several results."""
    return all(
        user.target is operator.getitem and (user.args[1] == 0 or not user.users)
        for user in node.users
    )


def _batch_norm(node: fx.Node, model: nn.Module) -> _Call | None:
    if not _only_first(node):
        return None
    given: tuple[Any, ...] = node.args
    source, weight, bias, mean, variance, *training, momentum, eps = given
    if training not in ([], [False]):
        return None
    args = source, mean, variance, weight, bias, False, momentum, eps
    return "call_function", F.batch_norm, args, {}


def _max_pool(node: fx.Node, model: nn.Module) -> _Call | None:
    return ("call_function", torch.max_pool2d, node.args, {}) if _only_first(node) else None


def _constant_pad(node: fx.Node, model: nn.Module) -> _Call:
    given: tuple[Any, ...] = node.args
    source, pad, *value = given
    return "call_function", F.pad, (source, pad, "constant", *value), {}


def _slice(node: fx.Node, model: nn.Module) -> _Call | None:
    given: tuple[Any, ...] = node.args
    defaults: tuple[Any, ...] = (None, 0, None, None, 1)
    source, dim, start, end, step = given + defaults[len(given) :]
    if not isinstance(dim, int) or dim < 0 or node.kwargs:
        return None
    whole = None if end == sys.maxsize else end
    key = (slice(None),) * dim + (slice(start or None, whole, None if step == 1 else step),)
    return "call_function", operator.getitem, (source, key), {}


def _linear(node: fx.Node, model: nn.Module) -> _Call | None:
    """``addmm(bias, x, weight.t())``, as a linear layer decomposes."""
    given: tuple[Any, ...] = node.args
    bias, source, matrix = given
    if node.kwargs or not isinstance(matrix, fx.Node) or not matrix.args:
        return None
    by_t = matrix.target in (torch.t, _aten.t.default)
    by_dims = matrix.target in (torch.permute, _aten.permute.default) and matrix.args[1] == [1, 0]
    if not (by_t or by_dims) or len(_shape(bias, model) or (0, 0)) != 1:
        return None
    return "call_function", F.linear, (source, matrix.args[0], bias), {}


def _dropout(node: fx.Node, model: nn.Module) -> _Call:
    return "call_function", F.dropout, node.args, {}


_READERS: dict[Any, Callable[[fx.Node, nn.Module], _Call | None]] = {
    _aten.convolution.default: _convolution,
    _aten._native_batch_norm_legit_no_training.default: _batch_norm,
    _aten.native_batch_norm.default: _batch_norm,
    _aten.max_pool2d_with_indices.default: _max_pool,
    _aten.constant_pad_nd.default: _constant_pad,
    _aten.slice.Tensor: _slice,
    _aten.addmm.default: _linear,
    _aten.dropout.default: _dropout,
}

_SEVERAL_RESULTS = {
    _aten.native_batch_norm.default,
    _aten._native_batch_norm_legit_no_training.default,
    _aten.max_pool2d_with_indices.default,
}


@functools.cache
def _torch_function(name: str) -> Any:
    """The function of torch that binds an ATen operator and takes the same arguments."""
    if name in _RENAMED:
        return _RENAMED[name]
    for home in (torch, torch._C._nn):
        function = getattr(home, name, None)
        if function in FUNCTIONS and inspect.isbuiltin(function):
            return function
    return None


_RENAMED: dict[str, Any] = {
    "split": torch.split,  # written in Python, but takes the same arguments
    "_adaptive_avg_pool2d": F.adaptive_avg_pool2d,
}

_METHODS = words("add_ sub_ mul_ div_ view reshape expand contiguous")
