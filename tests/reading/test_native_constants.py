"""Constants are what the model computes in its own dtype: in float64 a floor takes another step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.parametrize as parametrize
from torch import Tensor, nn
from torch.nn.utils import prune

import fxrep
from fxrep.errors import EquivalenceError
from fxrep.rewriting import validate
from support.blocks_linear import DBB, DBBColumnsFirst, DBBShifted, pad_assigned
from support.check import randomize

Expression = Callable[[Tensor], Tensor]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def standardised(w: Tensor) -> Tensor:
    variance, mean = torch.var_mean(w, (1, 2, 3), keepdim=True)
    return (w - mean) / torch.sqrt(variance + 1e-5)


def fake_quantized(w: Tensor) -> Tensor:
    scale = w.abs().max() / 7
    return torch.clamp(torch.round(w / scale), -8, 7) * scale


def of_largest(w: Tensor) -> Tensor:
    """The largest of each filter; 0.7 and 0.7000000001 are one number in float32."""
    flat = (w * 0.1 + 0.9).flatten(1)
    mask = F.one_hot(flat.argmax(1), flat.shape[1])
    return (flat * mask).view(w.shape)


EXPRESSIONS: dict[str, Expression] = {
    "floor": lambda w: torch.floor(w * 10) / 10,
    "ceil": lambda w: (w * 10).ceil() / 10,
    "round": lambda w: torch.round(w * 5) / 5,
    "trunc": lambda w: (w * 10).trunc() * 0.1,
    "frac": lambda w: torch.frac(w * 10) + w,
    "threshold": lambda w: F.threshold(w, 0.7, 0.0),
    "comparison": lambda w: (w >= 0.7) * w,
    "less": lambda w: w * (w < 0.7),
    "equal": lambda w: (w == 0.7) * w + w * 0.5,
    "not equal": lambda w: torch.where(w != 0.7, w, -w),
    "where": lambda w: torch.where(w * 10 > 6.9999999, w, torch.zeros_like(w)),
    "sign": lambda w: torch.sign(w - w.mean((1, 2, 3), keepdim=True)),
    "sign of a difference": lambda w: torch.sign(w * 10 - 7),
    "heaviside": lambda w: torch.heaviside(w * 10 - 7, w),
    "clamp": lambda w: w.clamp(-0.7, 0.7) // 0.1,
    "floor division": lambda w: (w // 0.1) * 0.1,
    "div by rounding": lambda w: torch.div(w, 0.1, rounding_mode="trunc") * 0.1,
    "remainder": lambda w: torch.remainder(w, 0.1) + w,
    "fmod": lambda w: torch.fmod(w, 0.1) + w,
    "to an integer": lambda w: (w * 10).int() * w.mean(),
    "fake quantize": fake_quantized,
    "fake_quantize": lambda w: torch.fake_quantize_per_tensor_affine(w.float(), 0.1, 0, -8, 7).to(
        w
    ),
    "standardised": standardised,
    "step of standardised": lambda w: torch.round(standardised(w) * 2) / 2,
    "argmax": of_largest,
    "topk": lambda w: w * (w.abs() >= w.abs().flatten().topk(20).values.min()),
    "quantile": lambda w: w * (w >= w.float().flatten().quantile(0.5)),
    "hardtanh": lambda w: torch.floor(F.hardtanh(w) * 10) / 10,
    "sort": lambda w: w * (w.flatten(1).argsort(1).view_as(w) > 10),
    "isclose": lambda w: torch.isclose(w * 10, torch.full_like(w, 7.0), rtol=0, atol=1e-9) * w + w,
    "bucketize": lambda w: w * torch.bucketize(w, w.flatten()[:9].sort().values),
    "nested": lambda w: torch.floor(torch.floor(w * 10) / 10 * 10) / 10,
    "of a product": lambda w: torch.floor((w * 0.1) * 100) / 10,
}


def tenths() -> Tensor:
    """Weights (4, 3, 3, 3) that are tenths, where one rounding decides."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-9, 10, (4, 3, 3, 3), generator=generator) / 10


class Expressed(nn.Module):
    """A convolution by its function, with a weight computed in the forward."""

    def __init__(self, expression: Expression) -> None:
        super().__init__()
        self.expression = expression
        self.w = nn.Parameter(tenths())
        self.b = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Any:
        return self.b(F.conv2d(x, self.expression(self.w)))


class AsModule(nn.Module):
    def __init__(self, expression: Expression) -> None:
        super().__init__()
        self.expression = expression

    def forward(self, w: Tensor) -> Tensor:
        return self.expression(w).to(w.dtype)


def plain() -> tuple[nn.Conv2d, nn.Sequential]:
    conv = nn.Conv2d(3, 4, 3, bias=False)
    conv.weight.data = tenths()
    return conv, nn.Sequential(conv, nn.BatchNorm2d(4))


def parametrized(expression: Expression) -> nn.Module:
    conv, model = plain()
    parametrize.register_parametrization(conv, "weight", AsModule(expression), unsafe=True)
    return model


def pruned(expression: Expression) -> nn.Module:
    """The expression as a mask that torch's own hook applies at each call."""
    conv, model = plain()

    class ByExpression(prune.BasePruningMethod):
        PRUNING_TYPE = "unstructured"

        def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
            return default_mask

        def apply_mask(self, module: nn.Module) -> Tensor:
            masked = super().apply_mask(module)
            return expression(masked).to(masked.dtype)

    ByExpression.apply(conv, "weight")
    return model


KINDS = {"expression": Expressed, "parametrization": parametrized, "pruning": pruned}


def made(kind: str, expression: Expression, dtype: torch.dtype) -> Any:
    model: nn.Module = KINDS[kind](expression)
    return randomize(model).to(dtype).eval()


def error(got: Tensor, expected: Tensor) -> float:
    """The relative error, in epsilons of the dtype."""
    difference = (got.double() - expected.double()).abs().max() / expected.double().abs().max()
    return float(difference) / torch.finfo(expected.dtype).eps


def image(dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, 7, 8, generator=generator).to(dtype)


def batchnorms(model: nn.Module) -> int:
    return sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())


# Rounding the fused weight once, and another order of summation.
MOST = 16


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", EXPRESSIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_is_computed_in_the_dtype_of_the_model(
    kind: str, name: str, dtype: torch.dtype
) -> None:
    x = image(dtype)
    with torch.no_grad():
        model = made(kind, EXPRESSIONS[name], dtype)
        expected = model(x)
        for examples in (None, x):
            for check in (True, False):
                optimized = fxrep.optimize(model, examples, validate=check)
                assert error(optimized(x), expected) < MOST
                assert not batchnorms(optimized), str(fxrep.report(optimized))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", EXPRESSIONS)
def test_the_backend_replays_in_the_dtype_of_the_model(name: str, dtype: torch.dtype) -> None:
    x = image(dtype)
    with torch.no_grad():
        torch._dynamo.reset()
        model = made("expression", EXPRESSIONS[name], dtype)
        compiled = torch.compile(model, backend="fxrep", options={"inner": "eager"})
        for _ in range(3):
            assert error(compiled(x), model(x)) < MOST
            model.w.copy_((model.w * 10 + 1).round() / 10)
            model.b.running_mean.add_(0.5)
    assert fxrep.report(model).rewrites


@pytest.mark.parametrize("freezing", [False, True])
def test_a_step_of_an_optimizer_refreshes_the_constants(freezing: bool) -> None:
    torch._dynamo.reset()
    model = made("expression", EXPRESSIONS["floor"], torch.float32)
    compiled = torch.compile(
        model, backend="fxrep", options={"inner": "eager", "freezing": freezing}
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = image(torch.float32)
    for _ in range(3):
        with torch.no_grad():
            assert error(compiled(x), model(x)) < MOST
            assert fxrep.report(model).rewrites
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()


def test_a_constant_decides_by_its_own_value() -> None:
    """A scale is moved over a max pooling where it is positive, as the model computes it."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c = nn.Conv2d(3, 4, 3)
            self.s = nn.Parameter(torch.tensor([0.7, 0.1, 0.3, 0.5]).view(4, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            scale = torch.floor(self.s * 10) - 6.5
            return F.max_pool2d(self.c(x), 2) * scale

    torch._dynamo.reset()
    x = image(torch.float32)
    with torch.no_grad():
        model = Pooled().eval()
        expected = model(x)
        assert error(fxrep.optimize(model)(x), expected) < MOST
        compiled = torch.compile(model, backend="fxrep", options={"inner": "eager"})
        assert error(compiled(x), expected) < MOST
        model.s.neg_()  # the decision rests on the content of s, through the constant
        assert error(compiled(x), model(x)) < MOST


def test_the_comparison_of_whole_models_sees_another_step() -> None:
    model = made("expression", EXPRESSIONS["comparison"], torch.float32)
    x = image(torch.float32)
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        exact = EXPRESSIONS["comparison"](wrong.w.double())
        wrong.w.copy_(exact.float())
        wrong.expression = lambda w: w
        optimized = fxrep.optimize(model)
        validate.compare(model, optimized, x, fxrep.report(optimized))
        with pytest.raises(EquivalenceError, match="differs by"):
            validate.compare(model, wrong, x, fxrep.report(optimized))


def test_the_comparison_allows_roundings_that_grow() -> None:
    class Chaotic(nn.Module):
        """Thirty steps of the logistic map: float32 is far from float64."""

        def __init__(self) -> None:
            super().__init__()
            self.c = nn.Conv2d(3, 3, 1)
            self.b = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.sigmoid(self.b(self.c(x)))
            for _ in range(30):
                y = 3.9 * y * (1 - y)
            return y

    model = randomize(Chaotic().eval())
    assert not batchnorms(fxrep.optimize(model, image(torch.float32)))


# --- borders --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@pytest.mark.parametrize("kind", [DBB, DBBColumnsFirst, DBBShifted])
def test_a_border_is_compared_in_real_arithmetic(kind: type[DBB], dtype: torch.dtype) -> None:
    """The model rounds the value that it pads with; what the layers before give for zeros is exact.

    Both are one value.
    """
    model = randomize(kind(3, 4).to(dtype).eval())
    x = image(dtype)
    with torch.no_grad():
        expected = model(x)
        for examples in (None, x):
            optimized = fxrep.optimize(model, examples)
            assert error(optimized(x), expected) < MOST
            assert sum(isinstance(m, nn.Conv2d) for m in optimized.modules()) == 1


class Padded(nn.Module):
    """Pads with an expression of the bias that the layer before adds."""

    def __init__(self, bias: float, expression: Expression) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3)
        self.first.bias = nn.Parameter(torch.full((4,), bias))
        self.expression = expression

    def forward(self, x: Tensor) -> Any:
        value = self.expression(self.first.bias)  # type: ignore[arg-type]
        return self.second(pad_assigned(self.first(x), value, 1))


BORDERS: list[tuple[float, Expression]] = [
    (0.7, lambda b: torch.floor(b * 10) / 10),
    (0.75, lambda b: torch.floor(b * 8) / 8),
    (0.3, lambda b: torch.floor(b * 1000) / 1000),
    (0.58, lambda b: torch.floor(b * 100) / 100),
    (0.7, lambda b: (b + 1e4) - 1e4),  # in float64 this is b, in float32 another value
    (0.7, lambda b: torch.where(b + 1e9 > 1e9, b, -b)),
    (0.7, lambda b: b * (b * 3e4 + 1 - b * 3e4)),
]


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@pytest.mark.parametrize(("bias", "expression"), BORDERS)
def test_a_border_that_is_another_value_in_float64(
    bias: float, expression: Expression, dtype: torch.dtype
) -> None:
    model = Padded(bias, expression).to(dtype).eval()
    x = image(dtype)
    with torch.no_grad():
        expected = model(x)
        assert error(fxrep.optimize(model)(x), expected) < MOST


# --- parametrizations that are no constants -------------------------------------------------------


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("n", torch.ones(()))

    def forward(self, w: Tensor) -> Tensor:
        self.n.mul_(1.5)
        return w * self.n


class CountsInPython(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.n = 1

    def forward(self, w: Tensor) -> Tensor:
        self.n += 1
        return w * self.n


class Noise(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w + torch.randn_like(w)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [(Counts, "keeps a state"), (CountsInPython, "keeps a state"), (Noise, "draws numbers")],
)
@pytest.mark.parametrize("examples", [None, image(torch.float32)], ids=["", "examples"])
def test_a_parametrization_with_a_state_is_no_constant(
    kind: Any, reason: str, examples: Tensor | None
) -> None:
    def make() -> nn.Module:
        conv, model = plain()
        parametrize.register_parametrization(conv, "weight", kind(), unsafe=True)
        return randomize(model.eval())

    with torch.no_grad():
        model, x = make(), image(torch.float32)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        state = torch.get_rng_state()
        optimized, reference = fxrep.optimize(model, examples), copy.deepcopy(model)
        assert torch.equal(state, torch.get_rng_state())
        assert all(torch.equal(before[name], v) for name, v in model.state_dict().items())
        for seed in range(3):
            torch.manual_seed(seed)
            got = optimized(x)
            torch.manual_seed(seed)
            assert torch.equal(got, reference(x))
    assert any(reason in skip.reason for skip in fxrep.report(optimized).skipped)
