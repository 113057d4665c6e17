"""The layers of a plan: modules whose weights are computed in float64 and rounded once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxrep.algebra import weights
from fxrep.algebra.maps import Map, narrowed, symmetric
from fxrep.algebra.recipe import Call, Expr, record
from fxrep.planning.pieces import Piece
from fxrep.planning.plan import Plan
from fxrep.reading.view import View
from fxrep.refusal import Refusal

# A weight row may lose this many epsilons to rounding, relative to its largest value.
WORST_ROUNDING = 4


@dataclass(frozen=True, eq=False)
class Layer:
    """One new convolution or linear layer.

    Attributes:
        piece: the part of the plan that it computes.
        module: the layer, in the dtype, device and memory format of the layers it replaces.
        exact: its weight and bias in float64, before rounding.
        exprs: the expressions of its weight and bias, which later rewrites take in.
    """

    piece: Piece
    module: nn.Module
    exact: tuple[Tensor, Tensor | None]
    exprs: tuple[Expr, Expr | None]


Lookup = Callable[[str], Tensor]


def build(plan: Plan, view: View, lookup: Lookup) -> list[Layer] | Refusal:
    """The layers of a plan, one for each piece that is a map.

    Args:
        plan: the rewrite.
        view: the graph of the plan.
        lookup: gives the float64 value of a tensor of the user's model by its path.

    Returns:
        The layers, or why the dtype cannot hold one of their weights.
    """
    tensors = _weights(plan, view)
    like = _like(plan, view)
    if isinstance(like, Refusal):
        return like
    trains = any(w.requires_grad or id(w) in view.trained for w in tensors)
    layers: list[Layer] = []
    for piece in plan.pieces:
        if isinstance(piece.map, Map):
            layer = _layer(piece, lookup, like, trains)
            if isinstance(layer, Refusal):
                return layer
            layers.append(layer)
    return layers


def random_layers(plan: Plan, view: View) -> list[nn.Module] | Refusal:
    """Layers of the same kinds and shapes as those of a plan, with random weights."""
    like = _like(plan, view)
    if isinstance(like, Refusal):
        return like
    generator = torch.Generator(like.device).manual_seed(0)
    layers: list[nn.Module] = []
    for piece in plan.pieces:
        if isinstance(piece.map, Map):
            module = _module(symmetric(narrowed(piece.map)), piece.bias is not None)
            for name, empty in list(module.named_parameters()):
                value = torch.empty(empty.shape, dtype=like.dtype, device=like.device)
                value.normal_(generator=generator)
                _assign(module, name, value, like, trains=False)
            layers.append(module)
    return layers


def _weights(plan: Plan, view: View) -> list[Tensor]:
    readings = [view.affine(node) for node in plan.expanded]
    return [r.weight for r in readings if r is not None and r.weight is not None]


def _like(plan: Plan, view: View) -> Tensor | Refusal:
    """The tensor whose dtype, device and memory format the new weights get."""
    like = max(_weights(plan, view), key=Tensor.numel, default=None)
    return _like_value(plan, view) if like is None else like


def _like_value(plan: Plan, view: View) -> Tensor | Refusal:
    """The same for a region of pooling alone, which works in every dtype."""
    parameters = [p for p in view.module.parameters() if p.is_floating_point()]
    first = parameters[0] if parameters else torch.ones(())
    found = {view.dtypes.of(piece.source) for piece in plan.pieces}
    (dtype,) = found if len(found) == 1 else (None,)
    if dtype is not None and dtype.is_floating_point:
        if torch.finfo(dtype).eps > torch.finfo(first.dtype).eps:
            return Refusal(f"it pools in {dtype}, and the layers are in {first.dtype}")
        return torch.ones((), dtype=dtype, device=first.device)
    others = {p.dtype for p in parameters} | view.dtypes.floating
    if not others <= {first.dtype}:
        return Refusal("the dtype in which it pools is not known: pass example_inputs")
    return first


def _assign(module: nn.Module, name: str, value: Tensor, like: Tensor, *, trains: bool) -> None:
    value = value.contiguous(memory_format=_memory_format(like, value))
    setattr(module, name, nn.Parameter(value, requires_grad=trains))


def _layer(piece: Piece, lookup: Lookup, like: Tensor, trains: bool) -> Layer | Refusal:
    assert isinstance(piece.map, Map)
    shape = symmetric(narrowed(piece.map))
    weight = Call(weights.to_convolution, (piece.weight, piece.map))
    bias = piece.bias
    full = None if bias is None else Call(weights.full_bias, (bias, shape.outputs))
    both = record(Call(_pair, (weight, full)))
    try:
        computed: tuple[Tensor, Tensor | None] = both.run(lookup)
    except RuntimeError as error:  # a parametrization may demand its own dtype
        return Refusal(f"its weight cannot be computed in float64: {error}")
    # A bias computed from numbers alone is on the CPU.
    shift = computed[1]
    exact = computed[0].to(like.device), None if shift is None else shift.to(like.device)
    module = _module(shape, bias is not None)
    for name, value in zip(("weight", "bias"), exact, strict=True):
        if value is None:
            continue
        rounded = value.to(dtype=like.dtype)
        refusal = rounding(name, value, rounded)
        if refusal is not None:
            return refusal
        _assign(module, name, rounded, like, trains=trains)
    return Layer(piece, module, exact, (weight, full))


def _pair(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return weight, bias


def _memory_format(like: Tensor, value: Tensor) -> torch.memory_format:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    wanted = formats.get(value.dim())
    if wanted is None or like.dim() != value.dim() or like.is_contiguous():
        return torch.contiguous_format
    return wanted if like.is_contiguous(memory_format=wanted) else torch.contiguous_format


def rounding(name: str, exact: Tensor, rounded: Tensor) -> Refusal | None:
    """Why the dtype cannot hold a fused tensor, or None."""
    limits = torch.finfo(rounded.dtype)
    largest = torch.linalg.vector_norm(exact.reshape(exact.shape[0], -1), math.inf, dim=1)
    if not bool((largest <= limits.max).all()):
        return Refusal(f"its fused {name} is not finite in {rounded.dtype}")
    # Below the smallest normal number rounding errors are absolute: up to tiny * eps / 2.
    lost = (largest > 0) & (largest < limits.tiny / (2 * WORST_ROUNDING))
    if name == "weight" and bool(lost.any()):
        return Refusal(
            f"{int(lost.sum())} rows of its fused weight are too small for {rounded.dtype}"
        )
    return None


_CONVOLUTIONS = {
    False: (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    True: (nn.Linear, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
}


def _module(shape: Map, biased: bool) -> nn.Module:
    """A layer on the meta device; the caller sets its tensors."""
    kind: Any = _CONVOLUTIONS[shape.transposed][len(shape.axes)]
    module: nn.Module
    if not shape.axes:
        module = kind(shape.inputs, shape.outputs, bias=biased, device="meta")
    else:
        options: dict[str, Any] = {
            "stride": tuple(a.stride for a in shape.axes),
            "padding": tuple(a.low if shape.symmetric else 0 for a in shape.axes),
            "dilation": tuple(a.dilation for a in shape.axes),
            "groups": shape.band.groups,
        }
        if shape.transposed:
            options["output_padding"] = tuple(a.low - a.high for a in shape.axes)
        elif shape.symmetric:
            options["padding_mode"] = shape.padding_mode
        module = kind(
            shape.inputs, shape.outputs, shape.kernel, bias=biased, device="meta", **options
        )
    module.eval()
    return module
