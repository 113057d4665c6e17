"""A question has the answer without which the forward raises, or that of the example inputs.

The graph asserts the answer. A call for which it does not hold runs the original forward.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxrep
from support.check import randomize
from support.saving import saved

from .test_guards import norms


class Layers(nn.Module):
    """Two convolutions with BatchNorms, called by the forward itself."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv2d(3, 4, 3, stride=2, bias=False)
        self.b = nn.BatchNorm2d(4)
        self.c2, self.b2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.channels = 3
        self.count = [0]

    def first(self, x: Tensor) -> Tensor:
        return self.b(self.c(x))

    def second(self, x: Tensor) -> Tensor:
        return self.b2(self.c2(x))

    def check(self, x: Tensor) -> None:
        if x.shape[1] != self.channels:
            raise ValueError(f"{self.channels} channels, not {x.shape}")


def outcome(model: nn.Module, x: Tensor) -> Any:
    try:
        with torch.no_grad():
            return model(x.clone())
    except Exception as error:
        return error


def made(forward: Callable[..., Any]) -> nn.Module:
    kind = type("Model", (Layers,), {"forward": forward})
    globals()["Model"] = kind  # to be found by pickle
    return randomize(kind()).eval()


# --- the other answer only raises ---------------------------------------------------------------


def channels_compared(self: Any, x: Tensor) -> Tensor:
    if x.shape[1] != self.channels:
        raise ValueError(f"{x.shape[1]} channels")
    return self.first(x)


# Not by itself in this file, where pytest rewrites what asserts.
exec("""
def asserted(self, x):
    assert x.ndim == 4, f"rank {x.ndim}"
    assert x.shape[1] == self.channels
    return self.first(x)
""")


def either(self: Any, x: Tensor) -> Tensor:
    if x.dim() != 4 or x.size(1) != 3:
        message = f"{tuple(x.shape)}"
        raise RuntimeError(message)
    return self.first(x)


def helper(self: Any, x: Tensor) -> Tensor:
    self.check(x)
    return self.first(x)


def otherwise(self: Any, x: Tensor) -> Tensor:
    if x.shape[-1] % 2 == 0:
        y = self.first(x)
    else:
        raise ValueError("odd")
    return self.second(y)


def explained(self: Any, x: Tensor) -> Tensor:
    height, width = x.shape[-2:]
    if height % 2 != 0 or width % 2 != 0:
        more = (height // 2 + 1) * 2 if height % 2 != 0 else height
        message = f"{more}" if more > 8 and self.channels else "odd"
        raise RuntimeError(message)
    return self.first(x)


def values(self: Any, x: Tensor) -> Tensor:
    if torch.isnan(x).any():
        raise ValueError("nan")
    return self.first(x)


@pytest.mark.parametrize(
    "forward",
    [channels_compared, globals()["asserted"], either, helper, otherwise, explained, values],
)
def test_a_condition_that_only_raises_stays_in_the_graph(forward: Any) -> None:
    model, x = made(forward), torch.randn(2, 3, 8, 8)
    fast = fxrep.optimize(model)
    assert isinstance(fast, torch.fx.GraphModule), str(fxrep.report(fast))
    assert norms(fast, x) == 0
    inputs = [x, torch.randn(1, 3, 6, 10), torch.randn(1, 5, 8, 8), torch.randn(1, 3, 7, 7)]
    for each in [*inputs, torch.full_like(x, float("nan"))]:
        expected, got = outcome(model, each), outcome(fast, each)
        if isinstance(expected, Exception):
            assert isinstance(got, Exception)
        else:
            assert torch.allclose(got, expected, atol=1e-5, equal_nan=True)


def caught(self: Any, x: Tensor) -> Tensor:
    try:
        self.check(x)
    except ValueError:
        x = x[:, :3]
    return self.first(x)


def both_go_on(self: Any, x: Tensor) -> Tensor:
    if x.shape[1] != 3:
        x = x[:, :3]
    return self.first(x)


def and_(self: Any, x: Tensor) -> Tensor:
    if x.shape[1] > 3 and x.shape[2] > 8:
        raise ValueError("large")
    return self.first(x[:, :3])


def sometimes(self: Any, x: Tensor) -> Tensor:
    if x.shape[1] != 3:
        if self.training or x.shape[1] > 8:
            raise ValueError("training")
        x = x[:, :3]
    return self.first(x)


@pytest.mark.parametrize("forward", [caught, both_go_on, and_, sometimes])
def test_a_condition_that_may_go_either_way_stays_python(forward: Any) -> None:
    model = made(forward)
    fast = fxrep.optimize(model)
    assert not isinstance(fast, torch.fx.GraphModule)
    for each in (torch.randn(2, 3, 8, 8), torch.randn(1, 5, 8, 8), torch.randn(1, 5, 10, 10)):
        expected, got = outcome(model, each), outcome(fast, each)
        if isinstance(expected, Exception):
            assert type(got) is type(expected)
        else:
            assert torch.allclose(got, expected, atol=1e-5)


# --- answers of the example inputs --------------------------------------------------------------


def padded(self: Any, x: Tensor) -> Tensor:
    size = int(x.shape[-1])
    pad = max(3 - 2, 0) if size % 2 == 0 else max(3 - size % 2, 0)
    return self.first(F.pad(x, (pad // 2, pad - pad // 2, pad // 2, pad - pad // 2)))


def looped(self: Any, x: Tensor) -> Tensor:
    return torch.cat([self.first(x[i : i + 1]) for i in range(x.shape[0])])


def iterated(self: Any, x: Tensor) -> Tensor:
    return torch.stack([self.first(image[None]) for image in x])


def ranks(self: Any, x: Tensor) -> Tensor:
    batched = x.dim() == 4
    y = self.first(x if batched else x[None])
    return y if batched else y[0]


def resized(self: Any, x: Tensor) -> Tensor:
    y = self.first(x)
    if x.shape[-2:] != y.shape[-2:]:
        y = F.interpolate(y, x.shape[-2:])
    return self.second(y)


def typed(self: Any, x: Tensor) -> Tensor:
    if x.dtype == torch.float64:
        x = x.float()
    if x.device.type == "cuda":
        x = x * 2
    return self.first(x)


def counted(self: Any, x: Tensor) -> Tensor:
    y = self.first(x)
    while y.shape[-1] > 2:
        y = F.max_pool2d(y, 2)
    return self.second(y) * len(y)


def chosen(self: Any, x: Tensor) -> Tensor:
    return (self.first if x.shape[0] > 1 else lambda x: self.first(x) * 2)(x)


def intermediate(self: Any, x: Tensor) -> Tensor:
    y = self.first(x)
    return self.second(y) if y.shape[-1] == 3 else y


def named(self: Any, x: Tensor) -> Tensor:
    scales = {"cpu torch.float32": 2.0, "8": 3.0}
    return self.first(x) * scales[f"{x.device} {x.dtype}"] * scales.get(str(x.shape[-1]), 1.0)


GUARDED = [
    padded, looped, iterated, ranks, resized, typed, counted, chosen, intermediate, named,
    both_go_on, and_,
]  # fmt: skip

INPUTS = [
    torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8), torch.randn(1, 3, 9, 7),
    torch.randn(3, 3, 8, 8), torch.randn(2, 3, 12, 9), torch.randn(3, 9, 9),
    torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.randn(2, 5, 8, 8),
]  # fmt: skip


def agree(model: nn.Module, fast: nn.Module) -> None:
    for x in INPUTS:
        for _ in range(2):
            expected, got = outcome(model, x), outcome(fast, x)
            if not isinstance(expected, Exception):
                assert got.shape == expected.shape and got.dtype == expected.dtype
                assert torch.allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("forward", GUARDED)
def test_answers_of_example_inputs_are_guarded(forward: Any) -> None:
    model, x = made(forward), INPUTS[0]
    agree(model, fxrep.optimize(model))
    fast: Any = fxrep.optimize(model, x)
    assert norms(fast, x) == 0 and norms(model, x) > 0
    assert any("guarded" in skip.reason for skip in fxrep.report(fast).skipped)
    assert type(fast) is type(model)
    for each in (fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), saved(fast)):
        agree(model, each)
        assert norms(each, x) == 0
    agree(copy.deepcopy(model).double(), copy.deepcopy(fast).double())


def test_an_optimized_model_is_optimized_again() -> None:
    """From the layers that it has kept."""
    model, x = made(padded), INPUTS[0]
    fast = fxrep.optimize(fxrep.optimize(model, x), x)
    assert norms(fast, x) == 0
    agree(model, fast)
    again = fxrep.optimize(fast)
    assert norms(again, x) > 0 and norms(fast, x) == 0
    agree(model, again)


@pytest.mark.parametrize("forward", GUARDED)
def test_a_guarded_graph_gives_gradients(forward: Any) -> None:
    model, x = made(forward), INPUTS[0]
    fast = fxrep.optimize(model, x)
    for each in (model, fast):
        each(x.clone().requires_grad_()).sum().backward()
    for a, b in zip(model.parameters(), fast.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or b.grad is None or torch.allclose(a.grad, b.grad, atol=1e-5)


class Deciding(nn.Module):
    """Stays Python code, for it decides on values; the part below decides on sizes."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x) if x.mean() < 1e3 else x


@pytest.mark.parametrize("forward", GUARDED)
def test_a_part_has_the_answers_of_what_it_is_given(forward: Any) -> None:
    model, x = Deciding(made(forward)).eval(), INPUTS[0]
    fast = fxrep.optimize(model, x)
    assert norms(fast, x) == 0 and norms(model, x) > 0
    for each in (fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        agree(model, each)
        assert norms(each, x) == 0


def written(self: Any, x: Tensor) -> Tensor:
    x += 1
    return self.first(x) if x.shape[-1] == 8 else self.first(x) * 2


def drawn(self: Any, x: Tensor) -> Tensor:
    y = self.first(x)
    if y.mean() > 100:
        y = y * 2
    return self.second(y)


def listed(self: Any, x: Tensor) -> Tensor:
    self.count[0] += 1
    return self.first(x) if x.shape[-1] == 8 else self.first(x) * 2


@pytest.mark.parametrize("forward", [written, drawn, listed])
def test_what_cannot_begin_again_or_depends_on_values_stays_python(forward: Any) -> None:
    model = made(forward)
    fast = fxrep.optimize(model, INPUTS[0].clone())
    assert not any("guarded" in skip.reason for skip in fxrep.report(fast).skipped)
    agree(model, fast)


def test_a_guarded_model_is_compiled_and_exported() -> None:
    model, x = made(padded), INPUTS[0]
    fast = fxrep.optimize(model, x)
    with torch.no_grad():
        exported = torch.export.export(fast, (x,), strict=False).module()
        assert torch.allclose(exported(x), model(x), atol=1e-5)
        compiled = torch.compile(fast, backend="eager")
        for each in INPUTS[:5]:
            assert torch.allclose(compiled(each), model(each), atol=1e-5)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_check_of_torchs_own_code_only_leads_to_an_error(rank: int) -> None:
    """A subclass that calls `super().forward` runs torch's check of the rank."""
    base: Any = getattr(nn, f"BatchNorm{rank}d")

    class Norm(base):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    conv: Any = getattr(nn, f"Conv{rank}d")
    model = randomize(nn.Sequential(conv(3, 4, 1), Norm(4)).eval())
    x = torch.randn(2, 3, *[5] * rank)
    # A BatchNorm1d allows two ranks, and a Conv1d has values of both.
    optimized = fxrep.optimize(model, x if rank == 1 else None)
    torch.testing.assert_close(optimized(x), model(x), rtol=1e-4, atol=1e-5)
    assert fxrep.report(optimized).rewrites, fxrep.report(optimized)
    for result in (model, optimized):
        with pytest.raises((ValueError, RuntimeError, AssertionError)):
            result(torch.randn(3, *[5] * (rank + 3)))
