"""The type of a call's result: a tensor, a number, a size, or a tuple of tensors."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import fx

from fxrep.ops.calls import Calls, is_function_of, is_item, is_torch, schemas
from fxrep.ops.op import Result, Shape
from fxrep.words import words


def is_size(calls: Calls, node: fx.Node) -> bool:
    """Whether a value is a size, read from a shape or computed from sizes."""
    called = calls.of(node)
    if called is not None and called.op.result is Result.SIZE:
        return True
    if is_item(node):
        return isinstance(node.args[0], fx.Node) and is_size(calls, node.args[0])
    if is_function_of(node, "_operator", "math"):
        inputs = node.all_input_nodes
        return bool(inputs) and all(is_size(calls, entry) for entry in inputs)
    return False


def size_type(calls: Calls, node: fx.Node) -> type | None:
    """`int` for one size, `torch.Size` for a whole shape; None if neither is certain."""
    called = calls.of(node)
    if called is not None and called.op.result is Result.SIZE:
        whole = called.op.name == "shape" or (called.op.name == "size" and _axis(node) is None)
        return torch.Size if whole else int
    if is_item(node):
        base, key = node.args
        if not isinstance(base, fx.Node) or size_type(calls, base) is not torch.Size:
            return None
        return int if isinstance(key, int | fx.Node) else torch.Size
    if is_function_of(node, "_operator", "math") and _keeps_int(node):
        inputs = node.all_input_nodes
        return int if inputs and all(size_type(calls, each) is int for each in inputs) else None
    return None


def _axis(node: fx.Node) -> Any:
    return node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")


def _keeps_int(node: fx.Node) -> bool:
    """Whether arithmetic of ints gives an int."""
    literals = [arg for arg in node.args if not isinstance(arg, fx.Node)]
    name = getattr(node.target, "__name__", "")
    return name in _INT_ARITHMETIC and all(isinstance(arg, int) for arg in literals)


_INT_ARITHMETIC = words(
    "add sub mul floordiv mod neg pos abs lshift rshift and_ or_ xor ceil floor trunc gcd"
)


def value_type(calls: Calls, node: fx.Node) -> type | None:
    """`torch.Tensor`, `int` or `torch.Size`; None if none of them is certain.

    An argument of the model counts as a tensor.
    """
    if node.op in ("placeholder", "get_attr"):
        return torch.Tensor
    if is_size(calls, node):
        return size_type(calls, node)
    if is_item(node):
        base = node.args[0]
        if not isinstance(base, fx.Node):
            return None
        return torch.Tensor if item_count(calls, base) is not None else value_type(calls, base)
    called = calls.of(node)
    if called is None:
        return torch.Tensor if _declared_tensor(node) else None
    if called.arguments is None or called.get("return_indices") not in (None, False):
        return None
    return torch.Tensor if called.op.result is Result.TENSOR else None


def _declared_tensor(node: fx.Node) -> bool:
    """Whether the schemas of torch declare that a call returns one tensor."""
    target: Any = node.target
    found: tuple[Any, ...] = ()
    if node.op == "call_method":
        found = schemas(str(target))
    elif isinstance(target, torch._ops.OpOverload):
        found = (target._schema,)
    elif node.op == "call_function" and is_torch(target) and not inspect.isfunction(target):
        found = schemas(getattr(target, "__name__", ""))
    single = [len(s.returns) == 1 and s.returns[0].type.kind() == "TensorType" for s in found]
    return bool(single) and all(single)


def item_count(calls: Calls, node: fx.Node) -> int | None:
    """How many tensors a chunk or split returns; None if its arguments do not say."""
    called = calls.of(node)
    if called is None or called.op.shape is not Shape.PARTS:
        return None
    sections = called.get("sections")
    if called.op.name in ("chunk", "tensor_split"):
        return sections if isinstance(sections, int) else None
    return len(sections) if isinstance(sections, list | tuple) else None
