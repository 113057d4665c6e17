"""Sizes, read where they are known first.

Given: ``b, c, h, w = norm(x).shape`` before attention on ``norm(x)``.

Result: the same of ``x``, so that nobody but the attention's layers reads the normalised value.
"""

from __future__ import annotations

from torch import fx

from fxrep.algebra.maps import Diagonal
from fxrep.reading.view import Affine, View


def read_early(view: View) -> None:
    """Let who reads the size of a scaled or shifted value read that of the value itself."""
    for node in list(view.graph.nodes):
        if not view.reads_size(node):
            continue
        (value,) = node.all_input_nodes
        source = value
        while (operand := _of_equal_size(view, source)) is not None:
            source = operand
        if source is not value:
            node.replace_input_with(value, source)


def _of_equal_size(view: View, node: fx.Node) -> fx.Node | None:
    """The operand of an operation on each channel; it must not broadcast."""
    reading = view.read(node)
    if not isinstance(reading, Affine) or len(reading.terms) > 1:
        return None
    (term,) = reading.terms
    if not isinstance(term.map, Diagonal):
        return None
    return term.operand if reading.checks_channels or term.map.channels is None else None
