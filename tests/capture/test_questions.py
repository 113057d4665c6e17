"""Every question that Python can ask a tensor: answered right, or the forward stays Python code.

A forward branches on the answer, so that a wrong answer is a wrong result.
"""

from __future__ import annotations

import contextlib
import copy
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxrep
from support import questions as asked
from support.check import randomize
from support.profiles import IS_WIDE


class Own(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


class Odd(nn.Module):
    """Does not trace."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.shape[0] == 1 else x


class Asking(nn.Module):
    """A forward is set on subclasses: it branches on the answer to a question."""

    def __init__(s) -> None:
        super().__init__()
        s.c, s.c2 = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        s.b = nn.BatchNorm2d(4)
        s.wide, s.own, s.odd = nn.Conv2d(5, 4, 1), Own(), Odd()


def asking(statement: str) -> Asking:
    """A module whose forward asks one question."""
    asks = textwrap.indent(statement, "    ")
    return module_of(
        f"def forward(s, x):\n    y = s.c(x)\n{asks}\n    return s.b(y) if a else s.c2(y)\n"
    )


def module_of(code: str) -> Asking:
    """A module with the forward that some code defines, prepared by it."""
    names: dict[str, Any] = dict(vars(asked))
    exec(compile(code, f"<question {code!r}>", "exec"), names)
    module: Asking = type("M", (Asking,), {"forward": names["forward"]})()
    names.get("prepare", lambda _: None)(module)
    return module


def outcome(model: nn.Module, x: Tensor, gradients: bool) -> Tensor | Exception:
    try:
        with torch.set_grad_enabled(gradients):
            return model(x.clone()).detach()
    except Exception as error:
        return error


def answer(made: Asking, dtype: torch.dtype, with_examples: bool, gradients: bool) -> str:
    """What became of a question: "equal", "python", "raises" as the original, or what is wrong."""
    model = randomize(made).to(dtype).eval()
    x = torch.randn(1, 4, 6, 6, dtype=dtype)
    others = [x, torch.randn(1, 4, 5, 7, dtype=dtype)]
    expected = outcome(copy.deepcopy(model), x, gradients)
    if with_examples and isinstance(expected, Exception):
        return "raises"
    with torch.set_grad_enabled(gradients):
        try:
            fast = fxrep.optimize(model, x.clone() if with_examples else None)
        except Exception as error:
            return f"WRONG optimize raises {type(error).__name__}: {error}"
    found = "python" if type(fast) is type(model) else "equal"
    if found == "python" and not fxrep.report(fast).skipped:
        return "WRONG left as Python without a reason"
    for each in others:
        for mode in (gradients, not gradients):
            expected = outcome(copy.deepcopy(model), each, mode)
            got = outcome(fast, each, mode)
            if isinstance(expected, Exception):
                continue  # the original does not run
            if isinstance(got, Exception):
                return f"WRONG ({found}) raises {type(got).__name__}: {got}"
            if not torch.allclose(got, expected, atol=1e-5, rtol=1e-4):
                return f"WRONG ({found}) branch"
    return found


SETTINGS = [
    (dtype, with_examples, gradients)
    for dtype in (torch.float32, torch.float64)
    for with_examples in (False, True)
    for gradients in (True, False)
]


def all_right(chosen: list[tuple[str, str]], setting: tuple[torch.dtype, bool, bool]) -> None:
    found = {name: answer(asking(statement), *setting) for name, statement in chosen}
    none_wrong(found)


def none_wrong(found: dict[str, str]) -> None:
    wrong = [f"{name}: {what}" for name, what in found.items() if what.startswith("WRONG")]
    assert not wrong, f"{len(wrong)} of {len(found)}:\n" + "\n".join(wrong)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("turn", range(len(SETTINGS)))
def test_a_question_is_answered_right_or_left_to_python(turn: int) -> None:
    """Each question in one setting."""
    all_right(list(asked.questions())[turn :: len(SETTINGS)], SETTINGS[turn])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("turn", range(len(SETTINGS)))
def test_every_question_in_every_setting(turn: int) -> None:
    """All of them with the wide profile; otherwise a fourth, in turns."""
    chosen = list(asked.questions())
    all_right(chosen if IS_WIDE else chosen[turn % 4 :: 4], SETTINGS[turn])


@contextlib.contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


OTHERWISE: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "gradients": lambda: torch.set_grad_enabled(True),
    "no gradients": torch.no_grad,
    "inference": torch.inference_mode,
    "default dtype": default_dtype,
    "anomalies": lambda: torch.autograd.set_detect_anomaly(True),
    "profiler": torch.autograd.profiler.profile,
    "no cuDNN": lambda: torch.backends.cudnn.flags(enabled=False),
    "no MKLDNN": lambda: torch.backends.mkldnn.flags(enabled=False),
    "no attention": lambda: torch.nn.attention.sdpa_kernel([]),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("otherwise", OTHERWISE)
def test_the_process_may_answer_otherwise_later(otherwise: str) -> None:
    """What was a whole graph, and islands, run in a process whose settings are others."""
    x = torch.randn(1, 4, 6, 6)
    inputs = [x, nn.Parameter(x)]
    found = {}
    for question in asked.MODES.strip().splitlines():
        model = randomize(asking(f"a = {question}")).eval()
        fast = fxrep.optimize(model)
        for value in inputs:
            with OTHERWISE[otherwise]():
                expected = outcome(copy.deepcopy(model), value, torch.is_grad_enabled())
                got = outcome(fast, value, torch.is_grad_enabled())
            if isinstance(expected, Exception):
                continue
            right = isinstance(got, Tensor) and torch.allclose(got, expected, atol=1e-5)
            found[question] = "equal" if right else f"WRONG {got}"
    none_wrong(found)


@pytest.mark.parametrize(
    "statement",
    [
        "a = type(y) is Tensor", "a = isinstance(y, Tensor)", "a = y.__class__ is Tensor",
        "a = torch.jit.isinstance(y, Tensor)", "a = hasattr(y, 'tensors')", "a = callable(y)",
        "a = getattr(y, 'mask', None) is None", "a = dispatched(y)", "a = s.c is s.c2",
        "a = torch.jit.is_scripting()", "a = y is not None", "a = hasattr(x, 'shape')",
        asked.STATEMENTS["match_class"], asked.STATEMENTS["no_attribute"],
        asked.STATEMENTS["expected_argument"], asked.STATEMENTS["no_expected_argument"],
    ],
)  # fmt: skip
def test_a_certain_answer_lets_the_forward_fold(statement: str) -> None:
    assert answer(asking(statement), torch.float32, False, True) == "equal"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("place", asked.PLACES)
def test_a_question_is_heard_wherever_it_is_asked(place: str) -> None:
    sources = {
        question: asked.PLACES[place].replace("QUESTION", question) for question in asked.SILENT
    }
    none_wrong({q: answer(module_of(s), torch.float32, False, True) for q, s in sources.items()})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("place", asked.SAME)
def test_identity_is_heard_in_code_that_sees_two_values_only(place: str) -> None:
    code = asked.SAME[place].replace("QUESTION", "y is x")
    none_wrong({place: answer(module_of(code), torch.float32, False, True)})
