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

from torch import fx

from fxrep.ops.calls import Called
from fxrep.ops.op import Memory
from fxrep.planning.cost import CostModel
from fxrep.planning.rule import Pass, Same
from fxrep.reading.kinds import is_contiguous, is_floating, makes_contiguous
from fxrep.reading.view import View

# What leaves a floating-point value as it is, and whether the number may come first.
_NEUTRAL = {"mul": (1, True), "add": (0, True), "sub": (0, False), "div": (1, False)}


def propose(view: View, node: fx.Node, cost: CostModel) -> Same | None:
    """Let the readers of `node` read its operand, if that is all that `node` gives."""
    called = view.calls.of(node)
    if called is None or called.arguments is None:
        return None
    if _is_identity(called) or (makes_contiguous(view, node) and _is_contiguous(view, called)):
        return None if called.source is None else Same(node, called.source, itself=True)
    source = _computed_with_neutral(called)
    if source is not None and view.aliasing.owns_memory(source) and is_floating(view, source):
        return Same(node, source)
    return None


def _is_identity(called: Called) -> bool:
    """Whether a call is an identity, or a dropout in eval mode."""
    dropped = called.op.memory is Memory.DROPOUT and called["training"] is False
    return dropped or called.op.name == "Identity"


def _is_contiguous(view: View, called: Called) -> bool:
    return called.source is not None and is_contiguous(view, called.source)


def _computed_with_neutral(called: Called) -> fx.Node | None:
    """The value that is multiplied by 1, divided by 1, added 0 to or subtracted 0 from."""
    if called.in_place or called.op.name not in _NEUTRAL:
        return None
    neutral, commutes = _NEUTRAL[called.op.name]
    value, number = called["input"], called["other"]
    if called.get("rounding_mode") is not None or called.get("alpha") not in (None, 1):
        return None
    if commutes and isinstance(number, fx.Node):
        value, number = number, value
    plain = type(number) in (int, float) and number == neutral
    return value if plain and isinstance(value, fx.Node) else None


NO_OPS = Pass("no-ops", propose)
