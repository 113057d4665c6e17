"""Scales and shifts fold into the layer before or after them, however they are spelt."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fxrep
from support.check import assert_equal, check, count, distance, inputs_of, randomize, run
from support.models import IMAGE, Body, conv_bn

CONV: dict[int, Any] = {0: nn.Linear, 1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORM = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}


def shapes(channels: int, rank: int) -> tuple[tuple[int, ...], ...]:
    if rank == 0:
        return ((2, channels), (3, channels))
    return ((2, channels, *(9, 8, 7)[:rank]), (1, channels, *(6, 9, 8)[:rank]))


class Tail(nn.Module):
    """A layer, then whatever `tail` makes of its output with this module's tensors."""

    def __init__(self, layer: nn.Module, channels: int, rank: int, tail: Callable[..., Tensor]):
        super().__init__()
        self.layer, self.tail = layer, tail
        self.norm = NORM[rank](channels)
        full = (1, channels, *(1,) * rank)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, channels).reshape(full))
        self.register_buffer("shift", torch.linspace(-1, 1, channels).reshape(full[1:]))
        self.plain = torch.linspace(1, 2, channels).reshape(full)
        self.one = nn.Parameter(torch.tensor([1.5]))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.tail(self, self.layer(x)))


def _normalise(m: Any, y: Tensor) -> Tensor:
    n = m.norm
    return F.batch_norm(y, n.running_mean, n.running_var, eps=n.eps, weight=n.weight)


def _torch_normalise(m: Any, y: Tensor) -> Tensor:
    n = m.norm
    return torch.batch_norm(
        y, n.weight, n.bias, n.running_mean, n.running_var, False, 0.1, 1e-3, True
    )


def _in_place(m: Any, y: Tensor) -> Tensor:
    y *= m.scale
    y += m.shift
    y -= 0.5
    y /= m.plain
    return y


def _methods(m: Any, y: Tensor) -> Tensor:
    return y.mul_(m.scale).add_(m.shift, alpha=0.5).sub_(2).div_(m.plain).neg_()


TAILS: dict[str, Callable[..., Tensor]] = {
    "module": lambda m, y: m.norm(y),
    "module with keyword": lambda m, y: m.norm(input=y),
    "function": _normalise,
    "torch.batch_norm": _torch_normalise,
    "x * c": lambda m, y: y * m.scale,
    "c * x": lambda m, y: m.scale * y,
    "x / c": lambda m, y: y / m.scale,
    "x + c": lambda m, y: y + m.shift,
    "c + x": lambda m, y: m.shift + y,
    "x - c": lambda m, y: y - m.shift,
    "c - x": lambda m, y: m.shift - y,
    "-x": lambda m, y: -y,
    "number * x": lambda m, y: 3 * y,
    "number - x": lambda m, y: 1.5 - y,
    "x / number": lambda m, y: y / 4,
    "zeros added": lambda m, y: operator.iadd(F.dropout(0 + y, training=False), 0) - 0.0,
    "scalar parameter": lambda m, y: m.one * y - m.one,
    "plain attribute": lambda m, y: y * m.plain + m.plain,
    "torch functions": lambda m, y: torch.div(torch.sub(torch.mul(y, m.scale), 1), m.plain),
    "keywords": lambda m, y: torch.add(input=torch.mul(other=y, input=m.scale), other=m.shift),
    "alpha": lambda m, y: torch.add(y, m.shift, alpha=-2),
    "alpha of the value": lambda m, y: torch.sub(m.shift, y, alpha=0.25),
    "rsub": lambda m, y: torch.rsub(y, m.shift),
    "rsub with alpha": lambda m, y: torch.rsub(y, m.shift, alpha=2),
    "multiply, subtract, true_divide": lambda m, y: torch.true_divide(
        torch.subtract(torch.multiply(y, m.scale), m.shift), m.plain
    ),
    "negative": lambda m, y: torch.negative(operator.neg(y.neg())),
    "operators in place": _in_place,
    "methods in place": _methods,
    "methods": lambda m, y: y.mul(m.scale).sub(m.shift).divide(2.0).add(1),
    "dunder": lambda m, y: y.__rsub__(1).__mul__(m.scale).__radd__(m.shift),
    "computed constant": lambda m, y: y * (m.scale.abs() + 1).sqrt() + m.shift.exp().neg(),
    "all at once": lambda m, y: m.norm(_in_place(m, _normalise(m, 2 * y))) * m.scale - 1,
    "dropout between": lambda m, y: F.dropout(m.norm(F.dropout(y, 0.5, False)), training=False),
    "contiguous between": lambda m, y: m.norm(y.contiguous()).contiguous() * 2,
}


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
@pytest.mark.parametrize("name", ["module", "function", "x * c", "c - x", "all at once"])
def test_every_rank(name: str, rank: int) -> None:
    how = {} if rank == 0 else {"kernel_size": 3, "padding": 1}
    layer = CONV[rank](6, 8, **how)
    # Linear takes any rank, BatchNorm1d two: only an example tells which
    check(
        Tail(layer, 8, rank, TAILS[name]).eval(), shapes(6, rank), layers=1, example_inputs=not rank
    )


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", TAILS)
def test_every_spelling(name: str, bias: bool) -> None:
    model = Tail(nn.Conv2d(6, 8, 3, padding=1, bias=bias, groups=2), 8, 2, TAILS[name])
    optimized = check(model.eval(), shapes(6, 2), layers=1)
    assert set(count(optimized, inputs_of(shapes(6, 2)[0], torch.float32)).kinds) == {
        "convolution", "relu",
    }  # fmt: skip


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("name", ["module", "all at once"])
def test_transposed(name: str, rank: int, groups: int) -> None:
    # equal channel counts with groups is the case torch's own freezing gets wrong
    layer = TRANSPOSED[rank](
        8, 8, 3, stride=2, padding=1, output_padding=1, groups=groups, bias=rank > 1
    )
    check(Tail(layer, 8, rank, TAILS[name]).eval(), shapes(8, rank), layers=1)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_padding_modes(mode: Any) -> None:
    layer = nn.Conv2d(6, 8, (3, 5), padding=(1, 2), padding_mode=mode)
    check(Tail(layer, 8, 2, TAILS["all at once"]).eval(), shapes(6, 2), layers=1)


@pytest.mark.parametrize("kernel", [2, 3, (4, 1)])
def test_same_padding_keeps_its_uneven_sides(kernel: Any) -> None:
    layer = nn.Conv2d(6, 8, kernel, padding="same")
    check(Tail(layer, 8, 2, TAILS["module"]).eval(), shapes(6, 2), layers=1)


class Renamed(nn.BatchNorm2d):
    """A subclass that keeps the forward."""


class RenamedConv(nn.Conv2d):
    """A subclass that keeps the forward."""


@pytest.mark.parametrize(
    "norm",
    [
        pytest.param(lambda: nn.BatchNorm2d(8, affine=False), id="not affine"),
        pytest.param(lambda: nn.BatchNorm2d(8, eps=0.1), id="large eps"),
        pytest.param(lambda: nn.SyncBatchNorm(8), id="SyncBatchNorm"),
        pytest.param(lambda: nn.InstanceNorm2d(8, track_running_stats=True), id="InstanceNorm"),
        pytest.param(lambda: Renamed(8), id="subclass"),
        pytest.param(lambda: nn.Sequential(nn.Dropout(), nn.BatchNorm2d(8)), id="after Dropout"),
        pytest.param(lambda: nn.Sequential(*map(nn.BatchNorm2d, (8, 8, 8))), id="three in a row"),
    ],
)
def test_kinds_of_norm(norm: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(RenamedConv(6, 8, 3), norm(), nn.ReLU())
    check(model.eval(), shapes(6, 2), layers=1, operations=2)


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_norm_before_an_unpadded_layer(rank: int) -> None:
    how = {} if rank == 0 else {"kernel_size": 2, "stride": 2, "groups": 2}
    model = nn.Sequential(NORM[rank](6), CONV[rank](6, 8, **how), nn.ReLU())
    check(model.eval(), shapes(6, rank), layers=1, example_inputs=not rank)


def test_scale_without_shift_before_a_padded_layer() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(6, 6, 1)
            self.conv = nn.Conv2d(6, 8, 3, padding=1)
            self.scale = nn.Parameter(torch.rand(6, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(torch.relu(self.first(x)) * self.scale)

    # without an example x might have one channel, and broadcast
    check(Scaled().eval(), shapes(6, 2), layers=2)


def test_norm_on_both_sides() -> None:
    model = nn.Sequential(nn.BatchNorm2d(6), nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    check(model.eval(), shapes(6, 2), layers=1, operations=2)


def test_norm_between_two_layers_goes_into_the_first() -> None:
    model = nn.Sequential(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3, padding=1))
    check(model.eval(), shapes(6, 2), layers=2, operations=2)


# --- no-ops, with the reason the report must give ------------------------------------------------


def conv(inputs: int = 6, outputs: int = 8, kernel: int = 3, **how: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, **how)


def norm(channels: int = 8, **how: Any) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, **how)


def _training() -> nn.Module:
    model = nn.Sequential(conv(), norm()).eval()
    model[1].train()
    return model


def _hooked() -> nn.Module:
    model = nn.Sequential(conv(), norm())
    model[0].register_forward_hook(lambda module, args, out: out * 2)
    return model


def _norm_hooked() -> nn.Module:
    model = nn.Sequential(conv(), norm())
    model[1].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    return model


def _tied() -> nn.Module:
    model = nn.Sequential(conv(6, 6, 1), norm(6), nn.ReLU(), conv(6, 6, 1), norm(6))
    model[3].weight = model[0].weight
    return model


def _twice(m: Any, x: Tensor) -> Tensor:
    return m.second(m.conv(m.first(m.conv(x)).relu()))


def _read_twice(m: Any, x: Tensor) -> Any:
    y = m.conv(x)
    return m.norm(y), y


def _batch_statistics(m: Any, x: Tensor) -> Tensor:
    return F.batch_norm(m.conv(x), None, None, m.norm.weight, m.norm.bias, training=True)


def _updating(m: Any, x: Tensor) -> Tensor:
    n = m.norm
    return F.batch_norm(m.conv(x), n.running_mean, n.running_var, n.weight, n.bias, True)


def _alias_written(m: Any, x: Tensor) -> Tensor:
    y = z = m.conv(x)
    z += 1.0  # y changes too
    return y * m.scale


def _view_before_write(m: Any, x: Tensor) -> Any:
    y = m.conv(x)
    v = y[:, 0]
    y *= m.scale
    return y, v + 1


def _old_value_kept(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    z = y * 2
    y += 3.0
    return z * y


def _input_written(m: Any, x: Tensor) -> Any:
    y = m.conv(x)
    x.mul_(2)
    return m.norm(y) + m.second(m.conv2(x))


def _partial_write(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    y[:, 1:3] += 1.0
    return m.norm(y)


def _dropout_alias(m: Any, x: Tensor) -> Any:
    y = m.conv(x)
    z = F.dropout(y, training=False)
    z += 1.0
    return m.norm(y), z


WIDE = ((2, 6, 9, 10), (1, 6, 5, 10))  # output width 8: as many positions as channels
STAYS: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, Any]]] = {
    "training": (_training, None, {"batchnorms": 1, "reasons": ["training mode"], "rewrites": 0}),
    "no running statistics": (
        lambda: nn.Sequential(conv(), norm(track_running_stats=False)),
        None, {"batchnorms": 1, "reasons": ["batch statistics"], "rewrites": 0},
    ),
    "functional batch statistics": (
        lambda: Body(_batch_statistics, conv=conv(), norm=norm()),
        None, {"batchnorms": 1, "reasons": ["training mode"], "rewrites": 0},
    ),
    "called twice": (
        lambda: Body(_twice, conv=conv(6, 6), first=norm(6), second=norm(6)),
        None, {"batchnorms": 2, "reasons": ["called 2 times"], "rewrites": 0},
    ),
    "tied weights": (
        _tied, None, {"batchnorms": 2, "reasons": ["its weight is used 2 times"], "rewrites": 0},
    ),
    "hook on the conv": (
        _hooked, None, {"batchnorms": 1, "reasons": ["hook registered"], "rewrites": 0},
    ),
    "hook on the norm": (
        _norm_hooked, None, {"batchnorms": 1, "reasons": ["hook registered"], "rewrites": 0},
    ),
    "output read twice": (
        lambda: Body(_read_twice, conv=conv(), norm=norm()),
        None, {"batchnorms": 1, "reasons": ["read by 1 other"], "rewrites": 0},
    ),
    "shift before a padded layer": (
        lambda: nn.Sequential(norm(6), conv(padding=1)),
        None, {"batchnorms": 1, "reasons": ["does not see its bias"], "rewrites": 0},
    ),
    "output padding that only the dilation of a single tap allows": (
        lambda: nn.Sequential(
            nn.ConvTranspose2d(6, 8, 1, dilation=2, output_padding=1), norm(), nn.ReLU()
        ),
        None, {"batchnorms": 1, "reasons": ["output padding 1"], "rewrites": 0},
    ),
    "vector along W": (
        lambda: Body(
            lambda m, x: m.conv(x) * m.scale, conv=conv(), scale=nn.Parameter(torch.rand(8))
        ),
        WIDE, {"reasons": ["the channels are on -3"], "rewrites": 0},
    ),
    "vector along H": (
        lambda: Body(
            lambda m, x: m.conv(x) + m.c, conv=conv(), c=nn.Parameter(torch.rand(1, 1, 8, 1))
        ),
        ((2, 6, 10, 9), (1, 6, 10, 5)), {"reasons": ["the channels are on -3"], "rewrites": 0},
    ),
    "constant that grows the rank": (
        lambda: Body(
            lambda m, x: m.conv(x) * m.c, conv=conv(), c=nn.Parameter(torch.rand(1, 1, 8, 1, 1))
        ),
        None, {"reasons": ["grows"], "rewrites": 0},
    ),
    "constant that grows the channels": (
        lambda: Body(
            lambda m, x: m.conv(x) * m.c, conv=conv(6, 1), c=nn.Parameter(torch.rand(8, 1, 1))
        ),
        None, {"reasons": ["channels"], "rewrites": 0},
    ),
    "embedding": (
        lambda: Body(
            lambda m, x: m.conv(x) + m.c, conv=conv(), c=nn.Parameter(torch.rand(1, 8, 7, 6))
        ),
        ((2, 6, 9, 8), (1, 6, 9, 8)), {"rewrites": 0},
    ),
    "c / x": (
        lambda: Body(lambda m, x: 1.0 / (m.conv(x).abs() + 1), conv=conv()), None, {"rewrites": 0}
    ),
    "rounding division": (
        lambda: Body(lambda m, x: torch.div(m.conv(x), 0.1, rounding_mode="floor"), conv=conv()),
        None, {"rewrites": 0},
    ),
    "product of two values": (
        lambda: Body(lambda m, x: m.conv(x) * m.conv2(x), conv=conv(), conv2=conv()),
        None, {"rewrites": 0},
    ),
    "InstanceNorm of its own statistics": (
        lambda: nn.Sequential(conv(), nn.InstanceNorm2d(8, affine=True)), None,
        {"rewrites": 0, "batchnorms": None},
    ),
    "alias written": (
        lambda: Body(_alias_written, conv=conv(), scale=nn.Parameter(torch.rand(8, 1, 1))),
        None, {},
    ),
    "view before a write": (
        lambda: Body(_view_before_write, conv=conv(), scale=nn.Parameter(torch.rand(8, 1, 1))),
        None, {"rewrites": 0},
    ),
    "old value kept": (lambda: Body(_old_value_kept, conv=conv()), None, {}),
    "input written": (
        lambda: Body(_input_written, conv=conv(), conv2=conv(), norm=norm(), second=norm()),
        None, {"batchnorms": None},
    ),
    "partial write": (
        lambda: Body(_partial_write, conv=conv(), norm=norm()),
        None, {"batchnorms": 1, "rewrites": 0},
    ),
    "Dropout aliases": (
        lambda: Body(_dropout_alias, conv=conv(), norm=norm()),
        None, {"batchnorms": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STAYS)
def test_stays_and_says_why(name: str) -> None:
    make, at, expected = STAYS[name]
    model = make()
    if name != "training":
        model.eval()
    check(model, at or shapes(6, 2), **expected)


@pytest.mark.parametrize("name", STAYS)
def test_stays_without_the_cost_rule_and_with_inputs(name: str) -> None:
    make, at, expected = STAYS[name]
    model = make()
    if name != "training":
        model.eval()
    check(model, at or shapes(6, 2), cost="always", example_inputs=True, **expected)


def test_updating_statistics_are_left_to_the_model() -> None:
    """F.batch_norm(training=True) with buffers writes them: the copy must, the original not."""
    model = Body(_updating, conv=conv(), norm=norm()).eval()
    mean = model.get_buffer("norm.running_mean")
    before = mean.clone()
    optimized = fxrep.optimize(model)
    assert torch.equal(mean, before)
    assert any("training mode" in skip.reason for skip in fxrep.report(optimized).skipped)
    x = torch.randn(4, 6, 9, 9)
    assert distance(run(optimized, (x,)), run(model, (x,))) < 1e-6


@pytest.mark.parametrize("with_inputs", [False, True])
def test_batchnorm_of_tokens_normalises_the_length(with_inputs: bool) -> None:
    """Linear gives (N, L, C); BatchNorm1d normalises L, which here is as long as C."""
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8)).eval()
    randomize(model)
    x = torch.randn(3, 8, 6)
    optimized = fxrep.optimize(model, x) if with_inputs else fxrep.optimize(model)
    try:
        got = run(optimized, (x,))
    except (RuntimeError, AssertionError) as error:
        assert not with_inputs and "dimensions" in str(error)  # it says so instead
    else:
        assert distance(got, run(model, (x,))) < 1e-5


@pytest.mark.parametrize("with_inputs", [False, True])
def test_batchnorm_of_an_unbatched_conv1d(with_inputs: bool) -> None:
    """An unbatched Conv1d gives (C, L): BatchNorm1d takes it for (N, C) and normalises L."""
    model = nn.Sequential(nn.Conv1d(6, 8, 3, padding=1), nn.BatchNorm1d(8)).eval()
    randomize(model)
    x = torch.randn(6, 8)
    optimized = fxrep.optimize(model, x) if with_inputs else fxrep.optimize(model)
    try:
        got = run(optimized, (x,))
    except (RuntimeError, AssertionError) as error:
        assert not with_inputs and "dimensions" in str(error)
    else:
        assert distance(got, run(model, (x,))) < 1e-5


@pytest.mark.parametrize("rank", [0, 1])
def test_batchnorm1d_folds_at_a_known_rank(rank: int) -> None:
    layer = nn.Linear(6, 8) if rank == 0 else nn.Conv1d(6, 8, 3)
    model = nn.Sequential(layer, nn.BatchNorm1d(8)).eval()
    check(model, shapes(6, rank), layers=1, example_inputs=True)


@pytest.mark.parametrize("where", ["scale", "shift"])
def test_a_constant_of_a_wider_dtype_promotes_and_stays(where: str) -> None:
    tail = {"scale": lambda m, x: m.conv(x) * m.c, "shift": lambda m, x: m.conv(x) + m.c}[where]
    wide = torch.rand(8, 1, 1, dtype=torch.float64)
    model = Body(tail, conv=conv(), c=wide).eval()
    optimized = fxrep.optimize(model)
    x = torch.randn(1, 6, 9, 9)
    got, expected = run(optimized, (x,)), run(model, (x,))
    assert got.dtype == expected.dtype == torch.float64
    assert distance(got, expected) < 1e-6
    assert any("promotes" in skip.reason for skip in fxrep.report(optimized).skipped)


def test_a_block_called_twice_folds_once_and_stays_shared() -> None:
    block = nn.Sequential(conv(6, 6, 3, padding=1), norm(6), nn.ReLU())
    model = Body(lambda m, x: m.block(m.block(x)) + m.block(x), block=block).eval()
    optimized = check(model, shapes(6, 2), layers=3, rewrites=1)
    assert sum(isinstance(m, nn.Conv2d) for m in optimized.modules()) == 1


class OwnForward(nn.Conv2d):
    """It computes something else than its base class."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).abs() + 1


class OwnConvForward(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight * 2, bias).abs()


class PadsByShape(nn.Conv2d):
    """Control flow on sizes, as TensorFlow's padding needs: not traceable."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] % 2:
            x = F.pad(x, (0, 1, 0, 0))
        return super().forward(x)


@pytest.mark.parametrize("kind", [OwnForward, OwnConvForward, PadsByShape])
def test_a_subclass_with_its_own_forward_is_not_its_base(kind: Any) -> None:
    model = nn.Sequential(kind(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    check(model, shapes(6, 2), batchnorms=1, layers=1)


def test_an_instance_with_its_own_forward_is_not_its_class() -> None:
    model = nn.Sequential(conv(), norm()).eval()
    plain = model[0].forward
    model[0].forward = lambda x: plain(x).abs()
    x = torch.randn(1, 6, 9, 9)
    randomize(model)
    assert distance(run(fxrep.optimize(model), (x,)), run(model, (x,))) < 1e-6


# --- numbers -------------------------------------------------------------------------------------


def test_a_value_the_dtype_cannot_hold_is_refused() -> None:
    model: Any = nn.Sequential(conv(bias=False), norm()).eval()
    model[1].running_var.fill_(1e-12)
    model[1].eps = 0.0
    half = model.half()
    half[1].running_var.fill_(6e-8)
    half[0].weight.data.fill_(100.0)
    optimized = fxrep.optimize(half)
    assert any("not finite" in skip.reason for skip in fxrep.report(optimized).skipped)
    assert any(isinstance(m, nn.BatchNorm2d) for m in optimized.modules())


def test_subnormal_rows_are_refused() -> None:
    model = nn.Sequential(conv(bias=False), norm()).eval().half()
    model[1].weight.data.fill_(1e-6)
    optimized = fxrep.optimize(model)
    assert any("too small" in skip.reason for skip in fxrep.report(optimized).skipped)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_dtype_layout_and_requires_grad_are_kept(dtype: Any, trains: bool, layout: Any) -> None:
    model = randomize(nn.Sequential(conv(), norm())).eval()
    model = model.to(dtype=dtype, memory_format=layout).requires_grad_(trains)
    optimized = fxrep.optimize(model)
    (layer,) = [m for m in optimized.modules() if isinstance(m, nn.Conv2d)]
    for tensor in (layer.weight, layer.bias):
        assert tensor.dtype == dtype and tensor.requires_grad == trains
    assert layer.weight.is_contiguous(memory_format=layout)
    x = torch.randn(2, 6, 9, 9)
    expected = run(model.double(), (x.to(dtype).double(),))
    got = run(optimized, (x.to(dtype),))
    assert got.dtype == dtype
    assert distance(got, expected) < 20 * torch.finfo(dtype).eps


def test_the_fold_is_rounded_once() -> None:
    """A scale of 1e6 in float32: composed in float64 the weight is off by half an epsilon."""
    model: Any = nn.Sequential(conv(bias=False), norm()).eval()
    randomize(model)
    model[1].running_var.mul_(1e-12)
    model[1].eps = 1e-30  # lost beside a variance; torch 2.11 refuses 0
    (layer,) = [m for m in fxrep.optimize(model).modules() if isinstance(m, nn.Conv2d)]
    scale = model[1].weight.double() * model[1].running_var.double().rsqrt()
    exact = model[0].weight.double() * scale[:, None, None, None]
    assert torch.equal(layer.weight.detach(), exact.float().detach())


class IntegerDivisor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.register_buffer("divisor", torch.tensor(3))

    def forward(self, x):
        return self.conv(x) / self.divisor


@pytest.mark.parametrize("validate", [True, False])
def test_an_integer_divisor_is_exact(validate):
    assert assert_equal(IntegerDivisor(), IMAGE, validate=validate).rewrites


def test_numbers_no_float_holds():
    class Huge(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = conv_bn(4, 4, 3, padding=1)

        def forward(self, x):
            return self.body(x) + np.float64(2.0) * 1.0

    assert assert_equal(Huge(), IMAGE).rewrites


# --- over all geometries -------------------------------------------------------------------------


@st.composite
def layers(draw: st.DrawFn, rank: int) -> tuple[nn.Module, int, int]:
    """A layer with its inputs and outputs."""
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    inputs, outputs = (groups * draw(st.integers(1, 3)) for _ in range(2))
    bias = draw(st.booleans())
    if rank == 0:
        return nn.Linear(inputs, outputs, bias), inputs, outputs
    axes = st.tuples(*[st.integers(1, 3)] * rank)
    kernel, stride, dilation = draw(axes), draw(axes), draw(axes)
    how: dict[str, Any] = {"groups": groups, "bias": bias, "dilation": dilation, "stride": stride}
    reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    how["padding"] = tuple(draw(st.integers(0, r)) for r in reach)
    if draw(st.integers(0, 3)) == 0:
        # One tap has every dilation: there a layer's output padding must stay below its stride.
        limits = [
            s if k == 1 else max(s, d) for k, s, d in zip(kernel, stride, dilation, strict=True)
        ]
        how["output_padding"] = tuple(draw(st.integers(0, limit - 1)) for limit in limits)
        return TRANSPOSED[rank](inputs, outputs, kernel, **how), inputs, outputs
    if draw(st.booleans()):
        how["padding_mode"] = draw(st.sampled_from(["replicate", "circular", "zeros"]))
    return CONV[rank](inputs, outputs, kernel, **how), inputs, outputs


@given(data=st.data(), rank=st.integers(0, 3), always=st.booleans())
def test_any_layer_with_any_tail(data: st.DataObject, rank: int, always: bool) -> None:
    layer, inputs, outputs = data.draw(layers(rank))
    names = data.draw(st.lists(st.sampled_from(sorted(TAILS)), min_size=1, max_size=3))

    def tail(m: Any, y: Tensor) -> Tensor:
        for name in names:
            y = TAILS[name](m, y)
        return y

    model = Tail(layer, outputs, rank, tail).eval()
    at = tuple((n, inputs, *(size + i for i in range(rank))) for n, size in ((2, 7), (1, 8)))
    check(model, at, layers=1, cost="always" if always else "macs", example_inputs=not rank)


@given(data=st.data(), rank=st.integers(0, 2), always=st.booleans())
def test_any_norm_before_any_layer(data: st.DataObject, rank: int, always: bool) -> None:
    layer, inputs, _ = data.draw(layers(rank))
    model = nn.Sequential(NORM[rank](inputs), layer, nn.ReLU()).eval()
    at = tuple((n, inputs, *(size + i for i in range(rank))) for n, size in ((2, 7), (1, 8)))
    cost = "always" if always else "macs"
    padding = getattr(layer, "padding", 0)
    padded = any(padding) if isinstance(padding, tuple) else bool(padding)
    zeros = getattr(layer, "padding_mode", "zeros") == "zeros"
    stays = isinstance(layer, tuple(TRANSPOSED.values())) or (padded and zeros)
    wanted = None if stays else 0
    check(model, at, layers=1, batchnorms=wanted, cost=cost, example_inputs=not rank)
