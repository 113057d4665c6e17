"""What a concatenation of channels joins becomes one layer for each source, where that is exact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from support.check import assert_equal, check, count, inputs_of
from support.models import IMAGE, Body, Two, call, conv

CONV: dict[int, Any] = {0: nn.Linear, 1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
SHAPES = ((2, 8, 5, 6), (1, 8, 4, 3), (1, 8, 2, 1), (1, 8, 1, 7))
BOTH = tuple((shape, shape) for shape in SHAPES)

Forward = Callable[..., Any]


def parts(**how: Any) -> dict[str, Any]:
    """Padded convolutions a, b, c of 8 channels to 4, 6 and 2, and what may follow all of them."""
    how = {"padding": 1, **how}
    outputs = {"a": 4, "b": 6, "c": 2}
    layers = {name: conv(8, n, **how) for name, n in outputs.items()}
    return {**layers, "norm": nn.BatchNorm2d(12), "gain": nn.Parameter(torch.randn(12, 1, 1))}


# --- one source ----------------------------------------------------------------------------------

JOINS: dict[str, Callable[[Any], Tensor]] = {
    "cat": lambda xs: torch.cat(xs, 1),
    "cat, keywords": lambda xs: torch.cat(dim=1, tensors=tuple(xs)),
    "cat from the end": lambda xs: torch.cat(xs, dim=-3),
    "concat": lambda xs: torch.concat(xs, 1),
    "concat from the end": lambda xs: torch.concat(tuple(xs), -3),
    "concatenate": lambda xs: torch.concatenate(xs, 1),
    "concatenate from the end": lambda xs: torch.concatenate(xs, dim=-3),
    "cat of cats": lambda xs: torch.cat([xs[0], torch.cat(xs[1:], -3)], 1),
}
AFTER: dict[str, Forward] = {
    "nothing": lambda m, y: y,
    "norm": lambda m, y: m.norm(y),
    "scale and shift": lambda m, y: 2 * (y * m.gain) - 0.5,
    "in place": lambda m, y: y.mul_(m.gain).add_(1),
}


@pytest.mark.parametrize("after", AFTER)
@pytest.mark.parametrize("join", JOINS)
def test_layers_of_one_source_become_one(join: str, after: str) -> None:
    model = Body(lambda m, x: AFTER[after](m, JOINS[join]([m.a(x), m.b(x), m.c(x)])), **parts())
    check(model.eval(), SHAPES, layers=1, operations=1)


@pytest.mark.parametrize("how", [
    {"stride": 2}, {"padding": 0, "kernel": 1}, {"padding": 2, "dilation": 2}, {"bias": False},
    {"padding_mode": "circular"}, {"padding": (1, 0), "kernel": (3, 1)},
])  # fmt: skip
def test_every_geometry(how: dict[str, Any]) -> None:
    model = Body(lambda m, x: m.norm(torch.cat([m.a(x), m.b(x), m.c(x)], 1)), **parts(**how))
    check(model.eval(), SHAPES[:2], layers=1)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_every_rank(rank: int) -> None:
    how = {"kernel_size": 3, "padding": 1}
    model = Body(
        lambda m, x: m.norm(torch.cat([m.a(x), m.b(x)], 1)),
        a=CONV[rank](4, 3, **how), b=CONV[rank](4, 2, **how, bias=False), norm=NORM[rank](5),
    ).eval()  # fmt: skip
    check(model, tuple((1, 4, *(n + i for i in range(rank))) for n in range(1, 5)), layers=1)


def test_linear_layers_on_the_last_dimension() -> None:
    parts = {"a": nn.Linear(8, 3), "b": nn.Linear(8, 5, bias=False)}
    model = Body(lambda m, x: torch.cat([m.a(x), m.b(x)], -1), **parts).eval()
    check(model, ((2, 5, 8), (1, 1, 8), (3, 8, 8)), layers=1, example_inputs=True)


def test_kernels_of_different_sizes_are_padded_when_asked() -> None:
    layers = {"a": conv(8, 4, 3, padding=1), "b": conv(8, 4, 1), "norm": nn.BatchNorm2d(8)}
    model = Body(lambda m, x: m.norm(torch.cat([m.a(x), m.b(x)], 1)), **layers).eval()
    check(model, SHAPES, layers=1, cost="always", more_work=True)
    check(model, SHAPES, layers=2, reasons=["not worth it: MACs"])


# --- several sources -----------------------------------------------------------------------------

# Forwards of x and h: how many layers are left.
SOURCES: dict[str, tuple[Forward, int]] = {
    "norm": (lambda m, x, h: m.norm(torch.cat([m.a(x), m.b(h), m.c(h.tanh())], 1)), 3),
    "scale": (lambda m, x, h: torch.cat([m.a(x), m.b(h), m.c(h.tanh())], 1) * m.gain + 1, 3),
    "a run of one source": (
        lambda m, x, h: m.norm(torch.cat([m.a(x), m.c(h), m.b(h)], 1)), 2,
    ),
    "a run of one source, alone": (
        lambda m, x, h: torch.cat([m.a(x), m.c(h), m.b(h)], 1), 2,
    ),
    "a run beside what is no layer": (
        lambda m, x, h: torch.cat([h.relu(), m.a(h), m.b(h), m.c(h), h.sigmoid()], 1), 1,
    ),
    "two runs": (lambda m, x, h: torch.cat([m.a(x), m.b(x), m.c(h), m.a(h)], 1), 2),
    "mixed into a 1x1": (lambda m, x, h: m.d(torch.cat([m.e(x), m.e(h)], 1)), 2),
}  # fmt: skip


@pytest.mark.parametrize("name", SOURCES)
def test_each_source_keeps_one_layer(name: str) -> None:
    forward, layers = SOURCES[name]
    more = {"e": conv(8, 64, padding=1), "d": conv(128, 8, 1)}
    check(Two(forward, **parts(), **more).eval(), BOTH, layers=layers)


IDENTITIES: dict[str, tuple[Forward, int]] = {
    "x beside it": (lambda m, x: torch.cat([m.a(x), x, m.b(x), m.c(x)], 1), 3),
    "x behind a run": (lambda m, x: torch.cat([m.a(x), m.b(x), m.c(x), x], 1), 1),
    "x in front of a run": (lambda m, x: torch.cat([x, m.a(x), m.b(x), m.c(x)], -3), 1),
    "x twice": (lambda m, x: torch.cat([x, m.a(x), m.b(x), x], 1), 1),
    "a pooling of x": (lambda m, x: torch.cat([F.avg_pool2d(x, 3, 1, 1), m.a(x), m.b(x)], 1), 1),
    "a maximum of x": (lambda m, x: torch.cat([m.a(x), m.b(x), F.max_pool2d(x, 3, 1, 1)], 1), 1),
    "x into a wide 1x1": (lambda m, x: m.f(torch.cat([m.e(x), x], 1)), 1),
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_identity_operands(name: str) -> None:
    forward, most = IDENTITIES[name]
    more = {"e": conv(8, 64, padding=1), "f": conv(72, 8, 1)}
    model = Body(forward, **parts(), **more).eval()
    optimized = check(model, SHAPES)
    left = count(optimized, inputs_of(SHAPES[0], torch.float32)).layers
    assert left <= most, f"{left} layers"


def test_a_run_is_found_whatever_the_order_of_the_operands() -> None:
    """Inception: with the pooling in front of them the two layers are merged."""
    forward = IDENTITIES["a pooling of x"][0]
    check(Body(forward, **parts()).eval(), SHAPES, layers=1)
    last = lambda m, x: torch.cat([m.a(x), m.b(x), F.avg_pool2d(x, 3, 1, 1)], 1)  # noqa: E731
    check(Body(last, **parts()).eval(), SHAPES, layers=1)


# --- chunks of one value -------------------------------------------------------------------------


def _pairs(*layers: str) -> Callable[[Any, Sequence[Tensor]], Tensor]:
    return lambda m, xs: torch.cat(
        [getattr(m, name)(x) for name, x in zip(layers, xs, strict=True)], 1
    )


GROUPED: dict[str, Forward] = {
    "chunk": lambda m, x: _pairs("a", "b")(m, x.chunk(2, 1)),
    "torch.chunk from the end": lambda m, x: _pairs("a", "b")(m, torch.chunk(x, 2, dim=-3)),
    "split": lambda m, x: (lambda xs: _pairs("b", "a")(m, (xs[0], xs[1])))(x.split(4, 1)),
    "split with sizes": lambda m, x: _pairs("a", "b")(m, torch.split(x, [4, 4], dim=1)),
    "tensor_split": lambda m, x: _pairs("a", "b")(m, x.tensor_split(2, 1)),
    "tensor_split at": lambda m, x: (lambda xs: _pairs("a", "b")(m, (xs[0], xs[1])))(
        torch.tensor_split(x, (4,), dim=1)
    ),
    "slices": lambda m, x: _pairs("a", "b")(m, (x[:, :4], x[:, 4:])),
    "slices from the end": lambda m, x: _pairs("a", "b")(m, (x[:, :-4], x[..., -4:, :, :])),
    "narrow": lambda m, x: _pairs("a", "b")(m, (x.narrow(1, 0, 4), torch.narrow(x, 1, 4, 4))),
    "index_select": lambda m, x: _pairs("a", "b")(
        m, (x.index_select(1, m.low), torch.index_select(x, 1, m.high))
    ),
    "functional, then norm": lambda m, x: m.norm(
        torch.concat([call(m.a, x[:, :4]), call(m.b, x[:, 4:])], -3)
    ),
}  # fmt: skip


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", GROUPED)
def test_chunks_become_groups(name: str, groups: int) -> None:
    """A layer in front says how many channels there are; narrow(1, 0, 4) alone does not."""
    layers = {each: conv(4, 6, padding=1, groups=groups) for each in "ab"}
    model = Body(lambda m, x: GROUPED[name](m, m.stem(x).relu()), **layers)
    model.stem, model.norm = conv(), nn.BatchNorm2d(12)
    model.register_buffer("low", torch.arange(4))
    model.register_buffer("high", torch.arange(4, 8))
    at = ((2, 8, 5, 6), (1, 8, 4, 3), (1, 8, 3, 7))
    optimized = check(model.eval(), at, layers=2, operations=3)
    assert {m.groups for m in optimized.modules() if isinstance(m, nn.Conv2d)} == {1, 2 * groups}


# --- what stays, and why -------------------------------------------------------------------------

CHUNKS = {"a": conv(4, 4, padding=1), "b": conv(4, 4, padding=1)}
STAYS: dict[str, tuple[Forward, dict[str, Any], dict[str, Any]]] = {
    "chunks in the wrong order": (
        lambda m, x: _pairs("b", "a")(m, (x[:, 4:], x[:, :4])), CHUNKS,
        {"reasons": ["not worth it: MACs"]},
    ),
    "chunks of unequal size": (
        lambda m, x: _pairs("a", "b")(m, x.split([2, 6], 1)),
        {"a": conv(2, 4, padding=1), "b": conv(6, 4, padding=1)},
        {"reasons": ["not worth it: MACs"]},
    ),
    "chunks with unequal outputs": (
        lambda m, x: _pairs("a", "b")(m, x.chunk(2, 1)),
        {"a": conv(4, 2, padding=1), "b": conv(4, 6, padding=1)},
        {"reasons": ["not worth it: MACs"]},
    ),
    "one chunk twice": (
        lambda m, x: _pairs("a", "b")(m, (x[:, :4], x[:, :4])), CHUNKS, {"layers": None},
    ),
    "the height": (
        lambda m, x: torch.cat([m.a(x), m.a(x).relu()], 2), {"a": conv(8, 8, padding=1)},
        {"layers": None, "rewrites": None},
    ),
    "the batch": (
        lambda m, x: torch.cat([m.a(x), m.b(x)], 0),
        {"a": conv(8, 8, padding=1), "b": conv(8, 8, padding=1)}, {},
    ),
    "unequal strides that agree for one pixel": (
        lambda m, x: torch.cat([m.a(x), m.b(x)], 1),
        {"a": conv(8, 4, 1), "b": conv(8, 4, 1, stride=2)}, {"reasons": ["differ in stride"]},
    ),
    "unequal padding modes": (
        lambda m, x: torch.cat([m.a(x), m.b(x)], 1),
        {"a": conv(8, 4, padding=1), "b": conv(8, 4, padding=1, padding_mode="circular")},
        {"reasons": ["differ in padding mode"]},
    ),
    "transposed and not": (
        lambda m, x: torch.cat([m.a(x), m.b(x)], 1),
        {"a": conv(8, 4, padding=1), "b": nn.ConvTranspose2d(8, 4, 3, padding=1)},
        {"reasons": ["transposed"]},
    ),
    "one operand read elsewhere": (
        lambda m, x: (torch.cat([(y := m.a(x)), m.b(x)], 1), y.relu()),
        {"a": conv(8, 4, padding=1), "b": conv(8, 4, padding=1)}, {"layers": None},
    ),
    "a norm below something that is no layer": (
        lambda m, x: m.norm(torch.cat([m.a(x), x.relu()], 1)),
        {"a": conv(8, 4, padding=1), "norm": nn.BatchNorm2d(12)}, {"layers": 1, "batchnorms": 1},
    ),
    "written in between": (
        lambda m, x: torch.cat([(y := m.a(x)), m.b(x), y.add_(1)], 1),
        {"a": conv(8, 4, padding=1), "b": conv(8, 4, padding=1)}, {"layers": None},
    ),
}  # fmt: skip
ONE_PIXEL = (*SHAPES, (3, 8, 1, 1), (1, 8, 1, 1))


@pytest.mark.parametrize("name", STAYS)
def test_stays_and_says_why(name: str) -> None:
    forward, layers, expected = STAYS[name]
    check(Body(forward, **layers).eval(), ONE_PIXEL, **{"layers": 2, **expected})


@pytest.mark.parametrize("name", STAYS)
def test_what_is_not_legal_stays_without_the_cost_rule(name: str) -> None:
    forward, layers, _ = STAYS[name]
    model = Body(forward, **layers).eval()
    check(model, ONE_PIXEL, batchnorms=None, cost="always", more_work=True, validate=False)


INTERLEAVED: dict[str, Forward] = {
    "of a cat": lambda m, x: m.a(x) + torch.cat([x, x], 1)[:, m.index],
    "of a layer and x": lambda m, x: m.a(x) + torch.cat([m.b(x), x], 1)[:, m.index],
    "of padded channels": lambda m, x: m.a(x) + F.pad(x, (0, 0, 0, 0, 4, 0)).index_select(
        1, m.index
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", INTERLEAVED)
def test_channels_that_an_index_interleaves(name: str) -> None:
    """Validation declines it; the algebra must get it right."""
    model = Body(INTERLEAVED[name], a=conv(4, 8, padding=1), b=conv(4, 4, 1)).eval()
    model.register_buffer("index", torch.tensor([0, 4, 1, 5, 2, 6, 3, 7]))
    check(model, ((2, 4, 5, 6), (1, 4, 3, 3)), validate=False)


def test_a_slice_that_leaves_out_an_operand() -> None:
    parts = {"a": conv(8, 4, padding=1), "b": conv(8, 40, 1)}
    model = Body(lambda m, x: torch.cat([m.a(x), m.b(x)], 1)[:, :3].relu(), **parts).eval()
    check(model, SHAPES, layers=1)


def _mixed(m: Any, x: Tensor, h: Tensor) -> Tensor:
    return m.d(torch.cat([m.a(x), m.b(x), m.c(h)], 1))


def test_a_1x1_over_a_concatenation_is_no_more_operations() -> None:
    parts = {"a": conv(4, 2, padding=1, bias=False), "b": conv(4, 4, 1, bias=False)}
    more = {"c": conv(4, 4, 1, bias=False), "d": conv(10, 4, 1, bias=False)}
    at = tuple(((n, 4, h, w),) * 2 for n, h, w in ((2, 5, 6), (1, 4, 3)))
    check(Two(_mixed, **parts, **more).eval(), at)


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
    assert_equal(ConcatenatesZeros(), IMAGE, cost=cost, validate=validate)


# --- over all concatenations ---------------------------------------------------------------------

OPERANDS = ("conv", "conv", "conv", "norm", "x", "pool", "chunk", "relu", "sum", "chain")


@st.composite
def concats(draw: st.DrawFn) -> nn.Module:
    """Operands of one size over two sources, and what may follow their concatenation."""
    stride = draw(st.sampled_from([1, 1, 1, 2]))
    layers: dict[str, nn.Module] = {}
    reads, outputs = [], 0

    def layer(name: str, inputs: int, out: int) -> Forward:
        kernel, dilation = draw(st.sampled_from([1, 1, 3, 3, 5])), draw(st.sampled_from([1, 1, 2]))
        layers[name] = conv(
            inputs, out, kernel, stride=stride, dilation=dilation, bias=draw(st.booleans()),
            padding=dilation * (kernel // 2), groups=draw(st.sampled_from([1, 1, 2])),
        )  # fmt: skip
        if draw(st.integers(0, 3)) == 0:
            layers[name] = nn.Sequential(layers[name], nn.BatchNorm2d(out))
        return lambda m, x: getattr(m, name)(x)

    for i in range(draw(st.integers(2, 4))):
        name, kind = f"l{i}", draw(st.sampled_from(OPERANDS))
        if stride > 1 and kind not in ("conv", "chunk", "sum", "chain"):
            kind = "conv"
        out = draw(st.sampled_from([2, 4, 4, 6])) if kind in ("conv", "chunk", "sum") else 4
        read: Forward
        if kind == "norm":
            layers[name] = nn.BatchNorm2d(4)
            read = lambda m, x, n=name: getattr(m, n)(x)  # noqa: E731
        elif kind in ("x", "relu"):
            read = (lambda m, x: x) if kind == "x" else (lambda m, x: x.relu())
        elif kind == "pool":
            read = lambda m, x: F.avg_pool2d(x, 3, 1, 1)  # noqa: E731
        elif kind == "chunk":
            first, inner = draw(st.sampled_from([0, 2])), layer(name, 2, out)
            read = lambda m, x, f=first, inner=inner: inner(m, x[:, f : f + 2])  # noqa: E731
        elif kind == "sum":
            one, two = layer(name, 4, out), layer(f"{name}b", 4, out)
            read = lambda m, x, one=one, two=two: one(m, x) - 2 * two(m, x)  # noqa: E731
        elif kind == "chain":
            layers[f"{name}w"] = conv(4, 16, 1, bias=draw(st.booleans()))
            inner = layer(name, 16, out)
            read = lambda m, x, n=name, inner=inner: inner(m, getattr(m, f"{n}w")(x))  # noqa: E731
        else:
            read = layer(name, 4, out)
        outputs += out
        reads.append((read, draw(st.sampled_from([0, 0, 1]))))
    join = draw(st.sampled_from([name for name in JOINS if name != "cat of cats"]))
    after = draw(st.sampled_from(["nothing", "norm", "1x1", "3x3", "slice", "relu"]))
    if after == "norm":
        layers["after"] = nn.BatchNorm2d(outputs)
    elif after in ("1x1", "3x3"):
        kernel = int(after[0])
        layers["after"] = conv(outputs, 4, kernel, padding=kernel // 2, bias=draw(st.booleans()))

    def forward(m: Any, x: Tensor, h: Tensor) -> Tensor:
        y = JOINS[join]([read(m, (x, h)[source]) for read, source in reads])
        if after == "slice":
            return y[:, 1:-2]
        if after == "relu":
            return y.relu()
        return y if after == "nothing" else m.after(y)

    return Two(forward, **layers).eval()


@given(data=st.data(), cost=st.sampled_from(["macs", "always"]), validate=st.booleans())
def test_any_concat(data: st.DataObject, cost: str, validate: bool) -> None:
    model = data.draw(concats())
    sizes = [(n, 4, h, w) for n, h, w in ((2, 5, 6), (1, 4, 3), (1, 2, 2), (1, 7, 8))]
    assume(any(True for _ in model.parameters()))
    # A layer after it may become a sum: fewer MACs, but more operations. See above.
    more = cost == "always" or isinstance(getattr(model, "after", None), nn.Conv2d)
    at = tuple((s, s) for s in sizes)
    optimized = check(model, at, batchnorms=None, cost=cost, more_work=more, validate=validate)
    if cost == "macs":
        for shape in at:
            before, after = (count(m, inputs_of(shape, torch.float32)) for m in (model, optimized))
            assert after.macs <= before.macs and after.convs <= before.convs


EIGHT = ((2, 8, 9, 9), (1, 8, 4, 7))


def test_split_and_put_together_again_is_nothing() -> None:
    model = Body(
        lambda m, x: m.a(torch.cat([*m.a(x).relu().chunk(4, 1)], 1)).relu(),
        a=nn.Conv2d(8, 8, 3, padding=1),
    ).eval()
    optimized = check(model, EIGHT, layers=2, operations=4)
    assert not any(n.target is torch.cat for n in optimized.graph.nodes)


def test_a_copy_that_is_written_stays_a_copy() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        y = m.a(x).relu()
        z = torch.cat([*y.chunk(2, 1)], 1)
        z += 1
        return z.sigmoid(), y.sigmoid()

    check(Body(forward, a=nn.Conv2d(8, 8, 3, padding=1)).eval(), EIGHT, layers=1)
