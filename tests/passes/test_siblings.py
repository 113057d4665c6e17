"""Several layers of one value run as one, where what reads them takes a part of it as well."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from support.check import check, count, inputs_of
from support.models import Body, call, conv

CONV = {0: nn.Linear, 1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}

# Many channels in, few out: reading the source once is worth the views.
WIDE = ((2, 64, 5, 5), (1, 64, 4, 7), (3, 64, 1, 2))
TOKENS = ((2, 5, 32), (1, 7, 32), (3, 1, 32))


def pair(**how: Any) -> dict[str, nn.Module]:
    return {"a": conv(64, 8, 1, **how), "b": conv(64, 6, 1, **how), "c": conv(64, 4, 1, **how)}


# --- what is joined ------------------------------------------------------------------------------

Forward = Callable[[Any, Tensor], Any]

# What is left: one layer, one split, and of these functions so many. Of two layers alone nothing
# is saved by a layer and a split; of two with what follows them there is.
JOINED: dict[str, tuple[Forward, dict[str, int]]] = {
    "three, returned": (lambda m, x: (m.a(x).relu(), m.b(x).relu(), m.c(x).relu()), {"relu": 3}),
    "two, read further": (lambda m, x: (m.a(x).relu() + 1, m.b(x).relu() * 2), {"relu": 1}),
    "three, read further": (
        lambda m, x: [y.relu().tanh() for y in (m.a(x), m.b(x), m.c(x))], {"relu": 1, "tanh": 3},
    ),
    "modules": (
        lambda m, x: (m.act(m.a(x)).sigmoid(), m.act(m.b(x)).tanh()), {"gelu": 1, "tanh": 1},
    ),
    "functional": (
        lambda m, x: (torch.sigmoid(call(m.b, x)) + 1, torch.sigmoid(call(m.a, x)) - 1),
        {"sigmoid": 1},
    ),
    "unlike activations": (
        lambda m, x: (m.a(x).relu(), m.b(x).sigmoid(), m.c(x).tanh()), {"relu": 1, "sigmoid": 1},
    ),
    "into sums": (lambda m, x: [y + x.mean((1, 2, 3), True) for y in (m.a(x), m.b(x), m.c(x))], {}),
    "of an inner value": (
        lambda m, x: (m.a(y := x.relu()).tanh(), m.b(y).tanh(), m.c(y).tanh()), {"tanh": 3},
    ),
    "rank of one read": (
        lambda m, x: ((y := m.a(x)).relu() * y.dim(), m.b(x).relu(), m.c(x).relu()), {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", JOINED)
def test_joined(name: str) -> None:
    forward, kinds = JOINED[name]
    optimized = check(Body(forward, **pair(), act=nn.GELU()).eval(), WIDE, layers=1)
    ran = count(optimized, inputs_of(WIDE[0], torch.float32)).kinds
    assert all(ran.get(kind, 0) == n for kind, n in kinds.items()), ran


@pytest.mark.parametrize("how", [
    {"stride": 2}, {"padding": 1}, {"dilation": 2, "padding": 2}, {"bias": False},
    {"padding": 1, "padding_mode": "reflect"}, {"padding": "same"},
])  # fmt: skip
def test_equal_geometry_is_enough(how: dict[str, Any]) -> None:
    model = Body(
        lambda m, x: (m.a(x).relu() + 1, m.b(x).relu() - 1),
        a=conv(64, 8, **how), b=conv(64, 2, **how),
    ).eval()  # fmt: skip
    check(model, ((2, 64, 7, 7), (1, 64, 6, 8), (1, 64, 5, 5)), layers=1)


@pytest.mark.parametrize("rank", [1, 3])
def test_every_rank(rank: int) -> None:
    parts = {name: CONV[rank](32, 4, 1, bias=name == "a") for name in "abc"}
    model = Body(lambda m, x: [each(x).relu() for each in (m.a, m.b, m.c)], **parts).eval()
    at = tuple((1, 32, *(n + i for i in range(rank))) for n in (1, 3, 4))
    check(model, at, layers=1)


# --- attention: Linear q, k, v -------------------------------------------------------------------


def _attention(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.q(x), m.k(x), m.v(x)
    return torch.matmul(torch.softmax(torch.matmul(q, k.transpose(-1, -2)) / 4, -1), v)


def _linear_attention(m: Any, x: Tensor) -> Tensor:
    """Attention over the features: what is turned is the softmax, not the layer's own output."""
    q, k, v = m.q(x), m.k(x), m.v(x)
    return torch.matmul(q.softmax(-1), torch.matmul(torch.softmax(k, 1).transpose(-1, -2), v))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("forward", [
    pytest.param(_linear_attention, id="over features"),
    pytest.param(_attention, id="over tokens"),
])  # fmt: skip
def test_queries_keys_and_values_are_one_layer(forward: Forward, bias: bool) -> None:
    parts = {name: nn.Linear(32, 8, bias=bias or name == "q") for name in "qkv"}
    optimized = check(Body(forward, **parts).eval(), TOKENS, example_inputs=True)
    assert len([m for m in optimized.modules() if isinstance(m, nn.Linear)]) == 1


# --- what stays, and why -------------------------------------------------------------------------


def _written_between(m: Any, x: Tensor) -> Any:
    y = torch.exp(x)
    a = m.a(y)
    y.sqrt_()
    return a.relu() + 1, m.b(y).relu() + 1


def _sibling_written(m: Any, x: Tensor) -> Any:
    a, b = m.a(x), m.b(x)
    a += 1
    return a.view(-1), b.relu()


STAYS: dict[str, tuple[Forward, dict[str, Any], dict[str, Any]]] = {
    "returned as they are": (lambda m, x: (m.a(x), m.b(x)), pair(), {"rewrites": 0}),
    "returned through nothing": (
        lambda m, x: (F.dropout(m.a(x), 0.5, False), m.b(x).contiguous()), pair(), {},
    ),
    "one is returned": (lambda m, x: (m.a(x), m.b(x).relu()), pair(), {"rewrites": 0}),
    "viewed": (
        lambda m, x: (m.a(x).view(x.shape[0], -1), m.b(x).view(x.shape[0], -1)), pair(), {},
    ),
    "flattened": (lambda m, x: (m.a(x).flatten(1), m.b(x).flatten(1)), pair(), {}),
    "viewed after a write": (_sibling_written, pair(), {}),
    "the source written in between": (
        _written_between, pair(), {"rewrites": 0},
    ),
    "unequal strides": (
        lambda m, x: (m.a(x).relu(), m.b(x).relu()),
        {"a": conv(64, 8, 1), "b": conv(64, 8, 1, stride=2)}, {"rewrites": 0},
    ),
    "unequal kernels": (
        lambda m, x: (m.a(x).relu(), m.b(x).relu()),
        {"a": conv(64, 8, 1), "b": conv(64, 8, padding=1)}, {"rewrites": 0},
    ),
    "unequal padding modes": (
        lambda m, x: (m.a(x).relu(), m.b(x).relu()),
        {"a": conv(64, 8, padding=1), "b": conv(64, 8, padding=1, padding_mode="circular")},
        {"rewrites": 0},
    ),
    "groups": (lambda m, x: (m.a(x).relu(), m.b(x).relu()), pair(groups=2), {"rewrites": 0}),
    "transposed": (
        lambda m, x: (m.a(x).relu(), m.b(x).relu()),
        {"a": nn.ConvTranspose2d(64, 8, 1), "b": nn.ConvTranspose2d(64, 8, 1)}, {"rewrites": 0},
    ),
    "of two sources": (
        lambda m, x: (m.a(x).relu(), m.b(x.tanh()).relu()), pair(), {"rewrites": 0},
    ),
    "a layer with another behind it": (
        lambda m, x: m.b(m.a(x).relu()).relu(),
        {"a": conv(64, 64, 1), "b": conv(64, 8, 1)}, {"rewrites": 0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("cost", ["macs", "always"])
@pytest.mark.parametrize("name", STAYS)
def test_stays_and_says_why(name: str, cost: str) -> None:
    forward, parts, expected = STAYS[name]
    how: dict[str, Any] = {"more_work": cost == "always", "validate": False}
    check(Body(forward, **parts).eval(), WIDE, layers=2, cost=cost, **expected, **how)


def _hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda _m, _args, output: output.clamp(-0.2, 0.2))
    return layer


def test_a_hooked_layer_stays_beside_those_that_are_joined() -> None:
    """A hook may write into what its layer reads: it has to run before the others or after."""

    def forward(m: Any, x: Tensor) -> Any:
        return m.b(x).relu() + 1, m.a(x).relu() + 1, m.c(x).relu() + 1

    parts = pair()
    _hooked(parts["b"])
    check(Body(forward, **parts).eval(), WIDE, layers=2)


def test_a_layer_that_is_viewed_stays_beside_those_that_are_joined() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        return m.a(x).relu() + 1, m.b(x).relu() + 1, m.c(x).view(-1)

    check(Body(forward, **pair()).eval(), WIDE, layers=2)


def test_a_layer_called_on_two_values() -> None:
    """What it is joined with for one value it is not for the other."""

    def forward(m: Any, x: Tensor) -> Any:
        return m.a(x).relu() + 1, m.b(x).relu() + 1, m.a(x.tanh()).relu()

    check(Body(forward, **pair()).eval(), WIDE)


def test_a_layer_called_twice_on_one_value() -> None:
    check(Body(lambda m, x: (m.a(x).relu() + 1, m.a(x).relu() - 1), **pair()).eval(), WIDE)


COSTS = {
    # Per position: 4 + 64 twice, and 4 + 128 with 2 * 64 copied twice; 2 * 2 positions.
    "copies": (
        lambda m, x: (F.max_pool2d(m.a(x), 2), F.max_pool2d(m.b(x), 2)),
        lambda: {"a": conv(4, 64, 1), "b": conv(4, 64, 1)},
        f"elements moved {2 * 68 * 4} -> {(4 + 128 + 2 * 128) * 4} at output size 2",
    ),
    "nothing saved": (
        lambda m, x: (m.a(x).relu(), m.b(x).relu()), pair, "operations 2 -> 2, no fewer MACs",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COSTS)
def test_says_what_it_would_cost_with_both_figures(name: str) -> None:
    forward, parts, reason = COSTS[name]
    channels = 4 if name == "copies" else 64
    at = ((2, channels, 6, 6), (1, channels, 5, 8))
    reasons = [f"not worth it: {reason}"]
    check(Body(forward, **parts()).eval(), at, layers=2, rewrites=0, reasons=reasons)


# --- over many readers ---------------------------------------------------------------------------

READERS: dict[str, Forward] = {
    "relu": lambda m, y: y.relu(),
    "relu_": lambda m, y: y.relu_(),
    "inplace": lambda m, y: F.relu(y, inplace=True),
    "gelu": lambda m, y: F.gelu(y),
    "returned": lambda m, y: y,
    "flatten": lambda m, y: y.flatten(1),
    "reshape": lambda m, y: y.reshape(y.shape[0], -1),
    "scaled": lambda m, y: y * 2,
    "added to in place": lambda m, y: y.add_(1),
    "softmax": lambda m, y: y.softmax(1),
    "pooled": lambda m, y: F.avg_pool2d(y, 2, ceil_mode=True),
    "mean": lambda m, y: y.mean((2, 3)),
    "slice": lambda m, y: y[:, :2],
    "slice of relu": lambda m, y: y.relu()[:, 1:],
    "twice": lambda m, y: y.relu() + y.sigmoid(),
}


@given(data=st.data(), cost=st.sampled_from(["macs", "always"]))
def test_any_readers(data: st.DataObject, cost: str) -> None:
    """Layers alike and not over one value, read in any way, in any order."""
    inputs = data.draw(st.sampled_from([4, 16, 64]))
    parts, reads = {}, []
    for name in "abcd"[: data.draw(st.integers(2, 4))]:
        how = data.draw(st.sampled_from([{}, {}, {}, {"stride": 2}, {"groups": 2}]))
        bias, out = data.draw(st.booleans()), data.draw(st.sampled_from([2, 8, 8, 32]))
        parts[name] = conv(inputs, out, 1, bias=bias, **how)
        reads.append(data.draw(st.sampled_from(list(READERS))))
    source = data.draw(st.sampled_from(["x", "relu", "written"]))

    def forward(m: Any, x: Tensor) -> Any:
        y = x if source == "x" else x.relu()
        results = []
        for i, (name, read) in enumerate(zip(parts, reads, strict=True)):
            if source == "written" and i == len(reads) - 1:
                y.mul_(2)
            results.append(READERS[read](m, getattr(m, name)(y)))
        return results

    shapes = tuple((n, inputs, h, w) for n, h, w in ((2, 4, 4), (1, 3, 6), (1, 6, 2)))
    model = Body(forward, **parts).eval()
    check(model, shapes, cost=cost, more_work=cost == "always", validate=data.draw(st.booleans()))
