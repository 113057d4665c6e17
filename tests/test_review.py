"""What a reviewer broke once: each case was silently wrong, lost or a crash."""

from __future__ import annotations

import time
from types import MappingProxyType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxrep
from fxrep.rewriting import measure
from support.check import check, settled


def block() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))


def assert_same(model: nn.Module, x: torch.Tensor, **options: object) -> fxrep.Report:
    model = settled(model)
    optimized = fxrep.optimize(model, **options)
    torch.testing.assert_close(optimized(x), model(x), rtol=1e-10, atol=1e-10)
    return fxrep.report(optimized)


IMAGE = torch.randn(1, 4, 6, 7, dtype=torch.float64)


class TiedDecoder(nn.Module):
    """The weight of a folded layer is read once more, below the path of the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.code = nn.Sequential(nn.Linear(4, 4))

    def forward(self, x):
        return F.relu(self.code[0](x) * 2.0) @ self.code[0].weight


class WalksModules(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(block(), block())

    def forward(self, x):
        if x.sum() > 1e9:
            x = x * 2
        for layer in self.body.modules():
            if isinstance(layer, nn.Conv2d):
                x = layer(x)
        return x


class ReadsOneItem(WalksModules):
    def forward(self, x):
        if x.sum() > 1e9:
            x = x * 2
        return self.body(x) * self.body[0][0].out_channels


class IntegerDivisor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.register_buffer("divisor", torch.tensor(3))

    def forward(self, x):
        return self.conv(x) / self.divisor


def test_a_weight_that_is_read_elsewhere_keeps_its_path():
    assert assert_same(TiedDecoder(), torch.randn(3, 4, dtype=torch.float64)).rewrites


def test_code_that_walks_all_modules_is_left_alone():
    report = assert_same(WalksModules(), IMAGE)
    assert not report.rewrites
    assert any("modules" in skip.reason for skip in report.skipped)


def test_reading_an_item_does_not_hinder_folding():
    assert assert_same(ReadsOneItem(), IMAGE).rewrites


def test_a_hook_that_runs_children_finds_them_as_they_were():
    def again(module, args, output):
        for child in module.children():
            output = child(output)
        return output

    model = nn.Sequential(block(), block())
    model[0].register_forward_hook(again)
    assert assert_same(model, IMAGE).rewrites


def test_a_root_hook_is_given_the_class_it_was_made_for():
    model = block()
    model.register_forward_hook(lambda module, args, output: module[1](output))
    assert assert_same(model, IMAGE).rewrites


def test_export_keeps_root_hooks():
    model = nn.Sequential(block(), block())
    model.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    model = settled(model)
    exported = torch.export.export(fxrep.optimize(model), (IMAGE,)).module()
    torch.testing.assert_close(exported(IMAGE), model(IMAGE), rtol=1e-10, atol=1e-10)


def test_random_expressions_are_no_constants():
    class Gumbel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logits = nn.Parameter(torch.rand(4, 1, 1))

        def forward(self, x):
            return x * F.gumbel_softmax(self.logits, dim=0)

    model = Gumbel().eval()
    before = torch.get_rng_state()
    optimized = fxrep.optimize(model)
    assert torch.equal(torch.get_rng_state(), before)
    x = torch.ones(1, 4, 2, 2)
    assert not torch.equal(optimized(x), optimized(x))
    assert [skip.reason for skip in fxrep.report(optimized).skipped] == ["it draws random numbers"]


@pytest.mark.parametrize("validate", [True, False])
def test_an_integer_divisor_is_exact(validate):
    assert assert_same(IntegerDivisor(), IMAGE, validate=validate).rewrites


@pytest.mark.parametrize("kernel, padding", [(2, 1), (3, 2), (5, 4)])
def test_reflected_padding_wider_than_the_smallest_input(kernel, padding):
    conv = nn.Conv2d(4, 4, kernel, padding=padding, padding_mode="reflect")
    assert assert_same(nn.Sequential(conv, nn.BatchNorm2d(4)), IMAGE).rewrites


def test_example_inputs_of_a_model_that_fixes_a_dtype_or_gives_nan():
    class Casts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = block()

        def forward(self, x):
            return torch.log(self.body(x.float()))

    report = fxrep.report(fxrep.optimize(Casts().eval(), torch.randn(1, 4, 5, 5)))
    assert report.error is not None and report.error < 1e-5


@pytest.mark.parametrize("inputs", [(None,), (), {}, torch.randn(1, 3, 5, 5)])
def test_inputs_the_model_does_not_run_on(inputs):
    with pytest.raises(fxrep.InputError, match="example_inputs"):
        fxrep.optimize(block().eval(), inputs)


@pytest.mark.parametrize("passes", [None, 3, "branches", fxrep.default_passes[0], ["none"]])
def test_passes_that_are_none(passes):
    with pytest.raises(fxrep.OptionError, match="passes"):
        fxrep.optimize(block().eval(), passes=passes)


def test_no_report():
    for thing in (None, nn.Identity()):
        with pytest.raises(fxrep.ReportError):
            fxrep.report(thing)


def test_numbers_no_float_holds():
    class Huge(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = block()

        def forward(self, x):
            return self.body(x) + np.float64(2.0) * 1.0

    assert assert_same(Huge(), IMAGE).rewrites


class ReadsChannels(nn.Module):
    """The shape of an inner value is read, and the layer after it changes the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 2, 1)
        self.skip, self.bn = nn.Conv2d(4, 2, 3, padding=1), nn.BatchNorm2d(2)

    def forward(self, x):
        y = self.first(x)
        return self.bn(self.second(y) + self.skip(x)) * y.shape[1]


def test_the_shape_of_a_value_with_other_channels():
    assert assert_same(ReadsChannels(), IMAGE).rewrites


class ReadsPadded(nn.Module):
    """A border written with the bias of the layer before: one reader merges, another returns it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(4, 4, 1)
        self.outer = nn.Conv2d(4, 4, 3, bias=False)
        self.beside = nn.Conv2d(4, 4, 3, padding=1, bias=False)

    def forward(self, x):
        y = F.pad(self.inner(x), (1, 1, 1, 1))
        value = self.inner.bias.detach().view(1, -1, 1, 1)
        y[:, :, :1] = value
        y[:, :, -1:] = value
        y[:, :, :, :1] = value
        y[:, :, :, -1:] = value
        return y, self.outer(y) + self.beside(x)


@pytest.mark.parametrize("validate", [True, False])
def test_a_written_border_stays_as_long_as_its_value(validate):
    report = assert_same(ReadsPadded(), IMAGE, cost="always", validate=validate)
    assert "branches" in {rewrite.pass_name for rewrite in report.rewrites}


class ConcatenatesZeros(nn.Module):
    """One operand of a concatenation is a layer times zeros; another is the source itself."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(4, 4, 1, bias=False)
        self.other = nn.Conv2d(4, 4, 1, bias=False)
        self.register_buffer("mask", torch.zeros(1, 4, 1, 1))

    def forward(self, x):
        return torch.cat([x, self.one(x), self.other(x) * self.mask], 1)


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("cost", ["macs", "always"])
def test_outputs_of_zeros_stay_in_a_concatenation(cost, validate):
    assert_same(ConcatenatesZeros(), IMAGE, cost=cost, validate=validate)


class ReadsCircular(nn.Module):
    """A circular convolution that stays for another reader: once more it pads once more."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(4, 32, 3, 2, 1, 2, bias=False, padding_mode="circular")
        self.outer = nn.Conv2d(64, 4, 1, bias=False)

    def forward(self, x):
        y = self.inner(x)
        return y, self.outer(torch.cat([y[:, :, ::2, ::2], y[:, :, 1::2, ::2]], 1))


def test_circular_padding_is_many_operations():
    check(ReadsCircular().eval(), [(2, 4, 9, 4), (1, 4, 13, 8)])


class LinearOnWidth(nn.Module):
    """The channels of a Linear are the last dimension, over which the pooling goes."""

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.linear = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        self.pool = pool

    def forward(self, x):
        return self.pool(self.linear(x))


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("pool", [nn.AdaptiveAvgPool2d(1), nn.AvgPool2d(2), nn.AvgPool2d((2, 1))])
def test_a_linear_layer_on_the_width_stays_above_pooling(pool, validate):
    x = torch.randn(1, 4, 6, 8, dtype=torch.float64)
    assert len(assert_same(LinearOnWidth(pool), x, validate=validate).rewrites) == 1


class Counts(nn.Module):
    """A forward that updates a buffer, and one that draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.other = block(), nn.Conv2d(4, 4, 3, padding=1)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        y = torch.sigmoid(self.body(x)) * torch.tanh(self.other(x))
        return F.dropout(y, training=True) * self.calls


@pytest.mark.parametrize("cost", ["macs", "always", "measure"])
def test_example_inputs_leave_no_trace(cost):
    """Neither in the result, whose buffers are those of the model, nor in the generators."""
    model, before = settled(Counts()), torch.get_rng_state()
    optimized = fxrep.optimize(model, IMAGE, cost=cost)
    assert torch.equal(torch.get_rng_state(), before)
    assert optimized.calls == model.calls == 0


WIDE = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()).eval().double()


@pytest.mark.parametrize("cost", ["macs", "measure"])
@pytest.mark.parametrize(
    "inputs",
    [
        [IMAGE],
        MappingProxyType({"input": IMAGE}),
        IMAGE.clone().requires_grad_() * 2,
        torch.randn(1, 4, 1, 1, dtype=torch.float64).expand(2, 4, 6, 7),
    ],
)
def test_example_inputs_of_every_kind(inputs, cost):
    report = fxrep.report(fxrep.optimize(WIDE, inputs, cost=cost))
    assert report.error is not None and report.error < 1e-10


@pytest.mark.parametrize("cost", ["macs", "measure"])
def test_inputs_the_model_does_not_run_on_whatever_the_cost(cost):
    with pytest.raises(fxrep.InputError, match="does not run on them"):
        fxrep.optimize(WIDE, IMAGE[:, :3], cost=cost)


def test_integer_images_that_the_model_normalises_itself():
    class Normalises(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3)

        def forward(self, x):
            return self.conv((x - 128) / 64)

    images = torch.randint(0, 255, (1, 4, 6, 7), dtype=torch.uint8)
    with pytest.raises(fxrep.EquivalenceError, match=r"does not run on example_inputs.*converted"):
        fxrep.optimize(Normalises().eval(), images)


def test_a_busy_machine_does_not_decide():
    """The faster side is the one that is interrupted, in more than half of its calls."""
    calls = iter(range(10**6))
    timing = measure._measured(
        lambda: time.sleep(2e-3),
        lambda: time.sleep(5e-3 if next(calls) % 5 < 3 else 1e-3),
    )
    assert timing.after < timing.before


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("inputs", [None, IMAGE])
@pytest.mark.parametrize(
    "hooked",
    [
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        lambda conv: nn.utils.prune.l1_unstructured(conv, "weight", 0.3),
    ],
)
def test_a_layer_whose_weight_a_hook_computes_stays(hooked, inputs, ran):
    """Reading its weight ran the hook, which left one that cannot be copied on the layer."""
    model = nn.Sequential(hooked(nn.Conv2d(4, 4, 3)), nn.ReLU()).eval().double()
    if ran:
        model(IMAGE)
    optimized = fxrep.optimize(model, inputs)
    torch.testing.assert_close(optimized(IMAGE), model(IMAGE), rtol=1e-10, atol=1e-10)
