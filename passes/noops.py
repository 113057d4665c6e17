"""Remove operations that give back their operand.

Given::

    x -> Identity / Dropout (eval) / * 1 / / 1 / + 0 / - 0 / contiguous -> y

Result::

    x -> y

Identities and dropouts in eval mode return the tensor itself, and so does ``contiguous`` where x
certainly is contiguous. ``x * 1`` and its like are copies of x, equal by ``==``, as -0.0 + 0 is
0.0. The number must not promote x, so that x must certainly be a floating-point value; and x must
have memory of its own, since a product is dense where a slice is not.

A scale by a stored tensor of ones is not looked at: it folds like any other.
"""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxrep.algebra.maps import Map
from fxrep.analysis.aliasing import argument
from fxrep.ops.owner import known_class
from fxrep.planning.cost import CostModel
from fxrep.planning.rule import Pass, Same
from fxrep.reading.pointwise import pointwise
from fxrep.reading.view import Affine, View, arguments

_IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_DROPOUTS = frozenset({F.dropout, F.dropout2d, F.alpha_dropout, F.feature_alpha_dropout})

# What leaves a floating-point value as it is, and whether the number may come first.
_NEUTRAL: dict[object, tuple[int, bool]] = {
    **dict.fromkeys((operator.mul, torch.mul, torch.multiply), (1, True)),
    **dict.fromkeys(("mul", "multiply", "__mul__", "__rmul__"), (1, True)),
    **dict.fromkeys((operator.add, torch.add, "add", "__add__", "__radd__"), (0, True)),
    **dict.fromkeys((operator.sub, torch.sub, torch.subtract), (0, False)),
    **dict.fromkeys(("sub", "subtract", "__sub__"), (0, False)),
    **dict.fromkeys((operator.truediv, torch.div, torch.divide, torch.true_divide), (1, False)),
    **dict.fromkeys(("div", "divide", "true_divide", "__truediv__"), (1, False)),
}

# How many values above an operand are looked at.
_LONGEST = 16


def propose(view: View, node: fx.Node, cost: CostModel) -> Same | None:
    """Let the readers of `node` read its operand, if that is all that `node` gives."""
    source = _unchanged(view, node)
    if source is not None:
        return Same(node, source, itself=True)
    source = _computed_with_neutral(node)
    if source is not None and view.aliasing.owns_memory(source) and _is_floating(view, source):
        return Same(node, source)
    if _makes_contiguous(node) and _is_contiguous(view, node.all_input_nodes[0]):
        return Same(node, node.all_input_nodes[0], itself=True)
    return None


def _unchanged(view: View, node: fx.Node) -> fx.Node | None:
    """The operand of an identity, or of a dropout in eval mode."""
    if node.op == "call_module":
        module = view.submodule(str(node.target))
        base = known_class(node, module, _IDENTITIES)
        if base is None or (base is not nn.Identity and module.training):
            return None
    elif node.target not in _DROPOUTS or argument(node, "training") is not False:
        return None
    inputs = [*node.args, *node.kwargs.values()]
    source = inputs[0] if inputs else None
    return source if isinstance(source, fx.Node) and node.all_input_nodes == [source] else None


def _computed_with_neutral(node: fx.Node) -> fx.Node | None:
    """The value that a node multiplies by 1, divides by 1, adds 0 to or subtracts 0 from."""
    if node.target not in _NEUTRAL or node.op not in ("call_function", "call_method"):
        return None
    bound = arguments("input, other", node)
    if bound is None:
        return None
    neutral, commutes = _NEUTRAL[node.target]
    value, number = bound["input"], bound["other"]
    if commutes and isinstance(number, fx.Node):
        value, number = number, value
    plain = type(number) in (int, float) and number == neutral
    return value if plain and isinstance(value, fx.Node) else None


def _is_floating(view: View, node: fx.Node) -> bool:
    """Whether a value certainly is a tensor of a floating-point dtype: a layer computed it."""
    for _ in range(_LONGEST):
        reading = view.read(node)
        if isinstance(reading, Affine):
            if reading.is_layer:
                return True
            node = reading.terms[0].operand
        elif pointwise(view, node) is not None:
            (node,) = node.all_input_nodes
        else:
            return False
    return False


def _is_contiguous(view: View, node: fx.Node) -> bool:
    """Whether a value certainly is contiguous: made so, or computed by a linear layer.

    Functions of each element keep the strides of their operand.
    """
    for _ in range(_LONGEST):
        if view.aliasing.stale(node):
            return False  # it may have been turned in place
        reading = view.read(node)
        if isinstance(reading, Affine) and reading.is_layer:
            shape = reading.terms[0].map
            return isinstance(shape, Map) and not shape.axes
        if pointwise(view, node) is None:
            return _makes_contiguous(node)
        (node,) = node.all_input_nodes
    return False


def _makes_contiguous(node: fx.Node) -> bool:
    plain = len(node.args) == 1 and not node.kwargs
    return node.op == "call_method" and node.target == "contiguous" and plain


NO_OPS = Pass("no-ops", propose)
