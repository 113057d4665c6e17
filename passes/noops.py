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

import torch
from torch import fx

from fxrep.algebra.maps import Map
from fxrep.ops.op import Memory
from fxrep.planning.cost import CostModel
from fxrep.planning.rule import Pass, Same
from fxrep.reading.pointwise import pointwise
from fxrep.reading.view import Affine, View

# What leaves a floating-point value as it is, and whether the number may come first.
_NEUTRAL = {"mul": (1, True), "add": (0, True), "sub": (0, False), "div": (1, False)}

# How many values above an operand are looked at.
_LONGEST = 16


def propose(view: View, node: fx.Node, cost: CostModel) -> Same | None:
    """Let the readers of `node` read its operand, if that is all that `node` gives."""
    source = _unchanged(view, node)
    if source is not None:
        return Same(node, source, itself=True)
    source = _computed_with_neutral(view, node)
    if source is not None and view.aliasing.owns_memory(source) and _is_floating(view, source):
        return Same(node, source)
    if _makes_contiguous(view, node) and _is_contiguous(view, node.all_input_nodes[0]):
        return Same(node, node.all_input_nodes[0], itself=True)
    return None


def _unchanged(view: View, node: fx.Node) -> fx.Node | None:
    """The operand of an identity, or of a dropout in eval mode."""
    called = view.calls.of(node)
    if called is None or called.arguments is None or node.all_input_nodes != [called.source]:
        return None
    dropped = called.op.memory is Memory.DROPOUT and called.get("training") is False
    return called.source if dropped or called.op.name == "Identity" else None


def _computed_with_neutral(view: View, node: fx.Node) -> fx.Node | None:
    """The value that a node multiplies by 1, divides by 1, adds 0 to or subtracts 0 from."""
    called = view.calls.of(node)
    if called is None or called.in_place or called.op.name not in _NEUTRAL:
        return None
    neutral, commutes = _NEUTRAL[called.op.name]
    value, number = called.get("input"), called.get("other")
    if called.get("rounding_mode") is not None or called.get("alpha") not in (None, 1):
        return None
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
            return _makes_contiguous(view, node)
        (node,) = node.all_input_nodes
    return False


def _makes_contiguous(view: View, node: fx.Node) -> bool:
    called = view.calls.of(node)
    plain = (None, torch.contiguous_format)
    return (
        called is not None
        and called.op.name == "contiguous"
        and (called.get("memory_format") in plain)
    )


NO_OPS = Pass("no-ops", propose)
