"""The calls that replace a plan's region: made in the graph, run for validation, or timed."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fxrep.algebra.maps import Map, symmetric
from fxrep.planning.pieces import Piece
from fxrep.planning.plan import Plan
from fxrep.reading.commuting import Commuter

# Makes a call from an op and a target as in fx, args, and kwargs.
Make = Callable[..., Any]


def replacement(
    plan: Plan, targets: Sequence[str], value: Callable[[fx.Node], Any], make: Make
) -> tuple[Any, list[Any]]:
    """Make the calls that take the place of a plan's region.

    Args:
        plan: the plan.
        targets: the targets of the new layers, in the order of the plan's pieces.
        value: gives the value of a source.
        make: makes a call and gives its result: ``make("call_function", torch.add, (a, b))``.

    Returns:
        The result, and the value of each root: the result itself, or its parts.
    """
    names = iter(targets)
    parts: list[Any] = []
    for piece in plan.pieces:
        part = value(piece.source)
        if plan.before is not None:
            part = _moved(plan.before, part, make)
        if isinstance(piece.map, Map):
            for padding in pads(piece):
                part = make("call_function", F.pad, (part, *padding))
            part = make("call_module", next(names), (part,))
        parts.append(part)
    if plan.concatenates:
        total = make("call_function", torch.cat, (parts, plan.axis))
    else:
        total = parts[0]
        for part in parts[1:]:
            total = make("call_function", torch.add, (total, part))
    for each in reversed(plan.after):
        total = _moved(each, total, make)
    if plan.contiguous:
        total = make("call_method", "contiguous", (total,))
    if not plan.outputs:
        return total, [total]
    sizes = [size for _, size in plan.outputs]
    split = make("call_function", torch.split, (total, sizes, plan.axis))
    return total, [make("call_function", operator.getitem, (split, i)) for i in range(len(sizes))]


def _moved(found: Commuter, value: Any, make: Make) -> Any:
    """The call of an operation that maps were moved over, on another value."""
    args, kwargs = fx.map_arg((found.node.args, found.node.kwargs), lambda _: value)
    return make(found.node.op, found.node.target, args, kwargs)


def pads(piece: Piece) -> list[tuple[tuple[int, ...], str, float | None]]:
    """The arguments (pad, mode, value) of each F.pad that a layer needs before it."""
    assert isinstance(piece.map, Map)
    shape = symmetric(piece.map)
    found: list[tuple[tuple[int, ...], str, float | None]] = []
    if piece.ones:
        found.append(((0, 0) * len(shape.axes) + (0, 1), "constant", 1.0))
    if not shape.symmetric:
        found.append(_padding(shape))
    return found


def _padding(shape: Map) -> tuple[tuple[int, ...], str, float | None]:
    sizes = [size for axis in reversed(shape.axes) for size in (axis.low, axis.high)]
    mode = "constant" if shape.padding_mode == "zeros" else shape.padding_mode
    return tuple(sizes), mode, None
