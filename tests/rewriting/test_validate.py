"""Validation on the spot: it passes what is right at every border, and sees what is not."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxrep
from fxrep.algebra.maps import Axis, conv_map
from fxrep.rewriting import layers, session, validate
from fxrep.rewriting.validate import relative_error
from support.blocks import BLOCKS
from support.check import assert_equal
from support.models import IMAGE


class Sum(nn.Module):
    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        a, b = (branch(x) for branch in self.branches)
        return a + b


AXES = [
    (k, s, p, d)
    for k, s, p, d in itertools.product((1, 2, 3, 4), (1, 2, 3), (0, 1, 2, 3), (1, 2))
    if p <= d * (k - 1)
]


def _mutants(axis: Axis) -> list[Axis]:
    """The same axis with one number wrong."""
    changes: list[dict[str, int]] = [
        {"stride": axis.stride + 1},
        {"low": axis.low + 1, "high": axis.high - 1},
        {"low": axis.low - 1, "high": axis.high + 1},
        {"low": axis.low + 1, "high": axis.high + 1},
        {"high": axis.high + axis.stride},
        {"dilation": axis.dilation + 1},
    ]
    return [dataclasses.replace(axis, **change) for change in changes]


@pytest.mark.parametrize("kernel, stride, padding, dilation", AXES[::3])
def test_a_wrong_number_in_the_geometry_is_seen(
    monkeypatch: pytest.MonkeyPatch, kernel: int, stride: int, padding: int, dilation: int
) -> None:
    """Each number of the fused layer's shape changed by one: refused, unless nothing changes."""
    conv = nn.Conv1d(2, 2, kernel, stride, padding, dilation, bias=False)
    model = nn.Sequential(conv, nn.BatchNorm1d(2)).eval()
    build = layers.build
    for mutant in _mutants(Axis(kernel, stride, padding, padding, dilation)):
        if kernel == 1 and mutant.dilation != dilation:
            continue  # one tap has every dilation

        def wrong(plan: Any, *args: Any, mutant: Axis = mutant) -> Any:
            shape = conv_map(outputs=2, inputs=2, groups=1, axes=[mutant])
            object.__setattr__(plan.pieces[0], "map", shape)
            return build(plan, *args)

        monkeypatch.setattr(session, "build", wrong)
        report = fxrep.report(fxrep.optimize(model))
        assert not report.rewrites, mutant
        assert any("validation failed" in skip.reason for skip in report.skipped), report


def test_right_rewrites_pass_with_a_small_error() -> None:
    for block in BLOCKS[::7]:
        report = fxrep.report(fxrep.optimize(block.make().eval()))
        assert not any("validation failed" in skip.reason for skip in report.skipped), block.name
        assert all((r.error or 0) < 1e-5 for r in report.rewrites), block.name


def test_the_error_reported_is_that_of_rounding() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    single = fxrep.report(fxrep.optimize(model)).rewrites[0].error
    double = fxrep.report(fxrep.optimize(model.double())).rewrites[0].error
    assert 1e-9 < single < 1e-6
    assert double < 1e-14


def test_the_random_state_is_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    state = torch.get_rng_state()
    fxrep.optimize(model, torch.ones(1, 3, 8, 8))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "got, expected, error",
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 2.5], [1.0, 2.0], 0.25),
        ([0.5], [0.0], 0.5),
        ([], [], 0.0),
    ],
)
def test_relative_error(got: list[float], expected: list[float], error: float) -> None:
    assert relative_error(torch.tensor(got), torch.tensor(expected)) == pytest.approx(error)


def test_nan_is_never_small() -> None:
    error = relative_error(torch.tensor([float("nan")]), torch.tensor([1.0]))
    assert not error <= validate.TOLERANCE


def test_large_inputs_are_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check is cheap because it looks at few positions, whatever the model is made for."""
    sizes: list[int] = []
    real = validate._original_results

    def watching(plan: Any, view: Any, values: Any, *rest: Any) -> list[Tensor]:
        sizes.extend(v.numel() // v.shape[1] for v in values.values())
        return real(plan, view, values, *rest)

    model = Sum(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)).eval()
    monkeypatch.setattr(validate, "_original_results", watching)
    fxrep.optimize(model, torch.randn(1, 4, 64, 64))
    assert sizes and max(sizes) <= 64


@pytest.mark.parametrize("kernel, padding", [(2, 1), (3, 2), (5, 4)])
def test_reflected_padding_wider_than_the_smallest_input(kernel, padding):
    conv = nn.Conv2d(4, 4, kernel, padding=padding, padding_mode="reflect")
    assert assert_equal(nn.Sequential(conv, nn.BatchNorm2d(4)), IMAGE).rewrites


@pytest.mark.parametrize("name, eps", [("highest", 0.0), ("medium", 2.0**-7)])
def test_products_may_be_of_a_shorter_format(name: str, eps: float) -> None:
    """Float32 is no more exact than what it is multiplied in: on a GPU TF32, by default."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        assert validate._lowered([torch.ones(1)]) == eps
        assert validate._lowered([torch.ones(1, dtype=torch.float64)]) == 0
    finally:
        torch.set_float32_matmul_precision(before)
