"""Operations that commute with scales of channels, or with 1x1 convolutions.

Given: a spatial operation R that treats every channel alike and keeps constant images (every
resize, average pooling that does not count padding), and a pointwise map W.

Result: ``W(R(x)) + b = R(W(x) + b)``. With max pooling W may only scale each channel by a positive
number. With a pixel shuffle W may only scale channels, and each scale is repeated for the channels
that the shuffle merges into one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx

from fxrep.algebra.maps import Axis
from fxrep.reading.layers import as_tuple
from fxrep.reading.view import View

Sizes = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Commuter:
    """An operation that commutes with pointwise maps, so that they may be moved over it.

    Attributes:
        node: the call of the operation.
        source: its operand.
        spatial: number of spatial axes.
        shrinks: the result has fewer positions, so a 1x1 convolution costs less after it.
        keeps_order_only: the operation is not linear but keeps the order of values, as max pooling
            does. It then commutes with positive scales of channels alone.
        spread: channels of the operand per channel of the result, as in a pixel shuffle. If there
            are several, the operation commutes with maps that do not mix channels alone.
        axes: its windows, if it has any.
        factors: the size of the result over that of the operand, per axis, where it is known.
    """

    node: fx.Node
    source: fx.Node
    spatial: int
    shrinks: bool = False
    keeps_order_only: bool = False
    spread: int = 1
    axes: tuple[Axis, ...] = ()
    factors: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        """The operation's name, as reports show it."""
        target = self.node.meta.get("owner") or self.node.target
        return str(getattr(target, "__name__", target))

    @property
    def allows_mixing(self) -> bool:
        """Whether the operation commutes with maps that mix channels."""
        return not self.keeps_order_only and self.spread == 1

    def operand_sizes(self, sizes: Sizes) -> Sizes:
        """The least spatial sizes of the operand that give `sizes` in the result."""
        if self.axes:
            return tuple(a.needed(n) for a, n in zip(self.axes, sizes, strict=True))
        if self.factors:
            return tuple(math.ceil(n / f) for n, f in zip(sizes, self.factors, strict=True))
        if self.shrinks:  # a mean over all positions, at least two per axis
            return tuple(2 * n for n in sizes)
        return sizes


def commuter(view: View, node: fx.Node) -> Commuter | None:
    """The node as an operation that commutes with pointwise maps, or None."""
    called = view.calls.of(node)
    reader = None if called is None else _READERS.get(called.op.name)
    if called is None or reader is None or called.arguments is None:
        return None
    found = reader(view, node, **called.arguments)
    if found is None or node.all_input_nodes != [found.source]:
        return None
    return found if view.aliasing.replaceable(node) else None


def _resize(
    view: View, node: fx.Node, input: Any, scale_factor: Any = None, **_: Any,
) -> Commuter | None:  # fmt: skip
    rank, _assumed = view.rank(node)
    if rank is None or rank < 3:
        return None
    given = (
        scale_factor if isinstance(scale_factor, (tuple, list)) else (scale_factor,) * (rank - 2)
    )
    known = len(given) == rank - 2 and all(isinstance(f, (int, float)) and f > 0 for f in given)
    return Commuter(node, input, rank - 2, factors=tuple(map(float, given)) if known else ())


def _overhang(stride: int, ceil_mode: Any) -> int:
    """By how many positions the last window may reach beyond the padding."""
    return stride - 1 if ceil_mode else 0


def _max_pool(rank: int) -> Callable[..., Commuter | None]:
    def read(
        view: View, node: fx.Node, input: Any, kernel_size: Any, stride: Any = None,
        padding: Any = 0, dilation: Any = 1, ceil_mode: Any = False, return_indices: Any = False,
    ) -> Commuter | None:  # fmt: skip
        kernel, pads = as_tuple(kernel_size, rank), as_tuple(padding, rank)
        strides = kernel if stride is None or stride == [] else as_tuple(stride, rank)
        dilations = as_tuple(dilation, rank)
        if return_indices or None in (kernel, pads, strides, dilations):
            return None
        columns = zip(kernel, strides, pads, dilations, strict=True)  # type: ignore[arg-type]
        axes = tuple(Axis(k, s, p, p + _overhang(s, ceil_mode), d) for k, s, p, d in columns)
        return Commuter(node, input, rank, keeps_order_only=True, axes=axes)

    return read


def _avg_pool(rank: int) -> Callable[..., Commuter | None]:
    def read(
        view: View, node: fx.Node, input: Any, kernel_size: Any, stride: Any = None,
        padding: Any = 0, ceil_mode: Any = False, count_include_pad: Any = True,
        divisor_override: Any = None,
    ) -> Commuter | None:  # fmt: skip
        kernel, pads = as_tuple(kernel_size, rank), as_tuple(padding, rank)
        strides = kernel if stride is None or stride == [] else as_tuple(stride, rank)
        if kernel is None or pads is None or strides is None:
            return None
        if any(pads) and count_include_pad:
            return None  # the zeros change a constant image at the border
        exact = divisor_override == math.prod(kernel) and not ceil_mode and not any(pads)
        if divisor_override is not None and not exact:
            return None
        columns = zip(kernel, strides, pads, strict=True)
        axes = tuple(Axis(k, s, p, p + _overhang(s, ceil_mode)) for k, s, p in columns)
        return Commuter(node, input, rank, shrinks=True, axes=axes)

    return read


def _adaptive(rank: int, maximum: bool) -> Callable[..., Commuter | None]:
    def read(
        view: View, node: fx.Node, input: Any, output_size: Any, return_indices: Any = False
    ) -> Commuter | None:
        single = as_tuple(output_size, rank) == (1,) * rank
        if return_indices:
            return None
        return Commuter(node, input, rank, shrinks=single and not maximum, keeps_order_only=maximum)

    return read


def _mean(
    view: View, node: fx.Node, input: Any, dim: Any = None, keepdim: Any = False, dtype: Any = None
) -> Commuter | None:
    """A mean over all positions that keeps the spatial axes, with size 1."""
    rank, assumed = view.rank(input) if isinstance(input, fx.Node) else (None, False)
    dims = (dim,) if isinstance(dim, int) else dim
    if (
        rank is None
        or keepdim is not True
        or dtype is not None
        or not isinstance(dims, (tuple, list))
    ):
        return None
    if not all(isinstance(d, int) for d in dims) or (assumed and any(d >= 0 for d in dims)):
        return None
    if sorted(d - rank if d >= 0 else d for d in dims) != list(range(2 - rank, 0)) or rank < 3:
        return None
    return Commuter(node, input, rank - 2, shrinks=True)


def _shuffle(view: View, node: fx.Node, input: Any, upscale_factor: Any) -> Commuter | None:
    if not isinstance(upscale_factor, int) or upscale_factor < 1:
        return None
    factors = (float(upscale_factor),) * 2
    return Commuter(node, input, 2, spread=upscale_factor**2, factors=factors)


_READERS: dict[str, Callable[..., Commuter | None]] = {
    "interpolate": _resize,
    "pixel_shuffle": _shuffle,
    "mean": _mean,
    **{f"avg_pool{n}d": _avg_pool(n) for n in (1, 2, 3)},
    **{f"max_pool{n}d": _max_pool(n) for n in (1, 2, 3)},
    **{f"adaptive_avg_pool{n}d": _adaptive(n, maximum=False) for n in (1, 2, 3)},
    **{f"adaptive_max_pool{n}d": _adaptive(n, maximum=True) for n in (1, 2, 3)},
}
"""The readers, by the name of the operator in `fxrep.ops.table`."""
