"""Readers of structure: concatenations, slices, splits, paddings, average pooling, unshuffling.

Each of these operations is an affine convolution map that selects, places or averages elements. An
operation that treats every channel alike is a map without a band. An operation that moves channels
has a reading only if their number (`fxrep.analysis.channels`) and their axis are known.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxrep.algebra import weights
from fxrep.algebra.maps import (
    IDENTITY,
    Axis,
    Band,
    Map,
    channel_map,
    placement_band,
    pointwise_axes,
    selection_band,
)
from fxrep.algebra.recipe import Call, Expr
from fxrep.analysis.size_rules import part_sizes
from fxrep.ops.op import Shape
from fxrep.reading.layers import as_tuple, per_channel
from fxrep.reading.view import (
    Affine,
    Operation,
    Reader,
    Reading,
    Term,
    Unread,
    View,
    number,
)  # fmt: skip
from fxrep.refusal import Refusal


def _axis_from_last(
    view: View, node: fx.Node, dim: int, operation: Operation = Operation.OTHER
) -> tuple[int, tuple[fx.Node, ...]] | Refusal:
    """A dimension counted from the last, and the values whose rank that assumes."""
    if dim < 0:
        return dim, ()
    rank, assumed = view.rank(node)
    if rank is None:
        reason = f"dimension {dim} of a value of unknown rank: pass example_inputs"
        return Unread(reason, operation)
    return dim - rank, ((node,) if assumed else ())


def _axes_after(axis: int) -> tuple[Axis, ...]:
    """The spatial axes after a channel axis, unchanged."""
    return pointwise_axes(-axis - 1)


# --- concatenation, slices, splits ---------------------------------------------------------------


def _read_cat(view: View, node: fx.Node, tensors: Any, dim: Any = 0) -> Reading:
    if not isinstance(tensors, (tuple, list)) or not isinstance(dim, int) or not tensors:
        return None
    operands = list(tensors)
    if not all(isinstance(each, fx.Node) for each in operands) or dim == 0:
        return None
    if any(view.dtypes.is_integral(each) for each in operands):
        return None  # a concatenation promotes, a layer of a part would not
    placed = _axis_from_last(view, operands[0], dim, Operation.CONCATENATION)
    if isinstance(placed, Refusal):
        return placed
    axis, assumes_batched = placed
    counts = [view.channels.of(each, axis) for each in operands]
    if not all(counts):
        reason = "the channels of what it concatenates are not known"
        return Unread(reason, Operation.CONCATENATION)
    sizes = [count for count in counts if count is not None]
    total, first, terms = sum(sizes), 0, []
    for operand, size in zip(operands, sizes, strict=True):
        band = placement_band(first, size, total)
        terms.append(Term(operand, Map(_axes_after(axis), band)))
        first += size
    return Affine(
        "cat", tuple(terms), assumes_batched=assumes_batched, checks_channels=False,
        operation=Operation.CONCATENATION,
    )  # fmt: skip


def _read_item(view: View, node: fx.Node, input: Any, key: Any) -> Reading:
    a, b = input, key
    if not isinstance(a, fx.Node):
        return None
    if isinstance(b, int) and not isinstance(b, bool):
        return _part(view, a, b)
    entries = list(b) if isinstance(b, tuple) else [b]
    if entries.count(Ellipsis) > 1 or not entries:
        return None
    rank, assumed = view.rank(a)
    cuts = dict(_sliced_dimensions(entries))
    if not cuts:
        return Affine("identity", (Term(a, IDENTITY),), operation=Operation.IDENTITY)
    if rank is None:
        return None
    assumes_batched = (a,) if assumed and any(dim >= 0 for dim in cuts) else ()
    cuts = {dim - rank if dim >= 0 else dim: entry for dim, entry in cuts.items()}
    if set(cuts) == {1 - rank}:
        return _select_channels(view, a, 1 - rank, cuts[1 - rank], assumes_batched)
    axes = [_slice_axis(cuts.pop(dim, slice(None))) for dim in range(2 - rank, 0)]
    known = [axis for axis in axes if axis is not None]
    if cuts or len(known) < len(axes):
        return None
    return Affine(
        "slice", (Term(a, channel_map(known)),), assumes_batched=assumes_batched,
        checks_channels=False, operation=Operation.PART,
    )  # fmt: skip


def _sliced_dimensions(entries: Sequence[Any]) -> Iterator[tuple[int, Any]]:
    """The entries of an index other than ``:``, with dimensions, from the last after ``...``."""
    dims = list(range(len(entries)))
    if Ellipsis in entries:
        here = entries.index(Ellipsis)
        dims[here + 1 :] = range(here + 1 - len(entries), 0)
    for dim, entry in zip(dims, entries, strict=True):
        whole = isinstance(entry, slice) and entry == slice(None)
        if entry is not Ellipsis and not whole:
            yield dim, entry


def _slice_axis(entry: Any) -> Axis | None:
    """``a:-b:s`` along a spatial axis, a crop and a stride; None if it depends on the size."""
    if not isinstance(entry, slice):
        return None
    start, stop = entry.start or 0, entry.stop
    step = 1 if entry.step is None else entry.step
    if not all(isinstance(x, int) for x in (start, step)) or start < 0 or step < 1:
        return None
    if stop is not None and (not isinstance(stop, int) or stop >= 0):
        return None
    return Axis(1, step, -start, stop or 0)


def _select_channels(
    view: View, source: fx.Node, axis: int, entry: Any, assumes_batched: tuple[fx.Node, ...]
) -> Reading:
    """The reading of a selection of channels by a slice or an index tensor, `entry`."""
    size = view.channels.of(source, axis)
    if size is None:
        return None
    if isinstance(entry, slice):
        bounds = (entry.start, entry.stop, entry.step)
        if not all(x is None or isinstance(x, int) for x in bounds):
            return None
        picked = list(range(size))[entry]
    else:
        constant = view.constant(entry) if isinstance(entry, fx.Node) else None
        value = None if constant is None else constant.value
        if constant is None or not isinstance(value, Tensor):
            return None
        if value.dim() != 1 or value.is_floating_point():
            return None
        if value.dtype == torch.bool or value.dtype == torch.uint8:
            return None
        view.depends_on_content(constant.expr)
        picked = [int(i) % size if -size <= i < size else -1 for i in value.tolist()]
    if not picked or -1 in picked:
        return None
    shape = Map(_axes_after(axis), selection_band(picked, size))
    kind, operation = "index", Operation.OTHER
    if isinstance(entry, slice):
        kind, operation = "slice", Operation.PART
    return Affine(
        kind, (Term(source, shape),), assumes_batched=assumes_batched, checks_channels=False,
        operation=operation,
    )  # fmt: skip


def _read_index_select(view: View, node: fx.Node, input: Any, dim: Any, index: Any) -> Reading:
    if not isinstance(input, fx.Node) or not isinstance(dim, int):
        return None
    placed = _axis_from_last(view, input, dim)
    if isinstance(placed, Refusal):
        return placed
    return _select_channels(view, input, placed[0], index, placed[1])


def _read_narrow(
    view: View, node: fx.Node, input: Any, dim: Any, start: Any, length: Any
) -> Reading:
    """``input[:, start : start + length]``; along other axes it would depend on the size."""
    if not isinstance(input, fx.Node) or not all(isinstance(x, int) for x in (dim, start, length)):
        return None
    placed = _axis_from_last(view, input, dim)
    rank, _ = view.rank(input)
    if isinstance(placed, Refusal) or rank is None or placed[0] != 1 - rank or start < 0:
        return None
    return _select_channels(view, input, placed[0], slice(start, start + length), placed[1])


def _part(view: View, split: fx.Node, index: int) -> Reading:
    """The reading of one of the values that a chunk or split returns."""
    called = view.calls.of(split)
    if called is None or called.op.shape is not Shape.PARTS:
        return None
    source, dim = called.source, called.get("dim")
    if not isinstance(source, fx.Node) or not isinstance(dim, int) or dim == 0:
        return None
    placed = _axis_from_last(view, source, dim)
    if isinstance(placed, Refusal):
        return None
    axis, assumes_batched = placed
    size = view.channels.of(source, axis)
    if size is None:
        return None
    sizes = part_sizes(called, size)
    if not -len(sizes) <= index < len(sizes) or not sizes[index]:
        return None
    first = sum(sizes[: index % len(sizes)])
    shape = Map(_axes_after(axis), selection_band(range(first, first + sizes[index]), size))
    return Affine(
        "chunk", (Term(source, shape),), assumes_batched=assumes_batched, checks_channels=False,
        absorbed=(split,), operation=Operation.PART,
    )  # fmt: skip


# --- padding -------------------------------------------------------------------------------------


def _read_pad(
    view: View, node: fx.Node, input: Any, pad: Any, mode: Any = "constant", value: Any = None
) -> Reading:
    if not isinstance(input, fx.Node) or not isinstance(pad, (tuple, list)) or len(pad) % 2:
        return None
    if not all(isinstance(size, int) for size in pad):
        return None
    sizes = [(pad[i], pad[i + 1]) for i in range(0, len(pad), 2)][::-1]  # the last axis last
    while sizes and sizes[0] == (0, 0):
        sizes.pop(0)
    if mode == "constant" and value not in (None, 0):
        return _constant_pad(view, input, sizes, value)
    rank, assumed = view.rank(input)
    if rank is not None and len(sizes) == rank - 1 and mode == "constant":
        return _channel_pad(view, input, sizes, (input,) if assumed else ())
    if rank is None or len(sizes) > rank - 2:
        return None
    shape = channel_map(
        [Axis(1, 1, low, high) for low, high in sizes], "zeros" if mode == "constant" else mode
    )
    written = [u for u in node.users if u.target is operator.setitem and u.args[0] is node]
    if written and mode == "constant":
        return _written_pad(view, node, input, sizes, rank, sorted(written))
    return Affine("pad", (Term(input, shape),), operation=Operation.PADDING)


def _channel_pad(
    view: View,
    source: fx.Node,
    sizes: Sequence[tuple[int, int]],
    assumes_batched: tuple[fx.Node, ...],
) -> Reading:
    """Padding with channels of zeros, as in the shortcuts of ResNets for CIFAR."""
    (low, high), spatial = sizes[0], sizes[1:]
    count = view.channels.of(source, -len(sizes))
    if count is None or low < 0 or high < 0 or any(size != (0, 0) for size in spatial):
        return None
    shape = Map(_axes_after(-len(sizes)), placement_band(low, count, low + count + high))
    return Affine(
        "pad", (Term(source, shape),), assumes_batched=assumes_batched, checks_channels=False,
        operation=Operation.PADDING,
    )  # fmt: skip


def _constant_pad(
    view: View, source: fx.Node, sizes: Sequence[tuple[int, int]], value: Any
) -> Reading:
    rank, _ = view.rank(source)
    if rank is None or len(sizes) > rank - 2 or not isinstance(value, (int, float)):
        return None
    shape = channel_map([Axis(1, 1, low, high) for low, high in sizes], "constant")
    if shape.padding_mode == "zeros":  # a crop
        return Affine("pad", (Term(source, shape),), operation=Operation.PADDING)
    return Affine(
        "pad", (Term(source, shape),), pad_value=Call(number, (float(value),)),
        operation=Operation.PADDING,
    )  # fmt: skip


def _written_pad(
    view: View, node: fx.Node, source: fx.Node, sizes: Sequence[tuple[int, int]], rank: int,
    written: Sequence[fx.Node],
) -> Reading:  # fmt: skip
    """Zero padding whose border is then overwritten, side by side, with one value per channel.

    DBB, ECBSR and RRRB pad with the value that the layer before gives for a zero input, so that the
    merged convolution pads its own input by zeros.
    """
    readers = [user for user in node.users if user not in written]
    if not readers or min(readers) < max(written):
        return Unread("its padding is written over after others have read it", Operation.PADDING)
    if view.aliasing.writes_between(node, max(readers), [node], dying=set(written)):
        return Unread("its padding is written over by more than assignments", Operation.PADDING)
    value = _border_value(view, node, sizes, rank, written)
    if isinstance(value, Unread):
        return value
    shape = channel_map([Axis(1, 1, low, high) for low, high in sizes], "constant")
    _, assumed = view.rank(node)
    return Affine(
        "pad", (Term(source, shape),), assumes_batched=(source,) if assumed else (),
        absorbed=tuple(written), pad_value=value, includes_writes=True,
        operation=Operation.PADDING,
    )  # fmt: skip


def _border_value(
    view: View, node: fx.Node, sizes: Sequence[tuple[int, int]], rank: int,
    written: Sequence[fx.Node],
) -> Expr | Unread:  # fmt: skip
    """The value, (C,) or (), that assignments give the border of a padding, or why there is none.

    Args:
        view: the graph.
        node: the padding.
        sizes: low and high padding of the last axes.
        rank: the rank of the padded value.
        written: the assignments.
    """
    values: list[Expr] = []
    sides = set()
    for write in written:
        side = _side(write.args[1], rank)
        value = per_channel(view, node, write.args[2], 1 - rank)
        if side is None or value is None:
            reason = "its padding is written over, but not with one value per channel"
            return Unread(reason, Operation.PADDING)
        values.append(value)
        sides.add(side)
    expected = {
        (axis, end, size[end])
        for axis, size in zip(range(-len(sizes), 0), sizes, strict=True)
        for end in (0, 1)
        if size[end]
    }
    if sides != expected or any(size < 0 for pair in sizes for size in pair):
        reason = "its padding is written over, but not on exactly the padded sides"
        return Unread(reason, Operation.PADDING)
    first = view.value(values[0])
    if not all(torch.equal(view.value(v).expand_as(first), first) for v in values[1:]):
        return Unread("its padding is written over with different values", Operation.PADDING)
    return values[0]


def _side(key: Any, rank: int) -> tuple[int, int, int] | None:
    """The axis, the end (0 or 1) and the width of a side that ``y[:, :, -1:] = v`` writes."""
    entries = list(key) if isinstance(key, tuple) else [key]
    if entries.count(Ellipsis) > 1:
        return None
    if Ellipsis in entries:
        here = entries.index(Ellipsis)
        fill = [slice(None)] * (rank - len(entries) + 1)
        entries = entries[:here] + fill + entries[here + 1 :]
    cut = [(i - rank, entry) for i, entry in enumerate(entries) if entry != slice(None)]
    if len(cut) != 1 or not isinstance(cut[0][1], slice) or cut[0][0] < 2 - rank:
        return None
    axis, entry = cut[0]
    if entry.step not in (None, 1):
        return None
    if entry.start in (None, 0) and isinstance(entry.stop, int) and entry.stop > 0:
        return axis, 0, entry.stop
    if isinstance(entry.start, int) and entry.start < 0 and entry.stop is None:
        return axis, 1, -entry.start
    return None


# --- average pooling -----------------------------------------------------------------------------


def _average(source: fx.Node, axes: Sequence[Axis], weight: Expr) -> Affine:
    return Affine(
        "avg_pool", (Term(source, channel_map(axes), weight),), checks_channels=False,
        operation=Operation.POOLING,
    )  # fmt: skip


def _read_avg_pool(rank: int) -> Callable[..., Reading]:
    def read(
        view: View, node: fx.Node, input: Any, kernel_size: Any, stride: Any = None,
        padding: Any = 0, ceil_mode: Any = False, count_include_pad: Any = True,
        divisor_override: Any = None,
    ) -> Reading:  # fmt: skip
        kernel = as_tuple(kernel_size, rank)
        strides = kernel if stride is None or stride == [] else as_tuple(stride, rank)
        pads = as_tuple(padding, rank)
        if not isinstance(input, fx.Node) or kernel is None or strides is None or pads is None:
            return None
        if any(pads) and not count_include_pad and divisor_override is None:
            reason = "average pooling divides by fewer values at the border"
            return Unread(reason, Operation.POOLING)
        if ceil_mode and any(s > 1 for s in strides):
            reason = "average pooling in ceil mode: its last window depends on the size"
            return Unread(reason, Operation.POOLING)
        if not isinstance(divisor_override or 1, int):
            return None
        axes = [Axis(k, s, p, p) for k, s, p in zip(kernel, strides, pads, strict=True)]
        weight = Call(number, (1 / (divisor_override or math.prod(kernel)),))
        return _average(input, axes, weight)

    return read


def _read_adaptive_avg_pool(rank: int) -> Callable[..., Reading]:
    """The reader of adaptive pooling from known sizes that the output sizes divide."""

    def read(view: View, node: fx.Node, input: Any, output_size: Any) -> Reading:
        outputs = as_tuple(output_size, rank)
        if not isinstance(input, fx.Node) or outputs is None:
            return None
        axes = []
        for axis, size in zip(range(-rank, 0), outputs, strict=True):
            given = view.channels.of(input, axis)
            if given is None or size < 1 or given % size:
                return None
            axes.append(Axis(given // size, given // size))
        weight = Call(number, (1 / math.prod(axis.kernel for axis in axes),))
        return _average(input, axes, weight)

    return read


# --- pixels to channels --------------------------------------------------------------------------


def _read_unshuffle(view: View, node: fx.Node, input: Any, downscale_factor: Any) -> Reading:
    if not isinstance(input, fx.Node) or not isinstance(downscale_factor, int):
        return None
    count, r = view.channels.of(input, -3), downscale_factor
    if count is None:
        return None
    band = Band(torch.arange(count * r * r) // (r * r), 1, count)
    # It raises unless r divides the size: its windows leave nothing unread.
    shape = Map((Axis(r, r, rest=0), Axis(r, r, rest=0)), band)
    weight = Call(weights.one_hot, (count * r * r, (r, r)))
    return Affine("pixel_unshuffle", (Term(input, shape, weight),), checks_channels=False)


READERS: dict[str, Reader] = {
    "cat": _read_cat,
    "getitem": _read_item,
    "index_select": _read_index_select,
    "narrow": _read_narrow,
    "pad": _read_pad,
    **{f"{kind}Pad1d": _read_pad for kind in (
        "Zero", "Constant", "Reflection", "Replication", "Circular"
    )},
    **{f"avg_pool{n}d": _read_avg_pool(n) for n in (1, 2, 3)},
    **{f"adaptive_avg_pool{n}d": _read_adaptive_avg_pool(n) for n in (1, 2, 3)},
    "pixel_unshuffle": _read_unshuffle,
}  # fmt: skip
"""The readers, by the name of the operator in `fxrep.ops.table`."""
