"""What nobody reads goes, unless it does something else; a branch times zero is such a thing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxrep
from support.check import check, count, inputs_of
from support.models import Body, conv, conv_bn

SHAPES = ((2, 8, 5, 6), (1, 8, 4, 3), (3, 8, 3, 3))

Forward = Callable[[Any, Tensor], Any]


def parts() -> dict[str, Any]:
    return {
        "a": conv(padding=1), "b": conv(padding=1), "c": conv(8, 4, 1), "norm": nn.BatchNorm2d(8),
        "act": nn.ReLU(), "up": nn.ConvTranspose2d(8, 8, 2, stride=2),
        "alpha": nn.Parameter(torch.tensor(0.5)), "nothing": nn.Parameter(torch.zeros(8, 1, 1)),
    }  # fmt: skip


def _auxiliary(m: Any, x: Tensor) -> Tensor:
    """A second head that is left out of the result."""
    y = m.a(x).relu()
    m.c(F.avg_pool2d(torch.sigmoid(m.norm(m.b(y))), 2).mul(2))
    return y


def _unread(*calls: Forward) -> Forward:
    """Calls whose results are thrown away, around one that is not."""

    def forward(m: Any, x: Tensor) -> Tensor:
        for call in calls:
            call(m, x)
        return m.a(x).relu()

    return forward


# --- what goes -----------------------------------------------------------------------------------

GOES: dict[str, Forward] = {
    "a layer": _unread(lambda m, x: m.b(x)),
    "a chain": _unread(lambda m, x: m.c(m.norm(m.b(x)).relu())),
    "a functional layer": _unread(lambda m, x: F.conv2d(x, m.b.weight, m.b.bias, padding=1)),
    "a transposed layer": _unread(lambda m, x: m.up(x)),
    "a BatchNorm": _unread(lambda m, x: m.norm(x)),
    "activations": _unread(lambda m, x: m.act(x), lambda m, x: F.gelu(x), lambda m, x: x.tanh()),
    "arithmetic": _unread(lambda m, x: x * m.alpha - 1),
    "a sum of layers": _unread(lambda m, x: m.a(x) + m.b(x)),
    "a concatenation": _unread(lambda m, x: torch.cat([m.b(x), m.c(x)], 1)),
    "slices": _unread(lambda m, x: x[:, 2:4].relu(), lambda m, x: x[..., 1:-1]),
    "padding and pooling": _unread(lambda m, x: F.avg_pool2d(F.pad(x, (1, 1, 1, 1)), 2)),
    "a layer of an inner value": lambda m, x: (y := m.a(x).relu(), m.c(y))[0],
    "one that reads what is read": lambda m, x: (y := m.a(x).relu(), m.c(y), y + 1)[2],
}  # fmt: skip


@pytest.mark.parametrize("name", GOES)
def test_goes(name: str) -> None:
    optimized = check(Body(GOES[name], **parts()).eval(), SHAPES, layers=1)
    kinds = count(optimized, inputs_of(SHAPES[0], torch.float32)).kinds
    assert set(kinds) <= {"convolution", "relu", "add"}, kinds


VIEWS: dict[str, Forward] = {
    "chunk": _unread(lambda m, x: x.chunk(2, 1)[0]),
    "split": _unread(lambda m, x: m.c(torch.split(x, [8], 1)[0])),
    "slice to a fixed end": _unread(lambda m, x: x[:, :, :, :2]),
}


@pytest.mark.parametrize("name", VIEWS)
def test_unread_views_go(name: str) -> None:
    check(Body(VIEWS[name], **parts()).eval(), SHAPES, layers=1, operations=2)


@pytest.mark.parametrize("name", ["a layer", "a chain", "a layer of an inner value"])
def test_its_parameters_go_with_it(name: str) -> None:
    used = {"a layer": "b", "a chain": "b c norm", "a layer of an inner value": "c"}
    layers = {"a": conv(), "b": conv(), "c": conv(8, 4, 1), "norm": nn.BatchNorm2d(8)}
    named = [*used[name].split(), "a"]
    optimized = fxrep.optimize(Body(GOES[name], **{n: layers[n] for n in named}).eval())
    assert len([m for m in optimized.modules() if isinstance(m, nn.Conv2d)]) == 1
    assert sum(p.numel() for p in optimized.parameters()) == 8 * 8 * 9 + 8


def test_an_auxiliary_head_goes() -> None:
    check(Body(_auxiliary, **parts()).eval(), SHAPES, layers=1)


def test_a_layer_of_which_only_the_shape_is_read() -> None:
    """The size of a result is computed from the size of what it reads, or the layer stays."""
    model = Body(lambda m, x: m.a(x).relu() * m.b(x).shape[0], **parts()).eval()
    check(model, SHAPES)


def test_a_model_that_returns_its_input() -> None:
    model = Body(lambda m, x: (m.norm(m.a(x)), x)[1], **parts()).eval()
    check(model, SHAPES, layers=0, operations=0)


def test_the_pass_can_be_left_out() -> None:
    passes = [each for each in fxrep.default_passes if each.name != "dead"]
    check(Body(GOES["a layer"], **parts()).eval(), SHAPES, layers=2, passes=passes)


# --- branches times zero -------------------------------------------------------------------------

ZERO: dict[str, Forward] = {
    "a number": lambda m, x: m.a(x) + 0 * m.b(x),
    "a float": lambda m, x: m.a(x) + m.b(x) * 0.0,
    "a parameter": lambda m, x: m.a(x) + m.nothing * m.b(x),
    "alpha": lambda m, x: torch.add(m.a(x), m.b(x), alpha=0),
    "two of them": lambda m, x: m.a(x) + 0 * m.b(x) - m.nothing * m.c2(x),
    "an identity": lambda m, x: m.a(x) + 0 * x,
    "a whole BatchNorm": lambda m, x: m.a(x) + 0 * m.norm(x),
    "cancelled": lambda m, x: m.a(x) + m.b(x) - m.b(x),
}


@pytest.mark.parametrize("name", ZERO)
def test_a_branch_times_zero_goes(name: str) -> None:
    model = Body(ZERO[name], **parts(), c2=conv(kernel=5, padding=2)).eval()
    optimized = check(model, SHAPES, layers=1, operations=1)
    left = count(optimized, inputs_of(SHAPES[0], torch.float32)).macs
    assert left == 2 * 5 * 6 * 8 * 8 * 9


def test_a_wider_branch_times_zero_leaves_no_taps() -> None:
    """Sizes agree, so that nothing of the wide kernel is needed."""
    parts = {"a": conv(padding=1), "b": conv(kernel=7, padding=3)}
    optimized = check(Body(lambda m, x: m.a(x) + 0 * m.b(x), **parts).eval(), SHAPES, layers=1)
    (layer,) = [m for m in optimized.modules() if isinstance(m, nn.Conv2d)]
    assert layer.kernel_size == (3, 3)


def test_a_branch_times_zero_of_another_size_still_decides_the_shape() -> None:
    model = Body(lambda m, x: m.a(x) + 0 * m.b(x), a=conv(), b=conv(padding=1)).eval()
    check(model, ((2, 8, 3, 3), (1, 8, 3, 3), (3, 8, 3, 3)), layers=2)


def test_all_of_it_times_zero_is_still_a_value_of_its_shape() -> None:
    model = Body(lambda m, x: 0 * m.a(x) + 0 * m.b(x), **parts()).eval()
    check(model, SHAPES)


# --- what stays ----------------------------------------------------------------------------------


def _hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda _m, args, _output: torch.relu_(args[0]))
    return layer


class Counter(nn.Module):
    """Counts its calls."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + self.calls


STAYS: dict[str, Forward] = {
    "in place on the input": lambda m, x: (x.relu_(), m.a(x))[1],
    "added in place": lambda m, x: (y := x.tanh(), y.add_(1), m.a(y))[2],
    "scaled in place": lambda m, x: (y := m.a(x), y.mul_(m.alpha), y.relu())[2],
    "functional, in place": lambda m, x: (y := m.a(x), F.relu(y, inplace=True), y + 1)[2],
    "a module, in place": lambda m, x: (y := m.a(x), m.over(y), y + 1)[2],
    "through a view": lambda m, x: (y := m.a(x), y[:, :2].mul_(3), y.sigmoid())[2],
    "through a chunk": lambda m, x: (y := m.a(x), y.chunk(2, 1)[1].zero_(), y.sigmoid())[2],
    "an assignment": lambda m, x: (y := m.a(x), y.__setitem__((slice(None), 0), 1.0), y + 1)[2],
    "given as out": lambda m, x: (y := m.a(x), torch.sigmoid(x, out=y), y + 1)[2],
    "an in-place dropout": lambda m, x: (y := m.a(x), F.dropout(y, 0.5, False, True), y)[2],
    "of an alias": lambda m, x: (y := m.a(x), m.drop(y).add_(1), y.relu())[2],
}  # fmt: skip


@pytest.mark.parametrize("cost", ["macs", "always"])
@pytest.mark.parametrize("name", STAYS)
def test_what_writes_stays(name: str, cost: str) -> None:
    model = Body(STAYS[name], **parts(), over=nn.ReLU(inplace=True), drop=nn.Dropout()).eval()
    more = cost == "always"
    check(model, SHAPES, layers=1, cost=cost, more_work=more, validate=False, again=False)


@pytest.mark.parametrize("make", [_hooked, lambda layer: nn.Sequential(_hooked(layer))])
def test_a_hooked_layer_stays(make: Callable[[nn.Module], nn.Module]) -> None:
    model = Body(_unread(lambda m, x: m.b(x)), a=conv(padding=1), b=make(conv())).eval()
    check(model, SHAPES, layers=2, rewrites=0)


def test_an_assertion_stays() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        torch._assert(x.shape[2] > 3, "too small")
        m.b(x)
        return m.a(x)

    model = Body(forward, **parts()).eval()
    optimized = check(model, ((1, 8, 4, 4), (2, 8, 5, 6)), layers=1)
    with pytest.raises(AssertionError, match="too small"):
        optimized(torch.zeros(1, 8, 3, 3))


def test_random_numbers_are_drawn_all_the_same() -> None:
    """Unread, but the next draw depends on it."""

    def forward(m: Any, x: Tensor) -> Tensor:
        torch.rand_like(x)
        F.dropout(x, 0.5, True)
        return m.a(x) + torch.rand_like(x)

    model = Body(forward, a=conv(padding=1)).eval()
    optimized = fxrep.optimize(model)
    x = torch.randn(1, 8, 4, 4)
    results = []
    for each in (model, optimized):
        torch.manual_seed(1)
        with torch.no_grad():
            results.append(each(x))
    assert torch.equal(*results)


def test_a_module_with_state_of_its_own_stays() -> None:
    model = Body(_unread(lambda m, x: m.counter(x)), a=conv(padding=1), counter=Counter()).eval()
    optimized = fxrep.optimize(model)
    for _ in range(2):
        optimized(torch.zeros(1, 8, 4, 4))
    assert float(optimized.get_buffer("counter.calls")) == 2


def test_a_batchnorm_that_updates_its_statistics_stays() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        F.batch_norm(x, m.mean, m.var, training=True)
        return m.a(x)

    model = Body(forward, a=conv(padding=1))
    model.register_buffer("mean", torch.zeros(8))
    model.register_buffer("var", torch.ones(8))
    optimized = fxrep.optimize(model.eval())
    optimized(torch.ones(2, 8, 4, 4))
    assert float(optimized.mean.sum()) > 0 and float(model.mean.sum()) == 0


@pytest.mark.parametrize("pair", [False, True])
def test_a_whole_block_that_is_left_out(pair: bool) -> None:
    blocks = {"a": conv_bn(8, 8, 3, padding=1), "b": nn.Sequential(conv_bn(8, 8, 1), nn.ReLU())}
    model = Body(lambda m, x: (m.b(x), m.a(x))[1] if pair else m.a(x), **blocks).eval()
    check(model, SHAPES, layers=1, operations=1)
