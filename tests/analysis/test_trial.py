"""A graph that gives another result than its forward is not used, whatever the reason."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxrep
from fxrep.analysis import trial
from fxrep.analysis.inputs import possible_inputs
from fxrep.capture.islands import capture
from support.models import Body, conv

DIFFERS = "another result than its forward"


@dataclasses.dataclass
class Counter:
    n: int = 0

    def next(self) -> int:
        self.n += 1
        return self.n


class Part(nn.Module):
    """A forward with a question, or with state that no trace sees, beside parts that trace."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.first = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8))
        self.other = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8))
        self.counter, self.count = Counter(), itertools.count(1)
        self.random, self.kept = random.Random(3), [torch.ones(1)]
        self.function = forward

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def asks(question: Callable[[Tensor], Any]) -> Callable[[Any, Tensor], Any]:
    return lambda m, x: m.first(x) if question(x * 2) else m.other(x)


def matches(value: Any) -> bool:
    match value:
        case Tensor():
            return True
        case _:
            return False


def tries(value: Any) -> bool:
    try:
        return bool(value.nothing_of_the_kind)
    except AttributeError:
        return True


QUESTIONS: dict[str, Callable[[Tensor], Any]] = {
    "type": lambda y: type(y) is Tensor,
    "hasattr": lambda y: not hasattr(y, "tensors"),
    "getattr": lambda y: getattr(y, "mask", None) is None,
    "match": matches,
    "except": tries,
    "dtype": lambda y: y.dtype is torch.float32,
    "dict": lambda y: {torch.float32: True}.get(y.dtype),
    "set": lambda y: y.shape[1] in {1, 3},
    "str": lambda y: str(y.device) == "cpu",
    "format": lambda y: f"{y.shape[1]}" == "3",
    "callable": lambda y: not callable(y),
}

STATE: dict[str, Callable[[Any, Tensor], Any]] = {
    "an object": lambda m, x: m.first(x) * m.counter.next(),
    "an iterator": lambda m, x: m.first(x) * next(m.count),
    "a generator of its own": lambda m, x: m.first(x) * m.random.random(),
    "a tensor in a list": lambda m, x: (m.kept[0].add_(1), m.first(x) * m.kept[0])[1],
}


@pytest.mark.parametrize("examples", [False, True], ids=["without examples", "with examples"])
@pytest.mark.parametrize("name", [*QUESTIONS, *STATE])
def test_a_trace_that_is_wrong_is_not_used(name: str, examples: bool) -> None:
    forward = asks(QUESTIONS[name]) if name in QUESTIONS else STATE[name]
    model, x = Part(forward).eval(), torch.randn(2, 3, 9, 8)
    optimized = fxrep.optimize(copy.deepcopy(model), x if examples else None)
    report = fxrep.report(optimized)
    assert any(skip.where == "" for skip in report.skipped)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(optimized(x), model(x), rtol=1e-4, atol=1e-4)
    assert len(report.rewrites) >= 2  # the parts that trace are rewritten all the same


def test_a_part_that_differs_stays_python_alone(tmp_path: Path) -> None:
    def by_turns(m: Any, x: Tensor) -> Tensor:
        file = tmp_path / "called"  # a state that no snapshot holds
        if file.exists():
            file.unlink()
            return m.other(x)
        file.touch()
        return m.first(x)

    lies = Part(by_turns)
    del lies.count, lies.random, lies.counter  # with them, no copy would be run
    model = nn.Sequential(conv(8, 3), lies, conv(8, 8), nn.BatchNorm2d(8)).eval()
    report = fxrep.report(fxrep.optimize(model))
    assert [s.where for s in report.skipped if DIFFERS in s.reason] == ["1"]
    assert len(report.rewrites) == 3  # the graph around it, and its own parts


def test_a_graph_that_was_tampered_with_is_found() -> None:
    captured = capture(nn.Sequential(conv(), nn.ReLU()).eval())
    assert not trial.run_beside(captured).differing
    (program,) = captured.programs
    relu = list(program.graph.nodes)[2]
    with program.graph.inserting_after(relu):
        twice = program.graph.call_function(torch.mul, (relu, 1.001))
    program.graph.output_node().args = (twice,)
    assert DIFFERS in trial.run_beside(captured).differing[""]
    twice.target = torch.bmm
    assert "raises" in trial.run_beside(captured).differing[""]


def test_nothing_of_the_users_is_written_or_drawn() -> None:
    class Draws(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = conv()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            return self.layer(x) + torch.rand(()) * self.calls

    model = Draws().eval()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    fxrep.optimize(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


INPUTS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "an image": (conv(3, 4), (2, 3, 32, 32)),
    "behind a pooling": (nn.Sequential(nn.MaxPool2d(2), conv(5, 4)), (2, 5, 32, 32)),
    "a sequence": (nn.Conv1d(7, 2, 3), (2, 7, 32)),
    "features": (nn.Sequential(nn.ReLU(), nn.Linear(9, 2)), (2, 9)),
    "a volume": (nn.Sequential(nn.Conv3d(2, 3, 1), nn.BatchNorm3d(3)), (2, 2, 32, 32, 32)),
}


@pytest.mark.parametrize("name", INPUTS)
def test_inputs_are_made_from_what_is_known(name: str) -> None:
    model, shape = INPUTS[name]
    (program,) = capture(nn.Sequential(model).eval()).programs
    made = next(possible_inputs(program, torch.ones(())))
    assert [tuple(t.shape) for t in made.values()] == [shape]


def test_larger_inputs_are_tried() -> None:
    model = nn.Sequential(conv(3, 4, stride=4), conv(4, 4, 3, stride=4), conv(4, 4, 3)).eval()
    assert not trial.run_beside(capture(model)).not_run


def test_the_report_says_that_the_capture_was_not_run() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.a(x.reshape(3, 5, 8, 8))

    report = fxrep.report(fxrep.optimize(Body(forward, a=conv()).eval()))
    (skip,) = report.skipped
    assert skip.pass_name == "capture" and "its graph was not run" in skip.reason


def test_without_validation_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    model = nn.Sequential(conv(), nn.BatchNorm2d(8)).eval()
    monkeypatch.setattr(fx.Interpreter, "run", lambda *_, **__: ran.append(1))
    fxrep.optimize(model, validate=False)
    assert not ran
