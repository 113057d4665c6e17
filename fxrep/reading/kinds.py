"""What kind of tensor a value certainly is: of a floating-point dtype, contiguous."""

from __future__ import annotations

import torch
from torch import fx

from fxrep.algebra.maps import Map
from fxrep.ops.op import Dtype
from fxrep.reading.pointwise import pointwise
from fxrep.reading.view import View

# How many values above a value are looked at.
_LONGEST = 16


def is_floating(view: View, node: fx.Node) -> bool:
    """Whether a layer computed a value, scales and functions of each element aside.

    Comparisons and the like give truth values of any operand.
    """
    for _ in range(_LONGEST):
        reading, called = view.affine(node), view.calls.of(node)
        if reading is not None and reading.is_layer:
            return True
        if called is None or called.op.dtype is Dtype.INTEGRAL:
            return False
        if reading is not None:
            node = reading.terms[0].operand
        elif pointwise(view, node) is not None:
            (node,) = node.all_input_nodes
        else:
            return False
    return False


def is_contiguous(view: View, node: fx.Node) -> bool:
    """Whether a value was made contiguous, or computed by a linear layer.

    Functions of each element keep the strides of their operand.
    """
    for _ in range(_LONGEST):
        if view.aliasing.stale(node):
            return False  # its strides may have been changed in place
        reading = view.affine(node)
        if reading is not None and reading.is_layer:
            shape = reading.terms[0].map
            return isinstance(shape, Map) and not shape.axes
        if pointwise(view, node) is None:
            return makes_contiguous(view, node)
        (node,) = node.all_input_nodes
    return False


def makes_contiguous(view: View, node: fx.Node) -> bool:
    """Whether a node is ``x.contiguous()``."""
    called = view.calls.of(node)
    return (
        called is not None
        and called.op.name == "contiguous"
        and (called.get("memory_format") in (None, torch.contiguous_format))
    )
