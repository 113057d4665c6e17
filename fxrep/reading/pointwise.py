"""Element-by-element operations: what commutes with taking, joining and splitting channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxrep.analysis.aliasing import argument
from fxrep.ops.owner import known_class
from fxrep.reading.view import View

_NAMES = (
    "relu relu6 leaky_relu elu celu selu gelu silu mish hardtanh hardswish hardsigmoid "
    "softplus softsign logsigmoid tanhshrink hardshrink softshrink sigmoid tanh"
)

_FUNCTIONS = {
    getattr(home, name) for home in (torch, F) for name in _NAMES.split() if hasattr(home, name)
}

_METHODS = frozenset({"relu", "sigmoid", "tanh", "hardshrink"})

_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Softplus, nn.Softsign, nn.LogSigmoid,
    nn.Tanhshrink, nn.Hardshrink, nn.Softshrink, nn.Sigmoid, nn.Tanh,
)  # fmt: skip


def pointwise(view: View, node: fx.Node) -> object:
    """What a node does to each element of its operand, equal for equal functions; None if more."""
    if node.all_input_nodes != [node.args[0] if node.args else None]:
        return None
    if node.op == "call_module":
        module = view.submodule(str(node.target))
        base = known_class(node, module, _MODULES)
        return None if base is None else (base, module.extra_repr())
    known = _FUNCTIONS if node.op == "call_function" else _METHODS
    if node.op not in ("call_function", "call_method") or node.target not in known:
        return None
    return node.target, str(node.args[1:]), str(node.kwargs)


def writes_over(view: View, node: fx.Node) -> bool:
    """Whether a pointwise operation writes its result over its operand."""
    if node.op == "call_module":
        return bool(getattr(view.submodule(str(node.target)), "inplace", False))
    name = str(getattr(node.target, "__name__", node.target))
    return argument(node, "inplace") not in (False, None) or name.endswith("_")
