"""The transformations and fusions that the field teaches, one test each, named after it.

The six transformations are those of Ding et al., "Diverse Branch Block", 2021 (after ACNet and
RepVGG); the three fusions those every deployment tool lists.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from support.check import check, count, inputs_of
from support.models import Body, conv, conv_bn

SHAPES = ((2, 8, 9, 9), (1, 8, 12, 7), (1, 8, 3, 2))


def layer_of(model: nn.Module, kind: type = nn.Conv2d) -> Any:
    """The only layer that is left."""
    (layer,) = [m for m in model.modules() if isinstance(m, kind)]
    return layer


# --- the six transformations ---------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, {"stride": 2}, {"groups": 4}, {"dilation": 2}, {"bias": True}])
def test_conv_batchnorm(how: dict[str, Any]) -> None:
    """W' = γ/σ W, b' = β + (b - μ) γ/σ."""
    model = conv_bn(8, 12, 3, padding=1, **how).eval()
    optimized = check(model, SHAPES, layers=1, operations=1)
    norm: Any = model[1]
    layer = layer_of(optimized)
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    torch.testing.assert_close(layer.weight, model[0].weight * scale[:, None, None, None])


@pytest.mark.parametrize("how", [{}, {"stride": 2}, {"groups": 4}, {"dilation": 2}])
def test_parallel_sum(how: dict[str, Any]) -> None:
    """W' = W1 + W2, b' = b1 + b2."""
    d = how.get("dilation", 1)
    model = Body(
        lambda m, x: m.a(x) + m.b(x), a=conv(8, 12, padding=d, **how),
        b=conv(8, 12, padding=d, **how),
    ).eval()  # fmt: skip
    layer = layer_of(check(model, SHAPES, layers=1, operations=1))
    torch.testing.assert_close(layer.weight, model.a.weight + model.b.weight)
    torch.testing.assert_close(layer.bias, model.a.bias + model.b.bias)


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("kernel", [3, (5, 1), 4])
def test_serial_1x1_kxk(kernel: Any, groups: int) -> None:
    """W' = W2 * W1 with the channel axes of W1 swapped; the bias passes where nothing is padded."""
    model = nn.Sequential(
        conv(8, 64, 1, groups=groups), conv(64, 8, kernel, groups=groups)
    ).eval()  # fmt: skip
    layer = layer_of(check(model, SHAPES, layers=1, operations=1))
    assert layer.groups == groups
    first, second = model[0].weight.flatten(1), model[1].weight
    if groups == 1:
        expected = torch.einsum("omhw,mi->oihw", second, first)
        torch.testing.assert_close(layer.weight, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("norms", [False, True])
def test_serial_1x1_3x3_1x1(groups: int, stride: int, norms: bool) -> None:
    """The bottleneck of Conv3XC: padded in front, so that every bias is exact."""
    layers = [
        conv(8, 32, 1, groups=groups), conv(32, 32, stride=stride, groups=groups),
        conv(32, 8, 1, groups=groups),
    ]  # fmt: skip
    if norms:
        layers = [nn.Sequential(c, nn.BatchNorm2d(c.out_channels)) for c in layers]
    model = nn.Sequential(nn.ZeroPad2d(1), *layers).eval()
    layer = layer_of(check(model, SHAPES, layers=1, operations=1))
    assert (layer.kernel_size, layer.padding, layer.groups) == ((3, 3), (1, 1), groups)


@pytest.mark.parametrize("groups", [1, 2])
def test_serial_1x1_3x3_1x1_padded_in_the_middle(groups: int) -> None:
    """Exact as it stands if the first 1x1 has no bias."""
    model = nn.Sequential(
        conv(8, 32, 1, groups=groups, bias=False), conv(32, 32, padding=1, groups=groups),
        conv(32, 8, 1, groups=groups),
    ).eval()  # fmt: skip
    assert layer_of(check(model, SHAPES, layers=1, operations=1)).groups == groups


@pytest.mark.parametrize("how", [{}, {"stride": 2}, {"bias": False}])
def test_concat(how: dict[str, Any]) -> None:
    """Outputs concatenated are kernels stacked."""
    model = Body(
        lambda m, x: torch.cat([m.a(x), m.b(x)], 1), a=conv(8, 4, padding=1, **how),
        b=conv(8, 6, padding=1, **how),
    ).eval()  # fmt: skip
    layer = layer_of(check(model, SHAPES, layers=1, operations=1))
    stacked = torch.cat([model.get_parameter("a.weight"), model.get_parameter("b.weight")])
    torch.testing.assert_close(layer.weight, stacked)


@pytest.mark.parametrize("groups", [1, 8])
@pytest.mark.parametrize("stride", [1, 2])
def test_average_pooling(groups: int, stride: int) -> None:
    """A kernel of 1/k²: beside another convolution it is free."""
    model = Body(
        lambda m, x: m.a(x) + m.norm(m.pool(x)),
        a=conv(padding=1, stride=stride, groups=groups), norm=nn.BatchNorm2d(8),
        pool=nn.AvgPool2d(3, stride, 1),
    ).eval()  # fmt: skip
    layer = layer_of(check(model, SHAPES, layers=1, operations=1))
    assert layer.groups == groups, "pooling treats every channel alike"


def test_average_pooling_alone() -> None:
    """On its own it is a depthwise convolution, and stays what it is: that is cheaper."""
    model = nn.Sequential(nn.AvgPool2d(3, 1, 1), nn.ReLU()).eval()
    for cost in ("macs", "always"):
        check(model, SHAPES, layers=0, operations=2, cost=cost)


@pytest.mark.parametrize("how", [{}, {"stride": 2}, {"groups": 8}])
def test_multi_scale(how: dict[str, Any]) -> None:
    """1x1 + 1x3 + 3x1 -> 3x3, each kernel in the middle of zeros: 7 taps become 9."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.point(x) + m.row(x) + m.column(x)

    parts = {
        "point": conv(kernel=1, **how), "row": conv(kernel=(1, 3), padding=(0, 1), **how),
        "column": conv(kernel=(3, 1), padding=(1, 0), **how),
    }  # fmt: skip
    model = Body(forward, **parts).eval()
    optimized = check(model, SHAPES, layers=1, operations=1, cost="always", more_work=True)
    assert layer_of(optimized).kernel_size == (3, 3)
    # A 3x3 beside them has the nine taps already.
    model = Body(lambda m, x: forward(m, x) + m.square(x), square=conv(padding=1, **how), **parts)
    check(model.eval(), SHAPES, layers=1, operations=1)


# --- the three fusions ---------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [1, 3, (1, 5)])
@pytest.mark.parametrize("groups", [1, 4])
def test_batchnorm_into_the_next_conv(kernel: Any, groups: int) -> None:
    """W' = W γ/σ over its input channels, b' = b + ΣW (β - μ γ/σ): where nothing is padded."""
    model = nn.Sequential(nn.BatchNorm2d(8), conv(8, 12, kernel, groups=groups)).eval()
    check(model, ((2, 8, 9, 9), (1, 8, 12, 7), (1, 8, 5, 5)), layers=1, operations=1)


def test_batchnorm_into_the_next_linear() -> None:
    model = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 5)).eval()
    check(model, ((2, 8), (3, 8)), layers=1, example_inputs=True)


@pytest.mark.parametrize("shapes", [((2, 8), (3, 8)), ((2, 5, 8), (1, 3, 8))])
@pytest.mark.parametrize("bias", [False, True])
def test_two_linears(bias: bool, shapes: Any) -> None:
    """W' = W2 W1, b' = W2 b1 + b2."""
    model = nn.Sequential(
        nn.Linear(8, 64, bias=bias), nn.Dropout(), nn.Linear(64, 5, bias=bias)
    ).eval()  # fmt: skip
    layer = layer_of(check(model, shapes, layers=1), nn.Linear)
    assert (layer.in_features, layer.out_features) == (8, 5)


def test_two_linears_of_low_rank_stay() -> None:
    """64 -> 4 -> 64 is a factorisation: merged it would be eight times the work."""
    model = nn.Sequential(nn.Linear(64, 4), nn.Linear(4, 64)).eval()
    check(model, ((2, 64), (3, 64)), layers=2)


@pytest.mark.parametrize("norms", [False, True])
def test_sibling_convs(norms: bool) -> None:
    """Three 1x1s that read one wide x read it once, each with what follows it."""
    layers = [conv(64, width, 1) for width in (8, 8, 8)]
    if norms:
        layers = [nn.Sequential(c, nn.BatchNorm2d(c.out_channels)) for c in layers]
    model = Body(
        lambda m, x: (torch.relu(m.a(x)), torch.sigmoid(m.b(x)), m.d(m.c(x).relu())),
        a=layers[0], b=layers[1], c=layers[2], d=conv(8, 8, padding=1),
    ).eval()  # fmt: skip
    check(model, ((2, 64, 9, 9), (1, 64, 12, 7), (3, 64, 1, 2)), layers=2)


# --- long ones -----------------------------------------------------------------------------------


def test_a_linear_run_of_300_padded_conv_batchnorm_pairs() -> None:
    """No two compose, since each pads what the one before computes; every BatchNorm folds."""
    model = nn.Sequential(*(conv_bn(2, 2, 3, padding=1) for _ in range(300))).eval()
    check(model, ((1, 2, 4, 4), (1, 2, 3, 5)), layers=300)


def test_a_linear_run_of_300_pointwise_conv_batchnorm_pairs() -> None:
    model = nn.Sequential(*(conv_bn(4, 4, 1) for _ in range(300))).eval()
    check(model, ((1, 4, 4, 4), (1, 4, 3, 5)), layers=1, operations=1)


def test_a_sum_of_64_branches() -> None:
    """Every kernel, with a BatchNorm of its own, and identities among them."""
    kernels = (1, 3, (1, 3), (3, 1))

    def branch(i: int) -> nn.Module:
        if i % 5 == 4:
            return nn.BatchNorm2d(4)
        k = kernels[i % 5]
        height, width = k if isinstance(k, tuple) else (k, k)
        return conv_bn(4, 4, k, padding=(height // 2, width // 2))

    def forward(m: Any, x: Tensor) -> Tensor:
        out = m.branches[0](x)
        for each in m.branches[1:]:
            out = out + each(x)
        return out

    model = Body(forward, branches=nn.ModuleList(branch(i) for i in range(64))).eval()
    optimized = check(model, ((2, 4, 6, 5), (1, 4, 3, 3)), layers=1, operations=1)
    assert set(count(optimized, inputs_of((1, 4, 6, 6), torch.float32)).kinds) == {"convolution"}
