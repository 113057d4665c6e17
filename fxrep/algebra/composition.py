"""The shape of a composition or sum of affine maps; `weights` computes its weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fxrep.algebra.maps import (
    IDENTITY,
    Axis,
    Band,
    Diagonal,
    Linear,
    Map,
    map_of,
    pointwise_axes,
    with_channels,
    with_equal_rank,
)
from fxrep.refusal import Refusal


def _compose_bands(outer: Band | None, inner: Band | None) -> Band | None:
    """For each output, the smallest interval of inputs that holds all it reads through `inner`."""
    if inner is None or inner.is_diagonal:
        return outer if outer is not None else inner
    if outer is None or outer.is_diagonal:
        return inner
    low, high = inner.ends
    if outer.width == 1:
        low, high = low[outer.starts], high[outer.starts]
    else:
        distinct, where = torch.unique(outer.starts, return_inverse=True)
        low = low.unfold(0, outer.width, 1)[distinct].amin(1)[where]
        high = high.unfold(0, outer.width, 1)[distinct].amax(1)[where]
    return _band_of(low, high, inner.inputs, outer.rows)


def _hull(bands: Sequence[Band]) -> Band:
    """The smallest band that holds all these bands."""
    if all(band is bands[0] for band in bands):
        return bands[0]
    ends = [band.ends for band in bands]
    low, high = torch.stack([low for low, _ in ends]), torch.stack([high for _, high in ends])
    return _band_of(low.amin(0), high.amax(0), bands[0].inputs, None)


def _band_of(low: Tensor, high: Tensor, inputs: int, rows: tuple[int, int] | None) -> Band:
    """The band whose outputs read the inputs from `low` to `high`, and none outside `rows`."""
    reads = low < high
    if rows is not None:
        reads[: rows[0]] = False
        reads[rows[1] :] = False
    holes = False
    if not bool(reads.all()):
        index = reads.nonzero()
        rows = (int(index[0]), int(index[-1]) + 1) if len(index) else (0, 0)
        holes = len(index) < rows[1] - rows[0]
        low, high = low.masked_fill(~reads, 0), high.masked_fill(~reads, 0)
    else:
        rows = None
    width = max(1, int((high - low).max()))
    return Band(low.clamp(max=inputs - width), width, inputs, rows, holes)


def _as_map(diagonal: Diagonal, like: Map) -> Map | Refusal:
    """A diagonal map as a 1x1 convolution with as many axes and channels as `like`."""
    axes = pointwise_axes(len(like.axes))
    if like.channelwise is None:
        if diagonal.channels is None:
            return Map(axes, None)
        refusal = _mismatch(diagonal, diagonal.channels, like.channel_axis)
        return refusal or with_channels(Map(axes, None), diagonal.channels)
    refusal = _mismatch(diagonal, like.outputs, like.channel_axis)
    if refusal is not None:
        return refusal
    if like.inputs != like.outputs:
        return Refusal(
            f"a branch of {like.outputs} channels is added to one of {like.inputs} channels"
        )
    return with_channels(Map(axes, None), like.outputs)


def _mismatch(diagonal: Diagonal, channels: int | None, axis: int) -> Refusal | None:
    """Why `diagonal` does not scale these channels, or None if it does."""
    if diagonal.axis is not None and diagonal.axis != axis:
        return Refusal(f"it acts on dimension {diagonal.axis}, the channels are on {axis}")
    if diagonal.channels is not None and diagonal.channels != channels:
        return Refusal(f"it has {diagonal.channels} channels, its operand has {channels}")
    return None


def compose(outer: Linear, inner: Linear, *, biased: bool) -> Linear | Refusal:
    """The shape of ``outer(inner(x) + b)``, or why no single map computes it.

    Args:
        outer: the map applied last.
        inner: the map applied first.
        biased: whether a bias b is added between the two.

    Returns:
        The composite, equal to the chain for every input size and at every border. A `Refusal`
        where the outer map pads by zeros, and the composite would read ``b`` or values computed
        from inputs in their place.
    """
    if isinstance(outer, Diagonal) and isinstance(inner, Diagonal):
        return _compose_diagonals(outer, inner)
    if isinstance(outer, Diagonal):
        assert isinstance(inner, Map)
        if inner.channelwise is None and outer.channels is not None:
            inner = with_channels(inner, outer.channels)
        outputs = None if inner.channelwise is None else inner.outputs
        return _mismatch(outer, outputs, inner.channel_axis) or inner
    if isinstance(inner, Diagonal):
        if outer.channelwise is None and inner.channels is not None:
            outer = with_channels(outer, inner.channels)
        inputs = None if outer.channelwise is None else outer.inputs
        refusal = _mismatch(inner, inputs, outer.channel_axis)
        # Reflected and repeated values carry the bias with them; zeros do not. A padding by
        # constants is the caller's matter: constants before the bias are other constants.
        zeros = outer.transposed or (outer.padded and outer.padding_mode == "zeros")
        if refusal is None and biased and zeros:
            refusal = Refusal(
                "a transposed convolution after it spreads its bias unevenly"
                if outer.transposed
                else "the padding of the convolution after it does not see its bias"
            )
        return refusal or outer
    return _compose_maps(outer, inner, biased)


def _compose_diagonals(outer: Diagonal, inner: Diagonal) -> Diagonal | Refusal:
    for name in ("axis", "channels"):
        a, b = getattr(outer, name), getattr(inner, name)
        if a is not None and b is not None and a != b:
            return Refusal(f"scales of {name} {b} and {a} follow each other")
    axis = inner.axis if outer.axis is None else outer.axis
    return Diagonal(inner.channels if outer.channels is None else outer.channels, axis)


def _compose_maps(outer: Map, inner: Map, biased: bool) -> Map | Refusal:
    outer, inner = with_equal_rank((outer, inner))
    matched = _with_equal_channels(outer, inner)
    if isinstance(matched, Refusal):
        return matched
    outer, inner = matched
    band = _compose_bands(outer.channelwise, inner.channelwise)
    if outer.transposed or inner.transposed:
        return _compose_transposed(outer, inner, band, biased)
    if inner.pointwise and outer.padding_mode != "zeros":
        return replace(outer, channelwise=band)
    refusal = _padding_between(outer, inner)
    if refusal is not None:
        return refusal
    axes = []
    for axis_outer, axis_inner in zip(outer.axes, inner.axes, strict=True):
        if not _chain_is_exact(axis_outer, axis_inner, biased):
            return Refusal(
                "the outer convolution's padding would see "
                + ("the inner bias" if biased else "values the inner convolution computes")
            )
        axes.append(_compose_axes(axis_outer, axis_inner))
    return map_of(tuple(axes), band, False, inner.padding_mode)


def _with_equal_channels(outer: Map, inner: Map) -> tuple[Map, Map] | Refusal:
    """Both maps with the number of channels between them, if one of the maps tells it."""
    if len(outer.axes) != len(inner.axes):
        return Refusal(f"a {len(outer.axes)}-d map follows a {len(inner.axes)}-d one")
    if outer.channelwise is None:
        return (outer if inner.channelwise is None else with_channels(outer, inner.outputs)), inner
    if inner.channelwise is None:
        return outer, with_channels(inner, outer.inputs)
    if outer.inputs != inner.outputs:
        return Refusal(f"{inner.outputs} channels feed a map of {outer.inputs}")
    return outer, inner


def _compose_transposed(outer: Map, inner: Map, band: Band | None, biased: bool) -> Map | Refusal:
    """The composite with a transposed convolution, if the other map is pointwise."""
    if outer.pointwise:
        return replace(inner, channelwise=band)
    if not inner.pointwise:
        return Refusal("a transposed convolution composes with pointwise maps only")
    if biased:
        return Refusal("a transposed convolution after it spreads its bias unevenly")
    return replace(outer, channelwise=band)


def _padding_between(outer: Map, inner: Map) -> Refusal | None:
    """Why the padding of the outer map has no equal before the inner map, or None if it has."""
    if outer.padding_mode == "constant":
        return Refusal("padding by a constant between two convolutions")
    if outer.padding_mode != "zeros":
        return Refusal(f"{outer.padding_mode} padding between two convolutions")
    if inner.padding_mode != "zeros" and outer.padded:
        return Refusal(f"zero padding after {inner.padding_mode} padding")
    return None


def _compose_axes(outer: Axis, inner: Axis) -> Axis:
    reach = inner.reach + inner.stride * outer.reach
    step = math.gcd(
        inner.dilation if inner.kernel > 1 else 0,
        inner.stride * outer.dilation if outer.kernel > 1 else 0,
    )
    return Axis(
        kernel=reach // step + 1 if step else 1,
        stride=inner.stride * outer.stride,
        low=inner.low + inner.stride * outer.low,
        high=inner.high + inner.stride * outer.high,
        dilation=step or 1,
        rest=None
        if inner.rest is None and outer.rest is None
        else inner.stride * outer.slack + inner.slack,
    )


def _chain_is_exact(outer: Axis, inner: Axis, biased: bool) -> bool:
    """Whether the inner map, continued past its ends, is zero wherever the outer map pads.

    The composite continues the inner map there, whose windows still overlap the input up to
    ``reach`` positions past its padding; the chain reads zeros.
    """
    if outer.low > 0:
        nearest = min(e for j in range(outer.kernel) if (e := _nearest_padding(outer, j)) > 0)
        if biased or inner.reach >= nearest * inner.stride + inner.low:
            return False
    # The first position past the inner map's end starts `stride` after its last window.
    beyond = inner.high + inner.stride - 1 - inner.slack
    return not (outer.high > 0 and (biased or beyond < inner.reach))


def _nearest_padding(axis: Axis, tap: int) -> int:
    """The distance from the input's start of the nearest padding that `tap` reads; 0 for none."""
    before = axis.low - tap * axis.dilation
    return (before - 1) % axis.stride + 1 if before > 0 else 0


def add(maps: Sequence[Linear], *, same_size: bool = False) -> Linear | Refusal:
    """The shape of ``sum(map(x) for map in maps)``, or why no single map computes it.

    All kernels are laid on one grid, whose step is the greatest common divisor of the dilations
    and of the differences of the low paddings. The results have equal sizes for every input size
    iff `Axis.excess` is equal, per axis.

    Args:
        maps: the branches.
        same_size: the original raises unless the results have one size, as a concatenation does.
    """
    full = [m for m in maps if isinstance(m, Map)]
    if not full:
        return _add_diagonals([m for m in maps if isinstance(m, Diagonal)])
    full.sort(key=lambda m: m.channelwise is None)
    like = full[0]
    if like.channelwise is None:
        known = {m.channels for m in maps if isinstance(m, Diagonal) and m.channels is not None}
        like = with_channels(like, known.pop()) if known else like
    terms: list[Map] = []
    for each in maps:
        term = _as_map(each, like) if isinstance(each, Diagonal) else each
        if isinstance(term, Refusal):
            return term
        if term.channelwise is None and like.channelwise is not None:
            if like.inputs != like.outputs:
                return Refusal(
                    f"a branch of {like.outputs} channels is added to one of {like.inputs} channels"
                )
            term = with_channels(term, like.outputs)
        terms.append(term)
    return _add_maps(terms, same_size)


def _add_diagonals(diagonals: Sequence[Diagonal]) -> Diagonal | Refusal:
    total = IDENTITY
    for each in diagonals:
        answer = _compose_diagonals(total, each)
        if isinstance(answer, Refusal):
            return answer
        total = answer
    return total


def _add_maps(maps: Sequence[Map], same_size: bool) -> Map | Refusal:
    maps = with_equal_rank(maps)
    first = maps[0]
    for each in maps[1:]:
        if len(first.axes) != len(each.axes):
            return Refusal(f"branches differ in rank: {len(first.axes)} and {len(each.axes)}")
        if first.channelwise is None:
            continue
        for name, a, b in (
            ("input channels", first.inputs, each.inputs),
            ("output channels", first.outputs, each.outputs),
        ):
            if a != b:
                return Refusal(f"branches differ in {name}: {a} and {b}")
    if len({m.transposed for m in maps}) > 1:
        return Refusal("a transposed convolution is added to one that is not")
    modes = {m.padding_mode for m in maps if m.padded}
    if len(modes) > 1:
        return Refusal(f"branches differ in padding mode: {' and '.join(sorted(modes))}")
    if "constant" in modes:
        return Refusal("branches padded with constants")
    axes = []
    for column in zip(*(m.axes for m in maps), strict=True):
        axis = _add_axes(column, same_size)
        if isinstance(axis, Refusal):
            return axis
        axes.append(axis)
    mode = modes.pop() if modes else "zeros"
    band = None if first.channelwise is None else _hull([m.band for m in maps])
    if band is not None and band.rows == (0, 0):
        return Refusal("a sum without channels")
    return map_of(tuple(axes), band, first.transposed, mode)


def _add_axes(axes: Sequence[Axis], same_size: bool) -> Axis | Refusal:
    first = axes[0]
    for each in axes[1:]:
        if each.stride != first.stride:
            return Refusal(f"branches differ in stride: {first.stride} and {each.stride}")
        if each.excess != first.excess and not same_size:
            return Refusal(
                "branches give different output sizes: padding less kernel reach is "
                f"{first.excess} and {each.excess}"
            )
    low = max(a.low for a in axes)
    reach = max(a.reach - a.low for a in axes) + low
    step = math.gcd(*(a.dilation for a in axes if a.kernel > 1), *(low - a.low for a in axes))
    least = min(a.excess for a in axes)
    # Where sizes are equal although the excess is not, a branch leaves as many positions more
    # unread as it has excess more. The sum has the least excess.
    rest = max(0, min(a.slack - (a.excess - least) for a in axes))
    return Axis(
        kernel=reach // step + 1 if step else 1,
        stride=first.stride,
        low=low,
        high=least + reach - low,
        dilation=step or 1,
        rest=rest if rest < first.stride - 1 else None,
    )
