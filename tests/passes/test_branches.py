"""Sums of branches become one layer for each source, and only where that is exact."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fxrep
from support.check import assert_equal, check, count, inputs_of, randomize
from support.models import IMAGE, Body, Two, conv, conv_bn

CONV: dict[int, Any] = {0: nn.Linear, 1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORM = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
SHAPES = ((2, 8, 9, 10), (1, 8, 12, 7))


class Sum(nn.Module):
    """What `add` makes of the branches' outputs."""

    def __init__(self, *branches: nn.Module, add: Callable[..., Any] = sum, **parts: Any) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.add = add
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.add([branch(x) for branch in self.branches])


# --- what merges ---------------------------------------------------------------------------------

MERGES: dict[str, Callable[[], Sequence[nn.Module]]] = {
    "3x3 + 1x1": lambda: [conv(padding=1), conv(kernel=1)],
    "5x5 + 3x3 + 1x1, no bias": lambda: [
        conv(kernel=k, padding=k // 2, bias=False) for k in (5, 3, 1)
    ],
    "5x5 + 3x1 + 1x3": lambda: [
        conv(kernel=5, padding=2),
        conv(kernel=(3, 1), padding=(1, 0)), conv(kernel=(1, 3), padding=(0, 1)),
    ],
    "unpadded with a larger one": lambda: [conv(), conv(kernel=5, padding=1)],
    "even kernels, same padding": lambda: [
        conv(kernel=4, padding="same"), conv(kernel=2, padding="same"),
    ],
    "even and odd kernels": lambda: [conv(kernel=4, padding=1), conv(kernel=2, padding=0)],
    "stride 2": lambda: [conv(padding=1, stride=2), conv(kernel=1, stride=2)],
    "stride (1, 3)": lambda: [
        conv(kernel=5, padding=2, stride=(1, 3)), conv(padding=1, stride=(1, 3)),
    ],
    "dilated and not": lambda: [
        conv(kernel=7, padding=3), conv(padding=2, dilation=2), conv(padding=3, dilation=3),
    ],
    "equally dilated": lambda: [
        conv(kernel=5, padding=4, dilation=2), conv(padding=2, dilation=2), conv(kernel=1),
    ],
    "groups in groups": lambda: [
        conv(padding=1, groups=2), conv(kernel=1, groups=4), conv(kernel=1, groups=8),
    ],
    "dense and depthwise": lambda: [conv(padding=1), conv(kernel=1, groups=8)],
    "depthwise with identity": lambda: [conv(padding=1, groups=8), nn.Identity()],
    "channel multiplier": lambda: [
        conv(8, 16, padding=1, groups=8), conv(8, 16, 1, groups=8),
    ],
    "identity twice": lambda: [conv(padding=1), nn.Identity(), nn.Dropout()],
    "BatchNorms only beside one conv": lambda: [
        nn.BatchNorm2d(8), conv_bn(8, 8, 3, padding=1), nn.BatchNorm2d(8),
    ],
    "reflected": lambda: [
        conv(kernel=5, padding=2, padding_mode="reflect"),
        conv(padding=1, padding_mode="reflect"), conv(kernel=1),
    ],
    "circular with pointwise and identity": lambda: [
        conv(padding=1, padding_mode="circular"), conv_bn(8, 8, 1), nn.Identity(),
    ],
    "transposed": lambda: [
        nn.ConvTranspose2d(8, 8, 4, stride=2, padding=1, groups=2),
        nn.ConvTranspose2d(8, 8, 2, stride=2, groups=2),
    ],
    "conv of conv beside identity": lambda: [
        nn.Sequential(conv(padding=1, bias=False), conv(kernel=1)), nn.Identity(),
    ],
}  # fmt: skip


@pytest.mark.parametrize("cost", ["macs", "always"])
@pytest.mark.parametrize("name", MERGES)
def test_merges(name: str, cost: str) -> None:
    check(Sum(*MERGES[name]()).eval(), SHAPES, layers=1, operations=None, cost=cost)


@pytest.mark.parametrize("name", MERGES)
def test_merges_between_batchnorms(name: str) -> None:
    branches = MERGES[name]()
    with torch.no_grad():
        outputs = [branch.eval()(torch.randn(SHAPES[0])).shape[1] for branch in branches]
    model = nn.Sequential(
        Sum(*(nn.Sequential(b, nn.BatchNorm2d(c)) for b, c in zip(branches, outputs, strict=True))),
        nn.BatchNorm2d(outputs[0]), nn.ReLU(),
    )  # fmt: skip
    check(model.eval(), SHAPES, layers=1)


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_every_rank(rank: int) -> None:
    how = [{"kernel_size": k, "padding": k // 2} if rank else {} for k in (3, 1)]
    model = Sum(*(CONV[rank](6, 6, **h) for h in how), nn.Identity()).eval()
    at = tuple((n, 6, *(size + i for i in range(rank))) for n, size in ((2, 6), (1, 5)))
    check(model, at, layers=1)


def _in_place(parts: list[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total += part
    return total


def _methods(parts: list[Tensor]) -> Tensor:
    first, *rest = parts
    for part in rest:
        first = first.add_(part)
    return first


def _pairs(parts: list[Tensor]) -> Tensor:
    left, right = parts[: len(parts) // 2], parts[len(parts) // 2 :]
    if not left:
        return right[0]
    return torch.add(_pairs(left), other=_pairs(right))


ADDS: dict[str, Callable[[list[Tensor]], Any]] = {
    "sum": sum,
    "sum from a tensor of zeros": lambda parts: sum(parts, 0.0),
    "operator": lambda p: p[0] + p[1] + p[2],
    "reversed": lambda p: p[2] + (p[1] + p[0]),
    "torch.add": lambda p: torch.add(torch.add(p[0], p[1]), p[2]),
    "keywords": lambda p: torch.add(input=p[0] + p[1], other=p[2]),
    "methods": lambda p: p[0].add(p[1]).__radd__(p[2]),
    "in place": _in_place,
    "methods in place": _methods,
    "iadd": lambda p: operator.iadd(operator.iadd(p[0], p[2]), p[1]),
    "nested": _pairs,
    "minus": lambda p: p[0] - p[1] - p[2],
    "minus reversed": lambda p: torch.rsub(p[0], p[1]).sub(p[2]),
    "minus the whole": lambda p: -(p[0] - (p[1] - p[2])),
    "alpha": lambda p: torch.add(torch.sub(p[0], p[1], alpha=0.5), p[2], alpha=-2),
    "alpha in place": lambda p: p[0].add_(p[1], alpha=3).sub_(p[2], alpha=0.25),
    "coefficients": lambda p: 0.5 * p[0] + p[1] * 2 - p[2] / 3,
    "halved": lambda p: (p[0] + p[1] + p[2]) / 2,
    "constants between": lambda p: (1 + p[0]) + (p[1] - 2.5) + p[2] * -1.0,
    "one branch twice": lambda p: p[0] + p[1] + p[2] + p[0],
    "a sum with itself": lambda p: operator.add(*[p[0] + p[1] + p[2]] * 2),
    "cancelling": lambda p: p[0] + p[1] - p[2] + p[2],
    "through dropout": lambda p: F.dropout(p[0] + p[1], 0.1, False).contiguous() + p[2],
}


@pytest.mark.parametrize("name", ADDS)
def test_every_spelling(name: str) -> None:
    branches = conv_bn(8, 8, 3, padding=1), conv(kernel=1), nn.BatchNorm2d(8)
    model = nn.Sequential(Sum(*branches, add=ADDS[name]), nn.BatchNorm2d(8), nn.ReLU())
    optimized = check(model.eval(), SHAPES, layers=1)
    kinds = count(optimized, inputs_of(SHAPES[0], torch.float32)).kinds
    assert set(kinds) == {"convolution", "relu"}


def test_learned_coefficients() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        out = m.alpha * m.a(x) + m.gamma * (m.b(x) - m.norm(x)) + x * m.gamma.abs()
        return torch.relu(out / m.beta - m.shift)

    model = Body(
        forward, a=conv(padding=1), b=conv(kernel=1), norm=nn.BatchNorm2d(8),
        alpha=nn.Parameter(torch.tensor(0.3)), gamma=nn.Parameter(torch.randn(8, 1, 1)),
        beta=nn.Parameter(torch.tensor([2.0])), shift=torch.randn(1, 8, 1, 1),
    )  # fmt: skip
    check(model.eval(), SHAPES, layers=1, operations=2)


# --- several sources -----------------------------------------------------------------------------


def _regrouped(m: Any, x: Tensor, h: Tensor) -> Tensor:
    return m.a(x) + m.c(h) + m.b(x) + m.d(h)


def _with_identities(m: Any, x: Tensor, h: Tensor) -> Tensor:
    return torch.relu((m.a(x) + h) + (x + m.c(h)))


def _third(m: Any, x: Tensor, h: Tensor) -> Tensor:
    return m.norm(m.a(x) + torch.sigmoid(x) + m.b(x))


def _scaled_sources(m: Any, x: Tensor, h: Tensor) -> Tensor:
    return 2 * (m.a(x) - m.c(h)) - (m.b(x) + m.d(h)) * 0.5


def _two_roots(m: Any, x: Tensor, h: Tensor) -> Tensor:
    first = m.a(x) + m.b(x)
    return torch.relu(first) + m.c(h) + m.d(h)


SOURCES = {
    "regrouped": (_regrouped, 2),
    "identities of both": (_with_identities, 2),
    "scaled": (_scaled_sources, 2),
    "roots below roots": (_two_roots, 2),
}


@pytest.mark.parametrize("name", SOURCES)
def test_sums_are_regrouped_by_source(name: str) -> None:
    forward, layers = SOURCES[name]
    parts = {"a": conv(padding=1), "b": conv(kernel=1), "c": conv(padding=1), "d": conv(kernel=1)}
    shapes = tuple((shape, shape) for shape in SHAPES)
    check(Two(forward, **parts).eval(), shapes, layers=layers)


def test_a_sum_with_something_not_linear() -> None:
    """A BatchNorm over a sum that keeps a foreign summand: the convs merge, the norm may stay."""
    model = Two(_third, a=conv(padding=1), b=conv(kernel=1), norm=nn.BatchNorm2d(8)).eval()
    shapes = tuple((shape, shape) for shape in SHAPES)
    check(model, shapes, layers=1, batchnorms=None)


def test_residual_of_a_whole_block_keeps_its_conv() -> None:
    """x + BN(conv(relu(BN(conv x)))): two sources, two layers, the addition stays."""
    model = Body(
        lambda m, x: torch.relu(x + m.second(m.first(x).relu())),
        first=conv_bn(8, 8, 3, padding=1),
        second=conv_bn(8, 8, 3, padding=1),
    ).eval()
    check(model, SHAPES, layers=2, operations=5)


# --- what stays, and why -------------------------------------------------------------------------


def _read_elsewhere(m: Any, x: Tensor) -> Any:
    a = m.a(x)
    return a + m.b(x), torch.sigmoid(a)


def _written_between(m: Any, x: Tensor) -> Tensor:
    x = torch.exp(x)
    a = m.a(x)
    x.sqrt_()
    return a + m.b(x)


def _written_after_view(m: Any, x: Tensor) -> Any:
    a = m.a(x)
    v = a[:, :2]
    a += m.b(x)
    return a, v.relu()


def _old_sum_kept(m: Any, x: Tensor) -> Any:
    a, b = m.a(x), m.b(x)
    z = a + b
    a += 1.0
    return z * a


def _accumulated_alias(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    z = y
    z += m.b(x)
    return y + z


def _different_inputs_size(m: Any, x: Tensor) -> Tensor:
    return m.a(x) + m.b(F.max_pool2d(x, 1))


SMALL = ((2, 8, 3, 3), (3, 8, 3, 3), (1, 8, 3, 3))
STAYS: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, Any]]] = {
    "different strides": (
        lambda: Sum(conv(padding=1, stride=2), conv(kernel=1, stride=1)),
        ((2, 8, 1, 1), (3, 8, 1, 1)), {"layers": 2, "reasons": ["differ in stride"]},
    ),
    "different sizes that broadcast": (
        lambda: Sum(conv(padding=1), conv()),
        SMALL, {"layers": 2, "reasons": ["different output sizes"]},
    ),
    "a branch of one pixel": (
        lambda: Sum(
            conv(padding=1),
            conv(kernel=(3, 1), padding=(1, 0)), conv(kernel=(5, 1), padding=(1, 0)),
        ),
        ((2, 8, 3, 4), (1, 8, 3, 5)), {"layers": 2, "reasons": ["different output sizes"]},
    ),
    "sizes equal for even inputs only": (
        lambda: Sum(conv(kernel=2, stride=2), conv(kernel=1, stride=2)),
        ((2, 8, 8, 8), (2, 8, 3, 3), (1, 8, 6, 3)),
        {"layers": 2, "reasons": ["different output sizes"]},
    ),
    "pooled to one pixel": (
        lambda: Sum(conv(padding=1), nn.Sequential(nn.AdaptiveAvgPool2d(1), conv(kernel=1))),
        None, {"layers": 2},
    ),
    "one channel that broadcasts": (
        lambda: Sum(conv(padding=1), conv(8, 1, 3, padding=1)),
        None, {"layers": 2, "reasons": ["different channels broadcast"]},
    ),
    "an identity of one channel": (
        lambda: Sum(conv(1, 8, 3, padding=1), nn.Identity()),
        ((2, 1, 9, 9), (1, 1, 7, 8)), {"layers": 1, "reasons": ["8 channels is added to one of 1"]},
    ),
    "ACNet's thin branches alone": (
        lambda: Sum(conv(kernel=(1, 3), padding=(0, 1)), conv(kernel=(3, 1), padding=(1, 0))),
        None, {"layers": 2, "reasons": ["not worth it: MACs"]},
    ),
    "dilations without a common grid": (
        lambda: Sum(conv(padding=2, dilation=2), conv(padding=3, dilation=3)),
        None, {"layers": 2, "reasons": ["not worth it: MACs"]},
    ),
    "groups that would densify": (
        lambda: Sum(conv(12, 12, 3, padding=1, groups=3), conv(12, 12, 3, padding=1, groups=4)),
        ((2, 12, 9, 9), (1, 12, 8, 7)), {"layers": 2, "reasons": ["not worth it: MACs"]},
    ),
    "different padding modes": (
        lambda: Sum(conv(padding=1), conv(padding=1, padding_mode="reflect")),
        None, {"layers": 2, "reasons": ["padding mode: reflect and zeros"]},
    ),
    "transposed and not": (
        lambda: Sum(nn.ConvTranspose2d(8, 8, 3, padding=1), conv(padding=1)),
        None, {"layers": 2, "reasons": ["transposed"]},
    ),
    "transposed with other output sizes": (
        lambda: Sum(
            nn.ConvTranspose2d(8, 8, 3, stride=2), nn.ConvTranspose2d(8, 8, 1, stride=2)
        ),
        ((2, 8, 1, 1), (1, 8, 1, 1)), {"layers": 2, "reasons": ["different output sizes"]},
    ),
    "an inner value read elsewhere": (
        lambda: Body(_read_elsewhere, a=conv(padding=1), b=conv(kernel=1)),
        None, {"layers": 2, "rewrites": 0},
    ),
    "the source written between its readers": (
        lambda: Body(_written_between, a=conv(padding=1), b=conv(kernel=1)),
        None, {"layers": 2, "rewrites": 0},
    ),
    "a view of a branch kept": (
        lambda: Body(_written_after_view, a=conv(padding=1), b=conv(kernel=1)),
        None, {"layers": 2, "rewrites": 0},
    ),
    "a branch written after the sum": (
        lambda: Body(_old_sum_kept, a=conv(padding=1), b=conv(kernel=1)), None, {},
    ),
    "a branch under two names": (
        lambda: Body(_accumulated_alias, a=conv(padding=1), b=conv(kernel=1)), None, {},
    ),
    "sources of equal size that are not one": (
        lambda: Body(_different_inputs_size, a=conv(padding=1), b=conv(kernel=1)),
        None, {"layers": 2, "rewrites": 0},
    ),
    "biased 1x1 before a padded 3x3": (
        lambda: Sum(
            nn.Sequential(conv(8, 8, 1), conv(8, 8, 3, padding=1, groups=8)), nn.Identity()
        ), None, {"layers": 2, "reasons": ["inner bias; correcting its border is not worth it"]},
    ),
    "padded 3x3 after padded 3x3": (
        lambda: Sum(
            nn.Sequential(conv(8, 64, 3, padding=1, bias=False), conv(64, 8, 3, padding=1)),
            nn.Identity(),
        ), None, {"layers": 2},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STAYS)
def test_stays_and_says_why(name: str) -> None:
    make, shapes, expected = STAYS[name]
    check(make().eval(), shapes or SHAPES, **expected)


@pytest.mark.parametrize("name", STAYS)
def test_what_is_not_legal_stays_without_the_cost_rule(name: str) -> None:
    make, shapes, expected = STAYS[name]
    if any("not worth it" in reason for reason in expected.get("reasons", ())):
        expected = {"layers": 1}
    if name == "one channel that broadcasts":
        expected = {"layers": 1}  # as siblings: computed together, then added
    how = {**expected, "more_work": True, "rewrites": None}
    check(make().eval(), shapes or SHAPES, cost="always", example_inputs=True, **how)


@pytest.mark.parametrize("name", STAYS)
def test_the_answer_does_not_hang_on_validation(name: str) -> None:
    """What the algebra forbids must be declined by it, not caught by the check on the spot."""
    make, shapes, _ = STAYS[name]
    check(make().eval(), shapes or SHAPES, validate=False, cost="always", more_work=True)


def test_a_wide_expansion_is_not_taken_over_the_border() -> None:
    """C -> 8C -> C tempts: one conv would save most of the work, and be wrong at the border."""
    model = nn.Sequential(
        conv(8, 64, 1), conv(64, 64, 3, padding=1, groups=64), conv(64, 8, 1)
    ).eval()
    check(model, SHAPES, batchnorms=None, cost="always", more_work=True)


def test_branches_below_a_shape_read() -> None:
    """timm's layers read the rank of inner values and assert it: reads of metadata do not count."""

    def forward(m: Any, x: Tensor) -> Tensor:
        a = m.a(x)
        torch._assert(a.ndim == 4, "four dimensions")
        b = m.b(x)
        return (a + b).reshape(b.shape[0], -1, b.size(2) * b.size(3))

    model = Body(forward, a=conv(padding=1), b=conv(kernel=1)).eval()
    check(model, SHAPES, layers=1)


def test_a_block_called_twice_merges_once() -> None:
    block = nn.Sequential(
        Sum(conv_bn(8, 8, 3, padding=1), conv_bn(8, 8, 1), nn.BatchNorm2d(8)), nn.ReLU()
    )
    model = Body(lambda m, x: m.block(m.block(x)), block=block).eval()
    optimized = check(model, SHAPES, layers=2)
    assert sum(isinstance(m, nn.Conv2d) for m in optimized.modules()) == 1
    assert [r.pass_name for r in fxrep.report(optimized).rewrites].count("branches") == 1


def test_a_shared_branch_in_two_sums_stays() -> None:
    model = Body(
        lambda m, x: torch.relu(m.a(x) + m.b(x)) + torch.sigmoid(m.a(x) + m.c(x)),
        a=conv(padding=1), b=conv(kernel=1), c=conv(kernel=1),
    ).eval()  # fmt: skip
    check(model, SHAPES, batchnorms=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_half_precision_and_layout_are_kept(dtype: torch.dtype, layout: Any) -> None:
    model = Sum(conv_bn(8, 8, 3, padding=1), conv_bn(8, 8, 1), nn.BatchNorm2d(8)).eval()
    randomize(model)
    half = model.to(dtype=dtype, memory_format=layout).requires_grad_(False)
    optimized = fxrep.optimize(half)
    (layer,) = [m for m in optimized.modules() if isinstance(m, nn.Conv2d)]
    assert layer.weight.dtype == dtype and not layer.weight.requires_grad
    assert layer.weight.is_contiguous(memory_format=layout)
    x = torch.randn(1, 8, 9, 9).to(dtype)
    with torch.no_grad():
        expected, got = half.double()(x.double()), optimized(x)
    scale = float(expected.abs().max())
    assert float((got.double() - expected).abs().max()) < 20 * torch.finfo(dtype).eps * scale


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
    report = assert_equal(ReadsPadded(), IMAGE, cost="always", validate=validate)
    assert "branches" in {rewrite.pass_name for rewrite in report.rewrites}


# --- over all geometries -------------------------------------------------------------------------


@st.composite
def sums(draw: st.DrawFn, rank: int) -> tuple[nn.Module, int, bool]:
    """Branches over one source whose sizes agree, and whether one layer can hold them."""
    transposed = rank > 0 and draw(st.integers(0, 4)) == 0
    groups = draw(st.sampled_from([1, 2, 3]))
    inputs = groups * draw(st.integers(1, 3))
    keeps = draw(st.booleans())
    outputs = inputs if keeps else groups * draw(st.integers(1, 3))
    strides = tuple(draw(st.integers(1, 2 if keeps else 3)) for _ in range(rank))
    if keeps and draw(st.booleans()):
        strides = (1,) * rank
    excess = [draw(st.sampled_from([0, 0, 0, -1, -2])) for _ in range(rank)]
    branches: list[nn.Module] = []
    for _ in range(draw(st.integers(2, 4))):
        kernel, dilation, padding = [], [], []
        for e in excess:
            choices = [
                (k, d, (e + d * (k - 1)) // 2)
                for k in range(1, 6)
                for d in range(1, 4)
                if e + d * (k - 1) >= 0 and (e + d * (k - 1)) % 2 == 0
            ]
            k, d, p = draw(st.sampled_from(choices))
            kernel.append(k)
            dilation.append(d)
            padding.append(p)
        g = draw(st.sampled_from([g for g in range(1, groups + 1) if groups % g == 0]))
        how: dict[str, Any] = {"bias": draw(st.booleans())}
        if rank:
            how |= {
                "kernel_size": tuple(kernel), "dilation": tuple(dilation), "stride": strides,
                "padding": tuple(padding), "groups": g,
            }  # fmt: skip
        layer: nn.Module = (TRANSPOSED if transposed else CONV)[rank](inputs, outputs, **how)
        if draw(st.booleans()):
            layer = nn.Sequential(layer, NORM[rank](outputs))
        branches.append(layer)
    same = inputs == outputs and not transposed and not any(excess) and math.prod(strides) == 1
    if same and draw(st.booleans()):
        branches.append(draw(st.sampled_from([nn.Identity(), NORM[rank](inputs)])))
    branches = draw(st.permutations(branches))
    name = draw(st.sampled_from(["sum", "in place", "nested", "methods in place"]))
    # Added to in place, an identity first means that the model writes its input: that stays.
    pure = "in place" not in name or not isinstance(branches[0], nn.Identity)
    model = nn.Sequential(
        Sum(*branches, add=ADDS[name]), *([NORM[rank](outputs)] * draw(st.integers(0, 1)))
    )
    return model, inputs, pure


@given(data=st.data(), rank=st.integers(0, 3))
def test_any_sum(data: st.DataObject, rank: int) -> None:
    model, inputs, pure = data.draw(sums(rank))
    at = tuple((n, inputs, *(size + i for i in range(rank))) for n, size in ((2, 6), (1, 7)))
    check(model.eval(), at, batchnorms=0 if pure else None, example_inputs=not rank)


@given(data=st.data(), rank=st.integers(0, 2), validate=st.booleans())
def test_any_sum_becomes_one_layer_when_asked(
    data: st.DataObject, rank: int, validate: bool
) -> None:
    model, inputs, pure = data.draw(sums(rank))
    at = tuple((n, inputs, *(size + i for i in range(rank))) for n, size in ((2, 6), (1, 7)))
    check(
        model.eval(), at, layers=1 if pure else None, batchnorms=0 if pure else None,
        example_inputs=not rank,
        cost="always", more_work=True, validate=validate,
    )  # fmt: skip
