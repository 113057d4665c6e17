"""Operations that give back their operand go, unless somebody could tell."""

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
from support.check import check
from support.models import Body, conv

SHAPES = ((2, 8, 6, 5), (1, 8, 5, 7), (3, 8, 5, 5))

Forward = Callable[[Any, Tensor], Any]


def parts() -> dict[str, Any]:
    return {
        "a": conv(), "b": conv(padding=1), "id": nn.Identity(), "drop": nn.Dropout(),
        "drop2": nn.Dropout2d(inplace=True), "alpha": nn.AlphaDropout(), "linear": nn.Linear(8, 8),
        "feature": nn.FeatureAlphaDropout(), "over": nn.ReLU(inplace=True),
    }  # fmt: skip


def model_of(forward: Forward, **more: Any) -> nn.Module:
    return Body(forward, **parts(), **more).eval()


def gone(optimized: Any) -> int:
    """How many operations the pass took away."""
    return sum(each.pass_name == "no-ops" for each in fxrep.report(optimized).rewrites)


# --- what goes -----------------------------------------------------------------------------------

GOES: dict[str, Forward] = {
    "Identity": lambda m, x: m.id(x).relu(),
    "Identity, by keyword": lambda m, x: m.id(input=x).relu(),
    "Dropout": lambda m, x: m.drop(m.a(x)).relu(),
    "Dropout2d, in place": lambda m, x: m.drop2(m.a(x)).relu(),
    "AlphaDropout": lambda m, x: m.alpha(x).relu(),
    "FeatureAlphaDropout": lambda m, x: m.feature(x).relu(),
    "F.dropout": lambda m, x: F.dropout(x, training=False).relu(),
    "F.dropout, by position": lambda m, x: F.dropout(x, 0.1, False).relu(),
    "F.dropout2d": lambda m, x: F.dropout2d(x, 0.1, training=m.training).relu(),
    "F.alpha_dropout": lambda m, x: F.alpha_dropout(x, training=False).relu(),
    "x * 1": lambda m, x: (m.a(x) * 1).relu(),
    "1 * x": lambda m, x: (1 * m.a(x)).relu(),
    "x * 1.0": lambda m, x: (m.a(x) * 1.0).relu(),
    "torch.mul": lambda m, x: torch.mul(m.a(x), other=1).relu(),
    "mul": lambda m, x: m.a(x).mul(1).relu(),
    "x / 1": lambda m, x: (m.a(x) / 1).relu(),
    "div": lambda m, x: m.a(x).div(1.0).relu(),
    "x + 0": lambda m, x: (m.a(x) + 0).relu(),
    "sum": lambda m, x: sum([m.a(x)]).relu(),
    "x - 0": lambda m, x: (m.a(x) - 0).relu(),
    "after functions": lambda m, x: (F.gelu(m.a(x)).sigmoid() * 1).tanh(),
    "of a scale": lambda m, x: (m.a(x).relu() * 3 + 0).tanh(),
    "returned": lambda m, x: m.a(x) * 1,
    "written over": lambda m, x: m.over(m.a(x) * 1) + 2,
    "written over, by name": lambda m, x: (m.a(x) + 0).relu_().mul(2),
    "an alias written over": lambda m, x: m.over(m.drop(m.a(x))) + 2,
    "the input, returned": lambda m, x: m.drop(x),
    "two names of one": lambda m, x: (y := m.a(x), m.drop(y)),
    "its size is read": lambda m, x: (y := m.a(x) * 1, y.relu() / y.shape[0])[1],
    "contiguous twice": lambda m, x: x.transpose(1, 2).contiguous().contiguous(),
    "contiguous after linear": lambda m, x: m.linear(x.transpose(1, 3)).contiguous().view(-1),
    "contiguous after functions": lambda m, x: m.linear(x.transpose(1, 3)).tanh().contiguous(),
}  # fmt: skip


@pytest.mark.parametrize("name", GOES)
def test_goes(name: str) -> None:
    optimized = check(model_of(GOES[name]), SHAPES)
    assert gone(optimized) == 1
    plain = fxrep.optimize(model_of(GOES[name]), passes=["no-ops"])
    assert gone(plain) == 1


def test_several_in_a_row() -> None:
    model = model_of(lambda m, x: m.id(m.drop(m.alpha(m.a(x)) * 1) + 0).relu() / 1)
    assert gone(check(model, SHAPES, passes=["no-ops"], operations=2)) == 6
    check(model, SHAPES, operations=2)


def test_modules_that_nobody_calls_go_too() -> None:
    model = nn.Sequential(conv(), nn.Identity(), nn.Dropout(), nn.ReLU()).eval()
    optimized = fxrep.optimize(model)
    assert not [m for m in optimized.modules() if isinstance(m, nn.Identity | nn.Dropout)]


def test_the_input_is_returned_itself() -> None:
    x = torch.randn(2, 8, 6, 5)
    assert fxrep.optimize(model_of(lambda m, x: m.id(m.drop(x))))(x) is x


def test_what_reads_it_merges() -> None:
    model = model_of(lambda m, x: F.avg_pool2d(m.drop(m.b(m.id(m.a(x)) * 1)), 2))
    check(model, ((2, 8, 7, 7), (1, 8, 6, 9)))


def test_the_report_counts_every_one() -> None:
    model = nn.Sequential(conv(), nn.Identity(), nn.Identity(), nn.Dropout(0.5)).eval()
    report = fxrep.report(fxrep.optimize(model))
    assert report.removed == {"Identity": 2, "Dropout": 1}
    assert [(r.where, r.before, r.after) for r in report.rewrites] == [
        ("1", ("Identity",), ()), ("2", ("Identity",), ()), ("3", ("Dropout",), ()),
    ]  # fmt: skip
    lines = str(report).splitlines()
    assert sum("1 Identity -> nothing" in line for line in lines) == 1  # a row for all of them


# --- what stays ----------------------------------------------------------------------------------


def _hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda _m, _args, output: output * 2)
    return module


class Doubling(nn.Identity):
    """No identity, whatever it derives from."""

    def forward(self, input: Tensor) -> Tensor:
        return input * 2


def _training(module: nn.Module) -> nn.Module:
    module.training = True
    return module


IN_PLACE = "written in place"
STAYS: dict[str, tuple[Forward, str]] = {
    "the input, copied": (lambda m, x: x * 1, ""),
    "a copy, returned with the value": (
        lambda m, x: (y := m.a(x), y * 1), "the caller would get the value itself",
    ),
    "a view of a copy, returned with the value": (
        lambda m, x: (y := m.a(x), (y + 0)[:, 2:4]), "the caller would get the value itself",
    ),
    "a copy, written later": (
        lambda m, x: (y := m.a(x), z := y * 1, z.add_(1), y.relu() + z)[3], IN_PLACE,
    ),
    "the value, written later": (
        lambda m, x: (y := m.a(x), z := y * 1, y.add_(1), y.relu() + z)[3], IN_PLACE,
    ),
    "a view of a copy, written later": (
        lambda m, x: (y := m.a(x), z := y * 1, z[:, :2].add_(1), y.relu() + z)[3], IN_PLACE,
    ),
    "an alias, written later": (
        lambda m, x: (y := m.a(x), z := m.drop(y), z.add_(1), y.relu() + z)[3], IN_PLACE,
    ),
    "a promoted input": (lambda m, x: (x * 1.0).relu(), ""),
    "an input that may be bool": (lambda m, x: (x + 0).relu(), ""),
    "a product in place": (lambda m, x: m.a(x).mul_(1).relu(), ""),
    "times two": (lambda m, x: (m.a(x).relu() * 2).relu(), ""),
    "times True": (lambda m, x: (m.a(x).relu() * True).relu(), ""),
    "the other way round": (lambda m, x: (0 - m.a(x).relu()) + 1 / m.a(x).sigmoid(), ""),
    "rounded": (lambda m, x: torch.div(m.a(x).relu(), 1, rounding_mode="floor"), ""),
    "with a factor": (lambda m, x: torch.add(m.a(x).relu(), 1, alpha=0).relu(), ""),
    "a number": (lambda m, x: m.a(x).relu() * (x.shape[0] * 1), ""),
    "a slice made dense": (
        lambda m, x: (m.a(x)[:, :, 1:-1, 1:-1] * 1).view(x.shape[0], -1), "",
    ),
    "contiguous before view": (lambda m, x: x.transpose(1, 2).contiguous().view(-1), ""),
    "contiguous before relu and view": (
        lambda m, x: x.transpose(1, 2).contiguous().relu().view(-1), "",
    ),
    "contiguous, returned": (lambda m, x: x.transpose(1, 2).contiguous(), ""),
    "contiguous before a layer": (lambda m, x: m.a(x.transpose(2, 3).contiguous()), ""),
    "contiguous before linear": (lambda m, x: m.linear(x.transpose(1, 3).contiguous()), ""),
    "contiguous, turned in place": (
        lambda m, x: (y := m.linear(x.transpose(1, 3)), y.transpose_(1, 2), y.contiguous())[2], "",
    ),
    "another memory format": (
        lambda m, x: m.a(x).contiguous(memory_format=torch.channels_last).relu(), "",
    ),
    "modules of such names": (
        lambda m, x: m.contiguous(m.mul(m.linear(x.transpose(1, 3)))).relu(), "",
    ),
    "a dropout that trains": (lambda m, x: F.dropout(m.a(x), 0.0, True).relu(), ""),
    "a module that trains": (lambda m, x: m.trains(m.a(x)).relu(), ""),
    "a hooked module": (lambda m, x: m.hooked(m.a(x)).relu(), ""),
    "a subclass": (lambda m, x: m.doubling(m.a(x)).relu(), ""),
}  # fmt: skip


@pytest.mark.parametrize("name", STAYS)
def test_stays(name: str) -> None:
    forward, reason = STAYS[name]
    more: dict[str, Any] = {
        "trains": nn.Dropout(0.0), "hooked": _hooked(nn.Identity()), "doubling": Doubling(),
        "contiguous": nn.Tanh(), "mul": nn.Tanh(),
    }  # fmt: skip
    model = model_of(forward, **more)
    _training(more["trains"])
    assert not gone(check(model, SHAPES, again=False))
    alone = check(model, SHAPES, passes=["no-ops"], reasons=[reason] if reason else [])
    assert not fxrep.report(alone).rewrites


def test_strides_of_a_returned_value_stay() -> None:
    model = model_of(lambda m, x: (m.a(x).transpose(2, 3).contiguous(), m.a(x)[:, 2:4] * 1))
    x = torch.randn(2, 8, 6, 5)
    got, wanted = fxrep.optimize(model)(x), model(x)
    assert [t.stride() for t in got] == [t.stride() for t in wanted]


def test_integers_stay_integers() -> None:
    """Nothing but a layer makes sure that a value is not promoted."""
    model = model_of(lambda m, x: ((x * 1.0).dtype == torch.float32, x * 1))
    optimized = fxrep.optimize(model)
    for x in (torch.ones(2, dtype=torch.int32), torch.ones(2, dtype=torch.bool)):
        got, wanted = optimized(x), model(x)
        assert got[0] == wanted[0] and got[1].dtype == wanted[1].dtype


def test_a_batchnorm_of_ones_is_not_its_business() -> None:
    model = model_of(lambda m, x: (m.a(x).relu() * m.ones).relu(), ones=nn.Parameter(torch.ones(1)))
    assert not gone(check(model, SHAPES))


def test_the_pass_can_be_left_out() -> None:
    model = model_of(lambda m, x: m.id(m.a(x) * 1).relu())
    passes = [each for each in fxrep.default_passes if each.name != "no-ops"]
    assert not gone(fxrep.optimize(model, passes=passes))


def test_in_torch_compile() -> None:
    model = nn.Sequential(conv(), nn.BatchNorm2d(8), nn.Dropout(), nn.Identity(), nn.ReLU()).eval()
    whole = Body(lambda m, x: F.dropout(m.block(x) * 1, training=m.training).tanh(), block=model)
    whole.eval()
    compiled = torch.compile(whole, backend="fxrep", options={"inner": "eager"})
    x = torch.randn(2, 8, 6, 5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), whole(x))
    report = fxrep.report(compiled)
    assert report.removed == {"dropout": 2, "mul": 1, "batch_norm": 1}


# --- any graph -----------------------------------------------------------------------------------

STEPS: dict[str, Forward] = {
    "conv": lambda m, x: m.b(x),
    "identity": lambda m, x: m.id(x),
    "dropout": lambda m, x: m.drop(x),
    "dropout in place": lambda m, x: m.drop2(x),
    "times 1": lambda m, x: x * 1,
    "over 1": lambda m, x: x / 1.0,
    "plus 0": lambda m, x: 0 + x,
    "minus 0": lambda m, x: x.sub(0),
    "contiguous": lambda m, x: x.contiguous(),
    "turned": lambda m, x: x.transpose(2, 3),
    "turned and contiguous": lambda m, x: x.transpose(2, 3).contiguous(),
    "reversed channels": lambda m, x: x.view(x.shape[0], -1).view(x.shape),
    "relu": lambda m, x: x.relu(),
    "relu in place": lambda m, x: m.over(x),
    "added in place": lambda m, x: x.add_(1),
    "part written": lambda m, x: (x[:, :2].mul_(2), x)[1],
    "linear": lambda m, x: m.linear(x.transpose(1, 3)).transpose(1, 3),
}


class Program(nn.Module):
    """Steps of values that steps before them have made, and what is returned."""

    def __init__(self, steps: list[tuple[str, int]], returned: list[int]) -> None:
        super().__init__()
        for name, part in parts().items():
            setattr(self, name, part)
        self.steps, self.returned = steps, returned

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        made = [x]
        for name, source in self.steps:
            made.append(STEPS[name](self, made[-1 - source % len(made)]))
        return tuple(made[-1 - i % len(made)] for i in self.returned)


def memory(model: nn.Module, x: Tensor) -> tuple[list[bool], list[tuple[int, ...]]]:
    """Which of the input and the results are one tensor or share memory, and all strides."""
    with torch.no_grad():
        found = [x, *tree_leaves(model(x))]
    pairs = [(a, b) for i, a in enumerate(found) for b in found[:i]]
    shares = [
        flag
        for a, b in pairs
        for flag in (a is b, a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr())
    ]
    return shares, [tuple(t.stride()) for t in found]


@given(
    st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 2)), min_size=2, max_size=9),
    st.lists(st.integers(0, 3), min_size=1, max_size=2),
    st.booleans(),
)
def test_nobody_can_tell(steps: list[tuple[str, int]], returned: list[int], alone: bool) -> None:
    torch.manual_seed(0)
    model = Program(steps, returned).eval()
    shapes = ((2, 8, 8, 8), (1, 8, 8, 8))
    try:
        copy.deepcopy(model)(torch.randn(shapes[0]))
    except RuntimeError:  # a view that its strides forbid
        return
    options: Any = {"passes": ["no-ops"]} if alone else {}
    # Reads that a first run removes may be in the way of it, and not of a second one.
    check(model, shapes, again=False, **options)
    if alone:
        x = torch.randn(shapes[0])
        assert memory(fxrep.optimize(model, **options), x) == memory(model, x)


TRUTH = {
    "> 0": lambda y: y > 0,
    "isnan": lambda y: y.isnan(),
    "isfinite": lambda y: torch.isfinite(y),
    "signbit": lambda y: y.signbit(),
    "logical_not": lambda y: torch.logical_not(y),
    "ne": lambda y: y.ne(0.5),
    "of an element-wise function": lambda y: torch.tanh(y).relu() >= 0.1,
    "long": lambda y: y.long(),
    "argmax": lambda y: y.argmax(1, keepdim=True),
}


@pytest.mark.parametrize("how", ["1 *", "+ 0", "/ 1", "mul"])
@pytest.mark.parametrize("name", TRUTH)
def test_a_truth_value_times_one_is_a_number(name: str, how: str) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        masks = []
        for layer in (m.a, m.c):
            y = TRUTH[name](layer(x))
            masks.append({"1 *": 1 * y, "+ 0": y + 0, "/ 1": y / 1, "mul": y.mul(1)}[how])
        return masks[0], (masks[0] + masks[1]).float() / 3

    model = model_of(forward, c=conv())
    optimized = check(model, SHAPES, again=False)
    x = torch.randn(SHAPES[0])
    assert optimized(x)[0].dtype == model(x)[0].dtype
