"""Traced values: in-place operators, types and lengths as a model's own code sees them.

Given: `b = a; b += x; use(a)`. torch.fx's Proxy has no `__iadd__`, so Python rebinds b to a sum
and the trace uses the old a.
Result: `operator.iadd(a, x)` is a node, and a is written as the model writes it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.fx.proxy import Attribute

from fxrep.words import words

if TYPE_CHECKING:
    from fxrep.tracer import Tracer


IN_PLACE = words("iadd isub imul itruediv ifloordiv imod ipow iand ior ixor ilshift irshift")


class Unfaithful(fx.proxy.TraceError):
    """A trace would not do what the forward does."""


class ParameterWrite(Unfaithful):
    """A forward that replaces its own parameters."""


class _InPlace:
    """What a Proxy lacks: in-place operators, known lengths, and no silent attribute writes."""

    tracer: Tracer
    node: fx.Node

    def __setattr__(self, name: str, value: object) -> None:
        if name in ("tracer", "node", "root", "attr", "_node"):
            object.__setattr__(self, name, value)
            return
        node = self.node
        raise self.tracer.refuse(
            ParameterWrite(f"forward assigns .{name} of parameter '{node.target}'")
            if node.op == "get_attr"
            else Unfaithful(f"forward assigns .{name} of a tensor")
        )

    def __setitem__(self, key: object, value: object) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

    def __delitem__(self, key: object) -> None:
        raise self.tracer.refuse(Unfaithful("forward deletes an item of a traced value"))

    def __len__(self) -> int:
        count = item_count(self.node)
        if count is None:
            raise self.tracer.refuse(Unfaithful("forward takes len() of a traced value"))
        return count


def _in_place(name: str) -> Callable[[Any, object], Any]:
    changed = getattr(operator, name)
    fresh = getattr(operator, name[1:], None) or getattr(operator, name[1:] + "_")

    def record(self: Any, other: object) -> Any:
        # `n = x.shape[2]; n += 1` rebinds n: an int has no in-place operators
        target = fresh if _is_size(self.node) else changed
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    return record


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow"):
    setattr(_InPlace, f"__{_name}__", _in_place(_name))

for _name in ("iand", "ior", "ixor", "ilshift", "irshift"):
    setattr(_InPlace, f"__{_name}__", _in_place(_name))


class TracedAttribute(_InPlace, Attribute):  # type: ignore[misc]
    """`x.shape`, `x.data`: an attribute of a traced value."""

    def __getattr__(self, name: str) -> TracedAttribute:
        return TracedAttribute(self, name)


class TracedValue(_InPlace, fx.Proxy):  # type: ignore[misc]
    """A traced value."""

    def __getattr__(self, name: str) -> TracedAttribute:
        return TracedAttribute(self, name)


def _is_size(node: fx.Node) -> bool:
    """Whether a value is an int taken from a shape, or arithmetic of such."""
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel", "nelement", "ndimension")
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return node.args[1] in ("shape", "ndim")
    if node.target is operator.getitem:
        return isinstance(node.args[0], fx.Node) and _is_size(node.args[0])
    if getattr(node.target, "__module__", "") in ("_operator", "math"):
        inputs = node.all_input_nodes
        return bool(inputs) and all(_is_size(entry) for entry in inputs)
    return False


def is_instance(value: Any, kinds: Any) -> bool:
    """`isinstance` as a model's own code sees it: a traced tensor is a tensor.

    It stands in for the builtin by name, in the modules a model is written in. A `__class__` that
    answers for the proxy would also be asked by torch's C++ argument parser, which then crashes.
    """
    if not isinstance(value, _InPlace) or isinstance(value, kinds):
        return isinstance(value, kinds)
    kind = value_type(value.node)
    if kind is None:
        raise value.tracer.refuse(Unfaithful("forward asks for the type of a traced value"))
    if value.node.op == "placeholder":
        value.tracer.tensors.add(str(value.node.target))
    return issubclass(kind, kinds)


def is_tensor(value: Any) -> bool:
    """`torch.is_tensor` for traced values too."""
    return is_instance(value, torch.Tensor)


def value_type(node: fx.Node) -> type | None:
    """Tensor or int where that is certain (an argument is taken for a tensor), else None."""
    if node.op in ("placeholder", "get_attr"):
        return torch.Tensor
    if node.op == "call_module":
        kind = node.meta["owner"]
        return None if kind is None or issubclass(kind, _MANY_OUTPUTS) else torch.Tensor
    if _is_size(node):
        return int if node.target is not getattr or node.args[1] == "ndim" else None
    name = str(node.target if node.op == "call_method" else getattr(node.target, "__name__", ""))
    if node.target is operator.getitem:
        base = node.args[0]
        if isinstance(base, fx.Node) and item_count(base) is not None:
            return torch.Tensor
        return value_type(base) if isinstance(base, fx.Node) else None
    if node.target is getattr:
        return torch.Tensor if node.args[1] in ("data", "T", "mT", "real", "imag") else None
    if name in _NO_TENSOR:
        return None
    home = str(getattr(node.target, "__module__", None) or "torch")
    known = node.op == "call_method" or home.startswith(("torch", "_operator"))
    return torch.Tensor if known else None


_MANY_OUTPUTS = (nn.RNNBase, nn.LSTMCell, nn.MultiheadAttention)

_NO_TENSOR = words(
    "chunk split unbind tensor_split hsplit vsplit dsplit unsafe_chunk unsafe_split "
    "split_with_sizes max min topk sort median mode kthvalue cummax cummin aminmax std_mean "
    "var_mean meshgrid broadcast_tensors unique unique_consecutive svd qr eig eigh slogdet frexp "
    "size stride shape item tolist numel nelement dim ndimension get_device type is_contiguous "
    "is_floating_point where nonzero numpy max_pool1d max_pool2d max_pool3d adaptive_max_pool2d "
    "multi_head_attention_forward __call__ _assert block_diag atleast_1d atleast_2d "
    "atleast_3d"
)


def item_count(node: fx.Node) -> int | None:
    """How many tensors a chunk, split or unbind returns, where its arguments say so."""
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    if node.op not in ("call_method", "call_function"):
        return None
    size = node.args[1] if len(node.args) > 1 else None
    if name in ("chunk", "unsafe_chunk"):
        size = node.kwargs.get("chunks", size)
        return size if isinstance(size, int) else None
    if name in ("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes"):
        size = node.kwargs.get("split_size_or_sections", node.kwargs.get("split_size", size))
        size = node.kwargs.get("split_sizes", size)
        return len(size) if isinstance(size, list | tuple) else None
    if name == "tensor_split":
        size = node.kwargs.get("indices_or_sections", node.kwargs.get("sections", size))
        return size if isinstance(size, int) else None
    return None
