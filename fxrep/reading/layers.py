"""Readers of layers and arithmetic: convolution, BatchNorm, sums, scales and shifts.

Modules, functions, methods, Python's operators and in-place forms of an operation have one reader,
so that a pass need not know how the operation was spelt.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxrep.algebra import weights
from fxrep.algebra.composition import compose
from fxrep.algebra.maps import IDENTITY, Axis, Diagonal, conv_map
from fxrep.algebra.recipe import Call, Expr
from fxrep.ops.calls import ModuleTensor, is_item
from fxrep.ops.values import size_type
from fxrep.reading.view import (
    Affine,
    Constant,
    Operation,
    Reader,
    Reading,
    Term,
    Unread,
    View,
    number,
)  # fmt: skip
from fxrep.refusal import Refusal

# Recipes call the next three, so users' pickles have their names.


def _flatten(value: Tensor) -> Tensor:
    value = value.double()  # integers too: the reciprocal of 3 is not a float32
    return value.reshape(()) if value.numel() == 1 else value.reshape(-1)


def _reciprocal(value: Tensor) -> Tensor:
    return value.reciprocal()


def _product(a: Tensor, b: Tensor) -> Tensor:
    return a * b


# --- the readings of each kind of operation -------------------------------------------------------


@dataclass(frozen=True)
class _Geometry:
    """The arguments of a convolution besides its tensors; rank 0 stands for a linear layer."""

    rank: int
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: int = 1
    output_padding: Any = 0
    transposed: bool = False
    padding_mode: str = "zeros"

    @property
    def kind(self) -> str:
        """The name of the layer, as torch.nn.functional has it."""
        if not self.rank:
            return "linear"
        return f"conv_transpose{self.rank}d" if self.transposed else f"conv{self.rank}d"

    def axes(self, kernel: Sequence[int]) -> list[Axis] | None:
        """The spatial axes of a kernel; None if an argument is not known."""
        strides = as_tuple(self.stride, self.rank)
        dilations = as_tuple(self.dilation, self.rank)
        extra = as_tuple(self.output_padding, self.rank)
        if strides is None or dilations is None or extra is None or len(kernel) != self.rank:
            return None
        if self.padding == "same":
            totals = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
            pads = [(total // 2, total - total // 2) for total in totals]
        else:
            sizes = as_tuple(0 if self.padding == "valid" else self.padding, self.rank)
            if sizes is None:
                return None
            pads = [(size, size - more) for size, more in zip(sizes, extra, strict=True)]
        columns = zip(kernel, strides, pads, dilations, strict=True)
        return [Axis(k, s, low, high, d) for k, s, (low, high), d in columns]


def _convolution(
    source: Any, weight: Constant | None, bias: Constant | None, geometry: _Geometry
) -> Reading:
    """``conv(source)``: weight (O, I/g, *k), or (I, O/g, *k) transposed."""
    if not isinstance(source, fx.Node) or weight is None:
        return None
    value = weight.value
    assert isinstance(value, Tensor)
    if not value.is_floating_point() or type(value) not in _PLAIN_TENSORS:
        return Refusal(f"its weight is a {type(value).__name__} of dtype {value.dtype}")
    if value.dim() != geometry.rank + 2:
        return None
    if not value.numel():
        return Refusal("it has no channels")
    axes = geometry.axes(value.shape[2:])
    if axes is None:
        return None
    first, second = value.shape[0], value.shape[1] * geometry.groups
    shape = conv_map(
        outputs=second if geometry.transposed else first,
        inputs=first if geometry.transposed else second,
        groups=geometry.groups,
        axes=axes,
        transposed=geometry.transposed,
        padding_mode=geometry.padding_mode,
    )
    expr = Call(weights.from_convolution, (weight.expr, geometry.groups, geometry.transposed))
    return Affine(
        geometry.kind,
        (Term(source, shape, expr),),
        None if bias is None else bias.expr,
        weight=value,
        owner=weight.owner,
        operation=Operation.LAYER,
    )


def _batchnorm(
    view: View,
    node: fx.Node,
    source: Any,
    mean: Constant | None,
    variance: Constant | None,
    weight: Constant | None,
    bias: Constant | None,
    eps: Any,
    axis: int | None = None,
    kind: str = "batch_norm",
) -> Reading:
    """``(source - mean) / sqrt(variance + eps) * weight + bias``, statistics (C,)."""
    if not isinstance(source, fx.Node):
        return None
    if mean is None or variance is None:
        reason = "BatchNorm uses batch statistics: it keeps no running ones"
        return Unread(reason, Operation.BATCHNORM)
    if not mean.shape.numel():
        return Unread("BatchNorm has no channels", Operation.BATCHNORM)
    if not isinstance(eps, (int, float)):
        return None
    assumes_batched: tuple[fx.Node, ...] = ()
    if axis is None:
        # It normalises dimension 1. The rank tells which dimension that is, counted from the last.
        rank, assumed = view.rank(source)
        if rank is None:
            return Unread(
                "BatchNorm normalises dimension 1 of a value of unknown rank: pass example_inputs",
                Operation.BATCHNORM,
            )
        axis, assumes_batched = 1 - rank, ((source,) if assumed else ())
    scale = Call(
        weights.batchnorm_scale,
        (variance.expr, float(eps), None if weight is None else weight.expr),
    )
    shift = Call(weights.batchnorm_shift, (scale, mean.expr, None if bias is None else bias.expr))
    term = Term(source, Diagonal(mean.shape[0], axis), scale)
    operation = Operation.BATCHNORM if kind == "batch_norm" else Operation.OTHER
    return Affine(kind, (term,), shift, assumes_batched, operation=operation)


def _scaled(view: View, node: fx.Node, a: Any, b: Any, *, divide: bool = False) -> Reading:
    """``a * b`` where one operand is a constant, or ``a / b`` where b is."""
    constant = view.constant(b)
    if constant is None and not divide:
        a, b = b, a
        constant = view.constant(b)
    if constant is None or not isinstance(a, fx.Node) or view.constant(a) is not None:
        return None
    changed = _changed_dtype(view, a, constant)
    if changed is not None:
        return changed
    broadcast = _broadcast_constant(view, a, constant)
    if not isinstance(broadcast, _BroadcastConstant):
        return broadcast
    weight = Call(_reciprocal, (broadcast.expr,)) if divide else broadcast.expr
    term = Term(a, broadcast.diagonal, weight)
    return Affine(
        "div" if divide else "mul", (term,), None, broadcast.assumes_batched, broadcast.promotes,
        checks_channels=broadcast.diagonal.axis is None,
        operation=Operation.OTHER if divide else Operation.PRODUCT,
    )  # fmt: skip


def _sum(view: View, node: fx.Node, a: Any, b: Any, *, sign: int = 1, alpha: Any = 1) -> Reading:
    """``a + sign * alpha * b``, of values and constants."""
    if not isinstance(alpha, (int, float)):
        return None
    operands = ((a, 1.0), (b, float(sign * alpha)))
    values = [x for x, _ in operands if view.constant(x) is None]
    if not values or not all(isinstance(x, fx.Node) for x in values):
        return None
    for x, y in ((a, b), (b, a)):
        changed = _changed_dtype(view, x, view.constant(y)) if x in values else None
        if changed is not None:
            return changed
    broadcast = _BroadcastConstant(IDENTITY)
    bias: Expr | None = None
    for operand, factor in operands:
        constant = view.constant(operand)
        if constant is None or _is_zero(constant):
            continue
        answer = _broadcast_constant(view, values[0], constant)
        if not isinstance(answer, _BroadcastConstant):
            return answer
        broadcast, bias = answer, _times(answer.expr, factor)
    terms = tuple(
        Term(x, broadcast.diagonal, _times(None, factor)) for x, factor in operands if x in values
    )
    kind = "add" if sign > 0 else "sub"
    return Affine(
        kind, terms, bias, broadcast.assumes_batched, broadcast.promotes,
        checks_channels=broadcast.diagonal.axis is None,
    )  # fmt: skip


def _is_zero(constant: Constant) -> bool:
    """The int 0 that ``sum([...])`` starts from."""
    return isinstance(constant.value, float) and constant.value == 0


def _times(expr: Expr | None, factor: float) -> Expr | None:
    """``factor * expr``, where None stands for 1."""
    if factor == 1:
        return expr
    scale = Call(number, (factor,))
    return scale if expr is None else Call(_product, (expr, scale))


def _changed_dtype(view: View, operand: fx.Node, constant: Constant | None) -> Refusal | None:
    """Why arithmetic gives, or may give, another dtype than the operand has.

    A layer that took the arithmetic into its weights would be given the operand as it is, and
    raise.
    """
    dtype = view.dtypes.of(operand)
    if dtype is None:
        doubtful = constant is not None and view.dtypes.is_foreign(operand)
        reason = "arithmetic with a value of unknown dtype: pass example_inputs"
        return Refusal(reason) if doubtful else None
    if view.dtypes.is_integral(operand):
        return Refusal("arithmetic turns a value that is no floating point into one")
    value = None if constant is None else constant.value
    wide = isinstance(value, Tensor) and value.dim() > 0 and not value.is_complex()
    if wide and torch.promote_types(value.dtype, dtype) != dtype:  # type: ignore[union-attr]
        return Refusal(f"a constant of {value.dtype} promotes {dtype}")  # type: ignore[union-attr]
    return None


@dataclass(frozen=True)
class _BroadcastConstant:
    """A constant broadcast over a value as one number per channel, or one for all.

    Attributes:
        diagonal: the map that scales by the constant.
        expr: the constant as (C,) or ().
        assumes_batched: see `Affine`.
        promotes: see `Affine`.
    """

    diagonal: Diagonal
    expr: Expr | None = None
    assumes_batched: tuple[fx.Node, ...] = ()
    promotes: tuple[torch.dtype, ...] = ()


def _broadcast_constant(
    view: View, operand: fx.Node, constant: Constant
) -> _BroadcastConstant | Refusal | None:
    """A constant broadcast over a value; None or a reason if it is no number per channel."""
    shape = constant.shape
    wide = [i for i, size in enumerate(shape) if size != 1]
    if len(wide) > 1:
        return None  # a mask, a positional embedding
    if not shape.numel():
        return Refusal("a constant without elements")
    if len(shape) == 1 and not wide and view.ranks.least(operand) < 1:
        return None  # it may grow a value without axes
    assumes_batched: tuple[fx.Node, ...] = ()
    if len(shape) > 1:
        rank, assumed = view.rank(operand)
        if rank is None:
            if not isinstance(view.read(operand), Affine):
                return None
            return Refusal(
                f"a constant of shape {tuple(shape)} meets a value of unknown rank: "
                "pass example_inputs"
            )
        if len(shape) > rank:
            return Refusal(f"a constant of shape {tuple(shape)} grows a value of rank {rank}")
        # A Conv2d takes (C, H, W) too: only a constant of full rank tells the two apart.
        if assumed and len(shape) == rank:
            assumes_batched = (operand,)
    dtypes: tuple[torch.dtype, ...] = ()
    if isinstance(constant.value, Tensor):
        if constant.value.is_complex():
            return Refusal("a complex constant")
        if len(shape):
            dtypes = (constant.value.dtype,)
    diagonal = Diagonal(shape[wide[0]], wide[0] - len(shape)) if wide else IDENTITY
    return _BroadcastConstant(diagonal, Call(_flatten, (constant.expr,)), assumes_batched, dtypes)


def per_channel(view: View, node: fx.Node, value: Any, axis: int) -> Expr | None:
    """A constant that has one value for each channel of `node`, or one for all: (C,) or ()."""
    constant = view.constant(value)
    broadcast = None if constant is None else _broadcast_constant(view, node, constant)
    if not isinstance(broadcast, _BroadcastConstant) or broadcast.diagonal.axis not in (None, axis):
        return None
    return broadcast.expr


def _identity(view: View, node: fx.Node, input: Any) -> Reading:
    if not isinstance(input, fx.Node):
        return None
    return Affine("identity", (Term(input, IDENTITY),), operation=Operation.IDENTITY)


# --- readers: from the arguments of a call to a reading -------------------------------------------


def _padding_is_unchanged(module: nn.modules.conv._ConvNd) -> bool:
    """Whether the pads that a convolution computed in its constructor still fit its `padding`.

    Its forward reads them for the padding modes other than "zeros".
    """
    if module.padding_mode == "zeros":
        return True
    sizes, spatial = module.padding, len(module.kernel_size)
    if isinstance(sizes, str):
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        same = [size for t in reversed(totals) for size in (t // 2, t - t // 2)]
        expected = same if sizes == "same" else [0] * 2 * spatial
    else:
        expected = [size for size in reversed(as_tuple(sizes, spatial) or ()) for _ in "lh"]
    return list(module._reversed_padding_repeated_twice) == expected


_PLAIN_TENSORS = {Tensor, nn.Parameter, nn.Buffer}


def _read_conv(rank: int, transposed: bool = False) -> Reader:
    """The reader of a convolution with `rank` spatial axes; of a linear layer for 0."""

    def read(
        view: View, node: fx.Node, input: Any, weight: Any, bias: Any,
        **how: Any,
    ) -> Reading:  # fmt: skip
        held = view.calls.submodule(str(node.target)) if isinstance(weight, ModuleTensor) else None
        if isinstance(held, nn.modules.conv._ConvNd) and not _padding_is_unchanged(held):
            return Refusal("its padding was changed after it was made")
        variable = view.variable(weight, bias)
        if variable is not None:
            return Refusal(variable)
        constants = view.constant(weight), view.constant(bias)
        if bias is not None and constants[1] is None:
            return None
        return _convolution(input, *constants, _Geometry(rank, transposed=transposed, **how))

    return read


def _read_batchnorm(axis: int | None = None, kind: str = "batch_norm") -> Reader:
    """The reader of a BatchNorm.

    Args:
        axis: the channel dimension, counted from the last; None if it depends on the rank.
        kind: of the reading.
    """

    def read(
        view: View, node: fx.Node, input: Any, running_mean: Any, running_var: Any,
        weight: Any, bias: Any, training: Any, eps: Any, track_running_stats: Any = True, **_: Any,
    ) -> Reading:  # fmt: skip
        if training is not False:
            return Unread("BatchNorm is in training mode", Operation.BATCHNORM)
        if not track_running_stats and kind == "instance_norm":
            return None
        variable = view.variable(running_mean, running_var, weight, bias)
        if variable is not None:
            return Unread(variable, Operation.BATCHNORM)
        scale, shift = view.constant(weight), view.constant(bias)
        if (weight is not None and scale is None) or (bias is not None and shift is None):
            reason = "BatchNorm's weight or bias is computed from the input"
            return Unread(reason, Operation.BATCHNORM)
        mean, variance = view.constant(running_mean), view.constant(running_var)
        return _batchnorm(
            view, node, input, mean, variance, scale, shift, eps, axis=axis, kind=kind
        )

    return read


def _read_add(view: View, node: fx.Node, input: Any, other: Any, alpha: Any = 1) -> Reading:
    return _sum(view, node, input, other, alpha=alpha)


def _read_sub(view: View, node: fx.Node, input: Any, other: Any, alpha: Any = 1) -> Reading:
    return _sum(view, node, input, other, alpha=alpha, sign=-1)


def _read_rsub(view: View, node: fx.Node, input: Any, other: Any, alpha: Any = 1) -> Reading:
    return _sum(view, node, other, input, alpha=alpha, sign=-1)


def _read_mul(view: View, node: fx.Node, input: Any, other: Any) -> Reading:
    return _scaled(view, node, input, other)


def _read_div(view: View, node: fx.Node, input: Any, other: Any, rounding_mode: Any) -> Reading:
    return None if rounding_mode else _scaled(view, node, input, other, divide=True)


def _read_neg(view: View, node: fx.Node, input: Any) -> Reading:
    return _scaled(view, node, input, -1)


def _read_dropout(view: View, node: fx.Node, input: Any, training: Any, **_: Any) -> Reading:
    return _identity(view, node, input) if training is False else None


def _read_contiguous(view: View, node: fx.Node, input: Any, memory_format: Any) -> Reading:
    plain = memory_format in (None, torch.contiguous_format)
    return _identity(view, node, input) if plain else None


def _read_reshape_as(view: View, node: fx.Node, input: Any, other: Any) -> Reading:
    """``scale(v.flatten(0, k)).reshape_as(v)`` is a scale of the last dimension of v.

    Models call BatchNorm1d on tokens (N, L, C) this way.
    """
    return _unflattened(view, node, input, other)


def _read_view(view: View, node: fx.Node, input: Any, size: Any) -> Reading:
    """The same for ``scale(v.reshape(-1, v.shape[-1])).view(v.shape)``."""
    only = size[0] if isinstance(size, (tuple, list)) and len(size) == 1 else size
    if not isinstance(only, fx.Node) or size_type(view.calls, only) is not torch.Size:
        return None
    return _unflattened(view, node, input, only.args[0]) if not is_item(only) else None


def _unflattened(view: View, node: fx.Node, input: Any, other: Any) -> Reading:
    """The reading of `node`, which restores the shape of `other` after a flatten and scales."""
    shape = IDENTITY
    assumes_batched: tuple[fx.Node, ...] = ()
    weight: Expr | None = None
    biases: list[Expr] = []
    inside: list[fx.Node] = []
    value = input
    while isinstance(value, fx.Node) and len(inside) < 8:
        if any(user is not node and user not in inside for user in value.users):
            return None
        inside.append(value)
        start = _flattened(view, value)
        if start is not None:
            if start is not other or shape.axis not in (None, -1):
                return None
            if view.ranks.rank(start) is None:
                assumes_batched = (*assumes_batched, start)
            bias = Call(weights.add_biases, tuple(biases)) if biases else None
            term = Term(start, shape, weight)
            return Affine(
                "identity", (term,), bias, assumes_batched, absorbed=tuple(inside),
                operation=Operation.IDENTITY,
            )  # fmt: skip
        reading = view.read(value)
        if not isinstance(reading, Affine) or len(reading.terms) > 1:
            return reading if isinstance(reading, Refusal) else None
        assumes_batched = (*assumes_batched, *reading.assumes_batched)
        term = reading.terms[0]
        composed = compose(shape, term.map, biased=reading.bias is not None)
        if not isinstance(composed, Diagonal):
            return None
        if reading.bias is not None:
            biases.append(Call(weights.compose_bias, (shape, weight, reading.bias)))
        weight = Call(weights.compose, (composed, shape, term.map, weight, term.weight))
        shape, value = composed, term.operand
    return None


def _flattened(view: View, node: fx.Node) -> fx.Node | None:
    """The value of which `node` flattens leading dimensions but not the last; None for others."""
    if node.target in ("reshape", "view", torch.reshape):
        return _flattened_by_reshape(node)
    if node.target not in ("flatten", torch.flatten):
        return None
    args = [*node.args, *(node.kwargs[k] for k in ("start_dim", "end_dim") if k in node.kwargs)]
    if len(args) != 3 or args[1] != 0 or not isinstance(args[2], int):
        return None
    source = args[0]
    assert isinstance(source, fx.Node)
    rank, _ = view.rank(source)
    if rank is None:
        return None
    end = args[2] + rank if args[2] < 0 else args[2]
    return source if 0 <= end <= rank - 2 else None


def _flattened_by_reshape(node: fx.Node) -> fx.Node | None:
    """The value v of ``v.reshape(-1, v.shape[-1])``."""
    source, *sizes = node.args
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        sizes = list(sizes[0])
    if len(sizes) != 2 or sizes[0] != -1 or not isinstance(sizes[1], fx.Node):
        return None
    last = sizes[1]
    if last.target == "size":
        return source if last.args == (source, -1) else None  # type: ignore[return-value]
    if last.target is not operator.getitem or last.args[1] != -1:
        return None
    shape = last.args[0]
    if not isinstance(shape, fx.Node) or shape.args[:1] != (source,):
        return None
    by_attribute = shape.target is getattr and shape.args[1] == "shape"
    return source if by_attribute or shape.target == "size" else None  # type: ignore[return-value]


READERS: dict[str, Reader] = {
    **{f"{name}{n}d": _read_conv(n) for name in ("conv", "Conv") for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": _read_conv(n, transposed=True) for n in (1, 2, 3)},
    "linear": _read_conv(0),
    "batch_norm": _read_batchnorm(),
    **{f"BatchNorm{n}d": _read_batchnorm(-n - 1) for n in (2, 3)},
    **{f"InstanceNorm{n}d": _read_batchnorm(-n - 1, "instance_norm") for n in (1, 2, 3)},
    "add": _read_add,
    "sub": _read_sub,
    "rsub": _read_rsub,
    "mul": _read_mul,
    "div": _read_div,
    "neg": _read_neg,
    **dict.fromkeys(
        ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout"), _read_dropout
    ),
    "Identity": _identity,
    "contiguous": _read_contiguous,
    "view_as": _read_reshape_as,
    **dict.fromkeys(("view", "reshape"), _read_view),
}
"""The readers, by the name of the operator in `fxrep.ops.table`."""


def as_tuple(value: Any, length: int) -> tuple[int, ...] | None:
    """An integer, NumPy's too, or a sequence of them as a tuple of ints; None for other values."""
    if isinstance(value, Integral):
        return (int(value),) * length
    if isinstance(value, Sequence) and all(isinstance(v, Integral) for v in value):
        if len(value) == 1:
            return (int(value[0]),) * length
        return tuple(map(int, value)) if len(value) == length else None
    return None
