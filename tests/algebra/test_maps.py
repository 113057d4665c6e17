"""The algebra of maps against the convolutions themselves: shapes, weights and borders."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxrep.algebra import composition
from fxrep.algebra import maps as shapes
from fxrep.algebra import weights as algebra
from fxrep.algebra.maps import IDENTITY, Axis, Band, Diagonal, Map, conv_map, grouped_band
from fxrep.refusal import Refusal

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
Part = Map | Diagonal
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def apply(shape: Map | Diagonal, weight: Tensor | None, x: Tensor) -> Tensor:
    """What a map computes, by the convolution it stands for."""
    if isinstance(shape, Diagonal):
        if weight is None:
            return x
        return x * weight.reshape(-1, *(1 for _ in x.shape[2:]))
    full = algebra.to_convolution(weight, shape)
    groups, rank = shape.band.groups, len(shape.axes)
    if not rank:
        return F.linear(x, full)
    strides, dilations = [a.stride for a in shape.axes], [a.dilation for a in shape.axes]
    if shape.transposed:
        pads = [a.low for a in shape.axes]
        extra = [a.low - a.high for a in shape.axes]
        return TRANSPOSED[rank](x, full, None, strides, pads, extra, groups, dilations)
    sizes = [p for a in reversed(shape.axes) for p in (a.low, a.high)]
    mode = "constant" if shape.padding_mode == "zeros" else shape.padding_mode
    x = F.pad(F.pad(x, [max(p, 0) for p in sizes], mode=mode), [min(p, 0) for p in sizes])
    return CONV[rank](x, full, None, strides, 0, dilations, groups)


@st.composite
def axes(draw: st.DrawFn, rank: int) -> tuple[Axis, ...]:
    most = draw(st.sampled_from([0, 0, 3]))  # most padded chains are refused: draw the others too
    return tuple(
        Axis(
            kernel=draw(st.integers(1, 4)),
            stride=draw(st.integers(1, 3)),
            low=draw(st.integers(-1, most)),
            high=draw(st.integers(-1, most)),
            dilation=draw(st.integers(1, 3)),
        )
        for _ in range(rank)
    )


@st.composite
def maps(draw: st.DrawFn, inputs: int, rank: int, outputs: int | None = None) -> Map:
    if outputs is None:
        outputs = draw(st.sampled_from([2, 4, 6, 12]))
    common = math.gcd(inputs, outputs)
    groups = draw(st.sampled_from([g for g in range(1, common + 1) if common % g == 0]))
    return conv_map(outputs=outputs, inputs=inputs, groups=groups, axes=draw(axes(rank)))


def weight_of(shape: Map) -> Tensor:
    size = (shape.outputs, shape.band.width, *shape.kernel)
    return torch.randn(size, dtype=torch.float64)


def composed(outer: Part, inner: Part, *, biased: bool = False) -> Map:
    shape = composition.compose(outer, inner, biased=biased)
    assert isinstance(shape, Map)
    return shape


def same(a: Tensor, b: Any) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-10, atol=1e-10)


@given(data=st.data(), rank=st.integers(1, 2), biased=st.booleans())
def test_chain_equals_its_composite_at_every_size(data, rank, biased):
    inner = data.draw(maps(4, rank))
    outer = data.draw(maps(inner.outputs, rank))
    shape = composition.compose(outer, inner, biased=biased)
    if isinstance(shape, Refusal):
        return
    a, b = weight_of(outer), weight_of(inner)
    bias = torch.randn(inner.outputs, dtype=torch.float64) if biased else None
    weight = algebra.compose(shape, outer, inner, a, b)
    first = max(1, max(axis.reach - axis.low - axis.high for axis in shape.axes))
    for n in range(first, first + 12):
        x = torch.randn(1, 4, *(n + i for i in range(rank)), dtype=torch.float64)
        try:
            middle = apply(inner, b, x)
            if bias is not None:
                middle = middle + bias.reshape(-1, *(1 for _ in range(rank)))
            expected = apply(outer, a, middle)
        except RuntimeError:
            continue
        if 0 in middle.shape:  # a crop of more than there is: no layer of torch returns that
            continue
        got = apply(shape, weight, x)
        if bias is not None:
            shift = algebra.compose_bias(outer, a, bias)
            got = got + shift.reshape(-1, *(1 for _ in range(rank)))
        assert same(got, expected), (outer, inner, n)


@given(data=st.data(), rank=st.integers(0, 2), count=st.integers(2, 4))
def test_sum_equals_its_single_map(data, rank, count):
    base = data.draw(axes(rank))
    branches: list[Part] = []
    for _ in range(count):
        shape = data.draw(maps(4, rank, 4))
        # Branches whose output sizes agree: one low padding is free, the high one follows.
        fitted = tuple(
            Axis(a.kernel, b.stride, a.low, b.excess - a.low + a.reach, a.dilation)
            for a, b in zip(shape.axes, base, strict=True)
        )
        branches.append(conv_map(outputs=4, inputs=4, groups=shape.band.groups, axes=fitted))
    if rank and all(a == Axis(1, 1, 0, 0, 1) for a in base):
        branches.append(IDENTITY)
    shape = composition.add(branches)
    assert not isinstance(shape, Refusal), shape
    weights = [weight_of(b) if isinstance(b, Map) else None for b in branches]
    weight = algebra.add(shape, branches, *weights)
    for n in range(1, 10):
        x = torch.randn(1, 4, *(n + i for i in range(rank)), dtype=torch.float64)
        try:
            expected = sum(apply(b, w, x) for b, w in zip(branches, weights, strict=True))
        except RuntimeError:
            continue
        assert same(apply(shape, weight, x), expected)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("stride, pad, extra", [(1, 0, 0), (2, 1, 1), (3, 1, 0)])
def test_transposed_layout_round_trips(groups, stride, pad, extra):
    weight = torch.randn(8, 12 // groups, 3, 3, dtype=torch.float64)
    axis = Axis(3, stride, pad, pad - extra)
    shape = conv_map(outputs=12, inputs=8, groups=groups, axes=(axis, axis), transposed=True)
    banded = algebra.from_convolution(weight, groups, True)
    assert banded.shape == (12, 8 // groups, 3, 3)
    assert torch.equal(algebra.to_convolution(banded, shape), weight)


def test_groups_are_the_largest_that_fit():
    assert grouped_band(8, 8, 4).groups == 4
    assert composition._hull([grouped_band(8, 8, 8), grouped_band(8, 8, 2)]).groups == 2
    assert composition._hull([grouped_band(12, 12, 4), grouped_band(12, 12, 3)]).groups == 1
    assert Band(torch.tensor([0, 0, 2, 2]), 2, 4).groups == 2


@pytest.mark.parametrize(
    "outer, inner, biased, exact",
    [
        pytest.param(Axis(1), Axis(3, 1, 1, 1), True, True, id="pointwise after padded"),
        pytest.param(Axis(3, 1, 1, 1), Axis(1), False, True, id="padded after unbiased pointwise"),
        pytest.param(Axis(3, 1, 1, 1), Axis(1), True, False, id="padded after biased pointwise"),
        pytest.param(Axis(3), Axis(3, 1, 1, 1), True, True, id="unpadded after padded"),
        pytest.param(Axis(3, 1, 1, 1), Axis(3, 1, 1, 1), False, False, id="padded twice"),
        pytest.param(Axis(3, 1, 1, 0), Axis(2, 1, 0, 0), False, False, id="low side"),
        pytest.param(Axis(3, 1, 1, 0), Axis(2, 1, 1, 0), False, True, id="low side, inner padded"),
        pytest.param(Axis(2, 1, 0, 1), Axis(2, 1, 0, 1), False, True, id="high side"),
        pytest.param(Axis(2, 1, 0, 1), Axis(2, 1, 1, 0), False, False, id="high side, inner low"),
    ],
)
def test_chain_is_exact_only_where_the_padding_sees_nothing(outer, inner, biased, exact):
    answer = composition.compose(
        conv_map(outputs=2, inputs=2, groups=1, axes=(outer,)),
        conv_map(outputs=2, inputs=2, groups=1, axes=(inner,)),
        biased=biased,
    )
    assert isinstance(answer, Map) == exact


@pytest.mark.parametrize(
    "a, b, reason",
    [
        (Axis(3, 1, 1, 1), Axis(3, 2, 1, 1), "stride"),
        (Axis(3, 1, 1, 1), Axis(3, 1, 0, 0), "output sizes"),
        (Axis(2, 2), Axis(1, 2), "output sizes"),
    ],
)
def test_sum_is_refused_with_its_reason(a, b, reason):
    answer = composition.add(
        [conv_map(outputs=2, inputs=2, groups=1, axes=(axis, axis)) for axis in (a, b)]
    )
    assert isinstance(answer, Refusal) and reason in answer.reason


# --- bands against dense convolutions, case by case ----------------------------------------------


def dense(shape: Map, weight: Tensor | None) -> Tensor:
    """The weight over all input channels, zeros where the band reads nothing: no fxrep."""
    band = shape.band
    full = torch.zeros(shape.outputs, shape.inputs, *shape.kernel, dtype=torch.float64)
    if weight is None or weight.dim() == 0:
        one = torch.ones((), dtype=torch.float64) if weight is None else weight
        weight = one.expand(shape.outputs, band.width, *shape.kernel)
    for o in range(*(band.rows or (0, shape.outputs))):
        first = int(band.starts[o])
        full[o, first : first + band.width] = weight[o]
    return full


def convolve(shape: Map, weight: Tensor | None, x: Tensor) -> Tensor:
    """The map by one dense convolution that reads padded and cropped input."""
    full = dense(shape, weight)
    if not shape.axes:
        return F.linear(x, full)
    for dim, axis in enumerate(shape.axes, 2):
        pads = [0, 0] * (x.dim() - dim - 1)
        x = F.pad(x, [*pads, max(axis.low, 0), max(axis.high, 0)])
        cut = max(-axis.low, 0) + max(-axis.high, 0)
        x = x.narrow(dim, max(-axis.low, 0), x.shape[dim] - cut)
    strides, dilations = [a.stride for a in shape.axes], [a.dilation for a in shape.axes]
    return CONV[len(shape.axes)](x, full, None, strides, 0, dilations)


def bands(outputs: int, inputs: int) -> list[Band]:
    """Every kind of band with so many channels."""
    every = torch.arange(outputs)
    found = [grouped_band(outputs, inputs, g) for g in (1, 2) if not (outputs % g or inputs % g)]
    found.append(shapes.selection_band((every * 5 + 1) % inputs, inputs))  # a permutation, repeats
    found.append(Band((every % (inputs - 1)).clamp(max=inputs - 2), 2, inputs))
    found.append(Band((every * 3) % inputs, 1, inputs, (1, outputs - 1)))
    found.append(Band(every.clamp(max=inputs - 2), 2, inputs, (0, 1)))
    if inputs == outputs:
        found.append(grouped_band(outputs, inputs, inputs))
    if outputs > inputs:
        found += [
            shapes.placement_band(first, inputs, outputs)
            for first in {0, 1, outputs - inputs}
        ]  # fmt: skip
    return found


AXES = (
    (), (Axis(),), (Axis(3, 1, 1, 1),), (Axis(3, 2, 1, 0, 2),), (Axis(1, 2, -1, 0),),
    (Axis(2, 1, 0, -1),), (Axis(), Axis(2, 2, 1, 1)),
)  # fmt: skip


def weights_of(shape: Map) -> list[Tensor | None]:
    """A full weight, zero where nothing is read, one number for all, and ones."""
    full, rows = torch.zeros_like(weight_of(shape)), shape.band.live
    full[rows] = weight_of(shape)[rows]
    return [full, torch.tensor(0.7, dtype=torch.float64), None]


def images(shape: Map) -> list[Tensor]:
    rank = len(shape.axes)
    sizes = [()] if not rank else [tuple(n + i for i in range(rank)) for n in (9, 10)]
    return [
        torch.randn(*((2, shape.inputs) if not rank else (1, shape.inputs, *size)),
                    dtype=torch.float64)
        for size in sizes
    ]  # fmt: skip


def live(outer: Band, inner: Band) -> list[bool]:
    """Which outputs of a selection of a selection read something."""
    rows, below = (range(*(band.rows or (0, band.outputs))) for band in (outer, inner))
    return [o in rows and int(outer.starts[o]) in below for o in range(outer.outputs)]


def has_gap(outer: Map, inner: Map) -> bool:
    """Some output between two that read something reads nothing: no weight of ones says that."""
    if not (outer.selects and inner.selects):
        return False
    reads = live(outer.band, inner.band)
    return any(reads) and not all(reads[reads.index(True) : len(reads) - reads[::-1].index(True)])


COLUMNS = [(a, b) for a, b in itertools.product(AXES, repeat=2) if len(a) == len(b)]


@pytest.mark.parametrize("columns", COLUMNS, ids=range(len(COLUMNS)))
@pytest.mark.parametrize("counts", [(4, 4, 4), (3, 5, 4), (6, 3, 5)], ids=str)
def test_all_bands_compose(counts: Sequence[int], columns: Sequence[tuple[Axis, ...]]) -> None:
    inputs, middle, outputs = counts
    composed = 0
    for a, b in itertools.product(bands(outputs, middle), bands(middle, inputs)):
        outer, inner = Map(columns[0], a), Map(columns[1], b)
        shape = composition.compose(outer, inner, biased=False)
        if isinstance(shape, Refusal):
            assert any(axis.padded for axis in columns[0])
            continue
        assert isinstance(shape, Map)
        if shape.band.rows == (0, 0):
            continue  # see below
        for one, two in itertools.product(weights_of(outer), weights_of(inner)):
            if one is two is None and has_gap(outer, inner):
                continue  # see below
            weight = algebra.compose(shape, outer, inner, one, two)
            x = images(inner)[composed % 2 if columns[0] else 0]
            try:
                expected = convolve(outer, one, convolve(inner, two, x))
            except RuntimeError:
                continue
            composed += 1
            assert same(convolve(shape, weight, x), expected), (a, b)
            bias = torch.randn(middle, dtype=torch.float64)
            constant = dense(outer, one).reshape(outputs, middle, -1).sum(2) @ bias
            assert same(algebra.compose_bias(outer, one, bias), constant)
    assert composed or any(axis.padded for axis in columns[0])


def test_interleaved_selections_leave_gaps() -> None:
    """Channels of x at 0 and 2 of a shuffled cat([x, y]): 1 and 3 read nothing of x."""
    place = Map((), shapes.placement_band(0, 2, 4))
    shuffle = Map((), shapes.selection_band([0, 2, 1, 3], 4))
    shape = composed(shuffle, place)
    weight = algebra.compose(shape, shuffle, place, None, None)
    assert torch.equal(dense(shape, weight), dense(shuffle, None) @ dense(place, None))


def test_a_selection_of_nothing_has_a_weight_of_zeros() -> None:
    """cat([x, a(h)])[:, :2] reads nothing of h."""
    nothing = Map((), Band(torch.zeros(2).long(), 1, 3, (0, 0)))
    layer = conv_map(outputs=3, inputs=4, groups=1, axes=())
    shape = composed(nothing, layer)
    weight = algebra.compose(shape, nothing, layer, None, weight_of(layer))
    assert not dense(shape, weight).any()


@pytest.mark.parametrize("column", AXES, ids=str)
@pytest.mark.parametrize("counts", [(4, 4), (3, 5), (5, 3)], ids=str)
def test_all_bands_add(counts: Sequence[int], column: tuple[Axis, ...]) -> None:
    inputs, outputs = counts
    every = bands(outputs, inputs)
    for chosen in itertools.chain(itertools.product(every, repeat=2), [every]):
        terms = [Map(column, band) for band in chosen]
        shape = composition.add(terms)
        assert isinstance(shape, Map)
        for which in range(3):
            given_ = [weights_of(term)[(which + i) % 3] for i, term in enumerate(terms)]
            weight = algebra.add(shape, terms, *given_)
            expected = sum(dense(term, w) for term, w in zip(terms, given_, strict=True))
            assert same(dense(shape, weight), expected), chosen


@pytest.mark.parametrize("column", AXES, ids=str)
@pytest.mark.parametrize("counts", [(4, 4), (3, 5), (4, 6), (6, 4)], ids=str)
def test_all_bands_are_layers(counts: Sequence[int], column: tuple[Axis, ...]) -> None:
    """A layer of the largest groups that hold the band gives the rows that read something."""
    for band in bands(counts[1], counts[0]):
        shape = Map(column, band)
        for weight in weights_of(shape):
            layer, groups = algebra.to_convolution(weight, shape), band.narrowed.groups
            if band.rows is None:
                assert layer.numel() == shape.weights
            rows = slice(*(band.rows or (0, shape.outputs)))
            blocks = [
                F.pad(part, (*(0, 0) * len(column), before, shape.inputs - before - part.shape[1]))
                for i, part in enumerate(layer.chunk(groups))
                for before in [i * (shape.inputs // groups)]
            ]
            assert same(torch.cat(blocks), dense(shape, weight)[rows]), band


def test_slices_of_concatenations_pick_their_rows() -> None:
    """cat([a(x), b(x)])[:, i:j] reads rows of a and of b,."""
    axes = (Axis(3, 1, 1, 1),)
    maps_ = [conv_map(outputs=n, inputs=4, groups=g, axes=axes) for n, g in ((2, 2), (4, 1))]
    weights, x = [weight_of(m) for m in maps_], torch.randn(1, 4, 6, dtype=torch.float64)
    whole = torch.cat([convolve(m, w, x) for m, w in zip(maps_, weights, strict=True)], 1)
    firsts = (0, 2)
    for i, j in itertools.product(range(2), range(3, 7)):  # some of both: see above
        cut = Map((shapes.POINTWISE,), shapes.selection_band(range(i, j), 6))
        parts, used = [], []
        for first, each, weight in zip(firsts, maps_, weights, strict=True):
            place = Map((shapes.POINTWISE,), shapes.placement_band(first, each.outputs, 6))
            outer = composed(cut, place, biased=True)
            shape = composed(outer, each, biased=True)
            parts.append(shape)
            picked = algebra.compose(outer, cut, place, None, None)
            used.append(algebra.compose(shape, outer, each, picked, weight))
        total = composition.add(parts)
        assert isinstance(total, Map)
        summed = algebra.add(total, parts, *used)
        assert same(convolve(total, summed, x), whole[:, i:j]), (i, j)


@pytest.mark.parametrize("stride, rest", [(s, r) for s in (2, 3, 4) for r in range(s)])
def test_symmetric_padding_where_little_is_left_unread(stride: int, rest: int) -> None:
    """`rest` bounds what the last window leaves: more padding on the high side is free then."""
    changed = 0
    for kernel, low, high in itertools.product(range(1, 5), range(4), range(4)):
        shape = Map((Axis(kernel, stride, low, high, rest=rest),), grouped_band(1, 1, 1))
        other, weight = shapes.symmetric(shape), weight_of(shape)
        changed += other.axes != shape.axes
        for n in range(4, 16):
            if (n + low + high - kernel) % stride > rest:
                continue  # the graph says that no such size is met
            x = torch.randn(1, 1, n, dtype=torch.float64)
            assert same(convolve(other, weight, x), convolve(shape, weight, x)), (shape.axes, n)
    assert bool(changed) == (rest < stride - 1)


@pytest.mark.parametrize("mode", ["frame", "pad"])
def test_a_frame_is_the_padded_image_of_the_bias(mode: str) -> None:
    """What a padded map makes of b + 0s is its frame on an image of ones, at every small size."""
    for band, column in itertools.product(bands(5, 4), AXES[1:]):
        shape = Map(column, band)
        if band.rows is not None:
            continue
        bias = torch.randn(4, dtype=torch.float64)
        for weight in weights_of(shape) if mode == "frame" else [weight_of(shape)]:
            framed = algebra.frame(shape, weight, bias)
            ones = Map(column, Band(torch.zeros(5).long(), 1, 1))
            for n in range(1, 7):
                size = [n + i for i in range(len(column))]
                image = bias.reshape(1, 4, *(1 for _ in size)).expand(1, 4, *size)
                try:
                    expected = convolve(shape, weight, image)
                except RuntimeError:
                    continue
                got = convolve(ones, framed, torch.ones(1, 1, *size, dtype=torch.float64))
                assert same(got, expected), (band, column, n)
