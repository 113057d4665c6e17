"""What parameters, buffers and attributes alone decide is computed once, and nothing else is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import fxrep
from support.check import check, count, distance, inputs_of, run

SHAPES = ((2, 6, 9, 8), (1, 6, 7, 9))


class Weighted(nn.Module):
    """A convolution whose weight `weight(module)` computes in every forward."""

    def __init__(self, weight: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.compute = weight
        self.a = nn.Parameter(torch.randn(8, 6, 3, 3))
        self.b = nn.Parameter(torch.randn(8, 6, 3, 3))
        self.v = nn.Parameter(torch.randn(8))
        self.register_buffer("mask", (torch.rand(8, 6, 3, 3) > 0.5).float())
        self.plain = torch.randn(6)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.compute(self)
        return torch.relu(self.norm(F.conv2d(x, weight, self.v * 2, padding=1)))


WEIGHTS: dict[str, Callable[[Any], Tensor]] = {
    "sum": lambda m: m.a + m.b,
    "mask": lambda m: m.a * m.mask,
    "einsum": lambda m: torch.einsum("oihw,o->oihw", m.a, m.v),
    "plain attribute": lambda m: m.a * m.plain[:, None, None],
    "centred": lambda m: m.a - m.a.mean(dim=(1, 2, 3), keepdim=True),
    "central difference": lambda m: m.a - 0.7 * m.a.sum((2, 3), keepdim=True) * F.pad(
        torch.ones_like(m.a[:, :, :1, :1]), (1, 1, 1, 1)
    ),
    "normalised": lambda m: F.normalize(m.a.flatten(1), dim=1).view_as(m.a),
    "softmax of two": lambda m: (torch.stack([m.a, m.b]) * torch.softmax(m.v[:2], 0).view(
        2, 1, 1, 1, 1)).sum(0),
    "sizes of parameters": lambda m: m.a.reshape(m.b.shape[0], -1, m.b.size(2), 3) / m.v.shape[0],
    "chunks": lambda m: torch.cat(torch.chunk(m.a, 2, dim=0)[::-1], dim=0),
    "rotated": lambda m: torch.rot90(m.a, 1, (2, 3)),
    "quantised": lambda m: (m.a * 16).round().clamp(-8, 7) / 16,
    "binary": lambda m: m.a.sign() * m.a.abs().mean(dim=(1, 2, 3), keepdim=True),
    "where": lambda m: torch.where(m.mask > 0, m.a, m.b),
    "standardised": lambda m: F.batch_norm(
        m.a.reshape(1, 8, -1), None, None, weight=(m.v * 1.5).view(-1), training=True, momentum=0.0
    ).reshape_as(m.a),
    "standardised in C++": lambda m: torch.batch_norm(
        m.a.reshape(1, 8, -1), m.v, m.v * 0.5, None, None, True, 0.0, 1e-5, False
    ).reshape_as(m.a),
}  # fmt: skip


@pytest.mark.parametrize("name", WEIGHTS)
def test_weight_expressions(name: str) -> None:
    optimized = check(Weighted(WEIGHTS[name]).eval(), SHAPES, layers=1)
    kinds = count(optimized, inputs_of(SHAPES[0], torch.float32)).kinds
    assert set(kinds) == {"convolution", "relu"}


def test_a_random_weight_stays_random() -> None:
    model = Weighted(lambda m: m.a + torch.rand_like(m.a)).eval()
    optimized = fxrep.optimize(model)
    x = torch.randn(SHAPES[0])
    torch.manual_seed(0)
    expected = run(model, (x,))
    torch.manual_seed(0)
    assert distance(run(optimized, (x,)), expected) < 1e-5
    assert not torch.equal(run(optimized, (x,)), expected)


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


def test_a_weight_made_from_the_input_stays() -> None:
    class Dynamic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 6, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight * x.mean()) * 2.0

    check(Dynamic().eval(), SHAPES, layers=1, rewrites=0)


def test_a_buffer_that_the_forward_writes_is_no_constant() -> None:
    class Counting(nn.Module):
        calls: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(6, 8, 3)
            self.register_buffer("calls", torch.zeros(8, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            return self.conv(x) * (self.calls + 1)

    model = Counting().eval()
    optimized = fxrep.optimize(model)
    assert torch.equal(model.calls, torch.zeros(8, 1, 1))
    reference, x = copy.deepcopy(model), torch.randn(SHAPES[0])
    for _ in range(3):
        assert distance(run(optimized, (x,)), run(reference, (x,))) < 1e-6


def test_a_constant_nobody_folds_is_stored_once() -> None:
    """Position tables and the like: stored under the module that computes them."""

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(4, 10))

        def forward(self, x: Tensor) -> Tensor:
            return torch.sigmoid(x) @ self.table.softmax(0).exp()

    model = nn.Sequential(Table(), nn.ReLU()).eval()
    optimized = check(model, ((2, 4), (3, 4)), operations=3)
    names = list(optimized.state_dict())
    assert names == ["0.constant"]


def test_constants_follow_the_model_to_another_dtype() -> None:
    model = nn.Sequential(Weighted(WEIGHTS["sum"])).eval()
    x = torch.randn(SHAPES[0])
    got = run(fxrep.optimize(model).to(torch.bfloat16), (x.bfloat16(),))
    assert got.dtype == torch.bfloat16


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("name", ["einsum", "centred", "binary"])
def test_requires_grad_is_kept(name: str, trains: bool) -> None:
    model = Weighted(WEIGHTS[name]).eval().requires_grad_(trains)
    optimized = fxrep.optimize(model)
    assert {p.requires_grad for p in optimized.parameters()} == {trains}


@pytest.mark.parametrize("kind", ["weight", "spectral", "orthogonal"])
def test_parametrizations(kind: str) -> None:
    conv = nn.Conv2d(6, 8, 3, padding=1)
    parametrize = {
        "weight": torch.nn.utils.parametrizations.weight_norm,
        "spectral": torch.nn.utils.parametrizations.spectral_norm,
        "orthogonal": torch.nn.utils.parametrizations.orthogonal,
    }[kind]
    model = nn.Sequential(parametrize(conv), nn.BatchNorm2d(8), nn.ReLU()).eval()
    check(model, SHAPES, batchnorms=None, layers=None)


@st.composite
def expressions(draw: st.DrawFn) -> Callable[[Any], Tensor]:
    """A random expression over the tensors of `Weighted` with the weight's shape."""
    unary: list[Callable[[Tensor], Tensor]] = [
        torch.tanh, torch.neg, lambda t: t * 0.5, lambda t: t.flip(-1), lambda t: t.contiguous(),
        lambda t: t - t.mean(), lambda t: t.transpose(2, 3), lambda t: 1 - t, lambda t: t.abs(),
        lambda t: t / (t.std((1, 2, 3), keepdim=True) + 1e-3), lambda t: t.clone(),
    ]  # fmt: skip
    binary: list[Callable[[Tensor, Tensor], Tensor]] = [
        torch.add, torch.sub, torch.mul, torch.maximum, lambda a, b: (a + b) / 2,
        lambda a, b: torch.where(a > b, a, b), lambda a, b: torch.lerp(a, b, 0.3),
    ]  # fmt: skip
    leaves: list[Callable[[Any], Tensor]] = [
        lambda m: m.a, lambda m: m.b, lambda m: m.mask, lambda m: m.v.view(-1, 1, 1, 1) * m.a,
        lambda m: m.b * m.plain.reshape(1, 6, 1, 1), lambda m: torch.ones_like(m.a),
    ]  # fmt: skip
    value = draw(st.sampled_from(leaves))
    for _ in range(draw(st.integers(0, 5))):
        if draw(st.booleans()):
            f = draw(st.sampled_from(unary))
            value = lambda m, f=f, v=value: f(v(m))  # noqa: E731
        else:
            g, other = draw(st.sampled_from(binary)), draw(st.sampled_from(leaves))
            value = lambda m, g=g, v=value, o=other: g(v(m), o(m))  # noqa: E731
    return value


@given(weight=expressions())
def test_any_weight_expression(weight: Callable[[Any], Tensor]) -> None:
    check(Weighted(weight).eval(), SHAPES, layers=1)


# --- what the model returns -------------------------------------------------------------------


class Returns(nn.Module):
    """A network that returns a constant beside its result."""

    def __init__(self, constant: Callable[[Any], Any]) -> None:
        super().__init__()
        self.constant = constant
        self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.w = nn.Parameter(torch.arange(4.0))
        self.register_buffer("u", torch.arange(4.0))

    def forward(self, x: Tensor) -> Any:
        return self.bn(self.conv(x)), self.constant(self)


RETURNED: dict[str, Callable[[Any], Any]] = {
    "a product": lambda m: m.w * 2,
    "of a buffer": lambda m: m.u * 2,
    "a view of it": lambda m: (m.w * 2).view(2, 2),
    "a slice of it": lambda m: (m.w * 2)[1:],
    "its parts": lambda m: (m.w * 2).chunk(2),
    "in a list": lambda m: [m.w * 2, m.u + 1],
    "in a dict": lambda m: {"a": (m.w + 1, [m.w * 3])},
    "a copy": lambda m: m.w.clone(),
    "detached": lambda m: m.w.detach() * 2,
    "integers": lambda m: (m.u * 2).long(),
    "stacked": lambda m: torch.stack([m.w * 2, m.u]),
    "a function": lambda m: torch.softmax(m.w, 0),
    "made by the forward": lambda m: torch.arange(4.0) * 2,
}


@pytest.mark.parametrize("examples", [False, True], ids=["", "example inputs"])
@pytest.mark.parametrize("name", RETURNED)
def test_a_returned_constant_is_the_callers(name: str, examples: bool) -> None:
    """The caller may write it, and gradients flow through it."""
    model, x = Returns(RETURNED[name]).eval(), torch.randn(2, 3, 4, 4)
    optimized = fxrep.optimize(model, x if examples else None)
    for _ in range(2):
        expected, got = (tree_leaves(m(x)[1]) for m in (model, optimized))
        for a, b in zip(expected, got, strict=True):
            assert torch.equal(a, b) and a.requires_grad == b.requires_grad
            b.data.mul_(5)
    weights = [dict(m.named_parameters()).get("w") for m in (model, optimized)]
    totals = [sum(t.sum() for t in tree_leaves(m(x)[1])) for m in (model, optimized)]
    if isinstance(totals[0], Tensor) and totals[0].requires_grad:
        for total, weight in zip(totals, weights, strict=True):
            assert weight is not None
            total.backward()
        assert weights[0] is not None and weights[1] is not None
        assert torch.equal(weights[0].grad, weights[1].grad)  # type: ignore[arg-type]
