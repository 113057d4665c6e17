"""The algebra of maps against the convolutions themselves: shapes, weights and borders."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxrep import geometry, kernels
from fxrep.geometry import IDENTITY, Axis, Band, Diagonal, Map, Refusal, conv_map, grouped_band

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def apply(shape: Map | Diagonal, weight: Tensor | None, x: Tensor) -> Tensor:
    """What a map computes, by the convolution it stands for."""
    if isinstance(shape, Diagonal):
        if weight is None:
            return x
        return x * weight.reshape(-1, *(1 for _ in x.shape[2:]))
    full = kernels.to_convolution(weight, shape)
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


def same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-10, atol=1e-10)


@given(data=st.data(), rank=st.integers(1, 2), biased=st.booleans())
def test_chain_equals_its_composite_at_every_size(data, rank, biased):
    inner = data.draw(maps(4, rank))
    outer = data.draw(maps(inner.outputs, rank))
    shape = geometry.compose(outer, inner, biased=biased)
    if isinstance(shape, Refusal):
        return
    a, b = weight_of(outer), weight_of(inner)
    bias = torch.randn(inner.outputs, dtype=torch.float64) if biased else None
    weight = kernels.compose(shape, outer, inner, a, b)
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
            shift = kernels.compose_bias(outer, a, bias)
            got = got + shift.reshape(-1, *(1 for _ in range(rank)))
        assert same(got, expected), (outer, inner, n)


@given(data=st.data(), rank=st.integers(0, 2), count=st.integers(2, 4))
def test_sum_equals_its_single_map(data, rank, count):
    base = data.draw(axes(rank))
    branches = []
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
    shape = geometry.add(branches)
    assert not isinstance(shape, Refusal), shape
    weights = [weight_of(b) if isinstance(b, Map) else None for b in branches]
    weight = kernels.add(shape, branches, *weights)
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
    banded = kernels.from_convolution(weight, groups, True)
    assert banded.shape == (12, 8 // groups, 3, 3)
    assert torch.equal(kernels.to_convolution(banded, shape), weight)


def test_groups_are_the_largest_that_fit():
    assert grouped_band(8, 8, 4).groups == 4
    assert geometry._hull([grouped_band(8, 8, 8), grouped_band(8, 8, 2)]).groups == 2
    assert geometry._hull([grouped_band(12, 12, 4), grouped_band(12, 12, 3)]).groups == 1
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
    answer = geometry.compose(
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
    answer = geometry.add(
        [conv_map(outputs=2, inputs=2, groups=1, axes=(axis, axis)) for axis in (a, b)]
    )
    assert isinstance(answer, Refusal) and reason in answer.reason
