"""Values of equal size, one of them the operand of the other."""

from __future__ import annotations

from torch import fx

from fxrep.algebra.maps import Diagonal
from fxrep.reading.view import Affine, View


def operand_of_equal_size(view: View, node: fx.Node) -> fx.Node | None:
    """The operand of a scale or shift of its channels that does not broadcast it."""
    reading = view.read(node)
    if not isinstance(reading, Affine) or len(reading.terms) > 1:
        return None
    (term,) = reading.terms
    if not isinstance(term.map, Diagonal):
        return None
    return term.operand if reading.checks_channels or term.map.channels is None else None
