"""Values that have the size of their operand."""

from __future__ import annotations

from torch import fx

from fxrep.algebra.maps import Diagonal
from fxrep.reading.view import View


def operand_of_equal_size(view: View, node: fx.Node) -> fx.Node | None:
    """The operand of a scale or shift, if the operation certainly does not broadcast it."""
    reading = view.affine(node)
    if reading is None or not reading.is_diagonal:
        return None
    (term,) = reading.terms
    assert isinstance(term.map, Diagonal)
    return term.operand if reading.checks_channels or term.map.channels is None else None
