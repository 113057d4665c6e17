"""What the report says of a rewrite."""

from __future__ import annotations

from collections.abc import Sequence

from fxrep.algebra.maps import Map
from fxrep.planning.cost import SIZES
from fxrep.planning.plan import Plan
from fxrep.planning.rule import Pass
from fxrep.reading.view import Affine, View
from fxrep.report import Rewrite
from fxrep.rewriting.editor import Layer
from fxrep.rewriting.measure import Timing
from fxrep.rewriting.replacement import pads


def kinds(plan: Plan, view: View) -> tuple[str, ...]:
    """The operations that a plan replaces, in the field's words."""
    moved = {each.node: each.name for each in plan.moved}
    found = []
    for node in plan.region:
        reading = view.read(node)
        if node in moved:
            found.append(moved[node])
        elif isinstance(reading, Affine) and reading.kind != "identity":
            found.append(reading.kind)
        elif reading is None and plan.outputs:  # what follows each of several siblings
            found += moved.values()
    return tuple(found)


def new_kinds(plan: Plan, layers: Sequence[Layer]) -> tuple[str, ...]:
    """The operations that take their place."""
    found = ["pad" for layer in layers for _ in pads(layer.piece)]
    found += [_kind(layer) for layer in layers]
    joins = len(plan.pieces) - 1
    found += ["cat"] * plan.concatenates or ["add"] * joins
    found += [each.name for each in plan.moved]
    return tuple(found) + ("split",) * bool(plan.outputs)


def described(
    rule: Pass,
    location: str,
    plan: Plan,
    before: tuple[str, ...],
    layers: Sequence[Layer],
    error: float | None,
    timing: Timing | None,
) -> Rewrite:
    """The report's entry for plans that were carried out with these layers."""
    positions = SIZES[-1] ** (-plan.axis - 1)
    return Rewrite(
        rule.name,
        location,
        before,
        new_kinds(plan, layers),
        round(plan.saved.macs[-1] / positions),
        round(plan.spent.macs[-1] / positions),
        plan.saved.parameters,
        plan.spent.parameters,
        error,
        *((timing.before, timing.after) if timing is not None else ()),
    )


def _kind(layer: Layer) -> str:
    shape = layer.piece.map
    assert isinstance(shape, Map)
    if not shape.axes:
        return "linear"
    return f"conv_transpose{len(shape.axes)}d" if shape.transposed else f"conv{len(shape.axes)}d"
