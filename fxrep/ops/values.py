"""What a call returns: a tensor, a number, or so many of them."""

from __future__ import annotations

import operator

import torch
from torch import fx, nn

from fxrep.words import words


def is_size(node: fx.Node) -> bool:
    """Whether a value is an int taken from a shape, or arithmetic of such."""
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel", "nelement", "ndimension")
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return node.args[1] in ("shape", "ndim")
    if node.target is operator.getitem:
        return isinstance(node.args[0], fx.Node) and is_size(node.args[0])
    if getattr(node.target, "__module__", "") in ("_operator", "math"):
        inputs = node.all_input_nodes
        return bool(inputs) and all(is_size(entry) for entry in inputs)
    return False


def value_type(node: fx.Node) -> type | None:
    """Tensor or int where that is certain (an argument is taken for a tensor), else None."""
    if node.op in ("placeholder", "get_attr"):
        return torch.Tensor
    if node.op == "call_module":
        kind = node.meta["owner"]
        return None if kind is None or issubclass(kind, _MANY_OUTPUTS) else torch.Tensor
    if is_size(node):
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
