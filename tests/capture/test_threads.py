"""Capturing belongs to one thread, and is undone wherever it ends."""

from __future__ import annotations

import contextlib
import gc
import math
import random
import sys
import threading
from collections.abc import Callable, Iterator
from math import sqrt
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import _symbolic_trace as fx_trace
from torch.utils._python_dispatch import TorchDispatchMode

import fxrep
from fxrep.capture.locks import _locks
from fxrep.capture.namespaces import _replaced as _names
from fxrep.capture.standins import OF_TORCH
from fxrep.errors import FxrepError
from support.check import randomize


class Asking(nn.Module):
    """A forward that asks what only a substituted name can answer, and calls back meanwhile."""

    def __init__(self, meanwhile: Callable[[], object] = lambda: None, width: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.block = nn.Sequential(nn.Conv2d(width, width, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.meanwhile = [meanwhile]

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor) or not torch.is_tensor(x):
            raise TypeError("no tensor")
        y = self.block(self.norm(self.conv(x)))
        self.meanwhile[0]()
        return y / (sqrt(y.shape[1]) + math.floor(math.sqrt(y.shape[2])))


@pytest.fixture(autouse=True, scope="module")
def _imported() -> None:
    """Parts of torch that are imported, and change torch, when they are first used."""
    fxrep.optimize(Asking().eval(), torch.randn(1, 3, 8, 8))


def the_process() -> list[object]:
    """All that a patch could change and another thread, or later code, could meet."""
    found: list[object] = []
    for kind in (
        nn.Module, nn.Sequential, nn.Conv2d, Tensor, nn.Parameter, torch.autocast, torch.no_grad,
        torch.enable_grad, torch.inference_mode, torch.set_grad_enabled, fx_trace.Tracer,
    ):  # fmt: skip
        found += [(kind, name, id(value)) for name, value in vars(kind).items()]
    for home in (sys.modules["math"], torch, F, torch.random, random):
        found += [(home, name, id(value)) for name, value in vars(home).items()]
    return [*found, getattr(fx_trace, "_is_fx_tracing_flag", None)]


def this_thread() -> tuple[object, ...]:
    nested = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    with Count() as modes:
        torch.ones(1)
    return (
        torch.is_grad_enabled(), torch.is_inference_mode_enabled(), nested, modes.seen,
        torch._C._is_torch_function_enabled(),
        torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack(),
    )  # fmt: skip


class Count(TorchDispatchMode):
    """Counts operations: none, where the modes of the thread are disabled."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += 1
        return func(*args, **(kwargs or {}))


def batchnorms(model: nn.Module) -> int:
    return sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


def all_are_free() -> bool:
    """Whether the calling thread could take every lock."""
    for lock in _locks:
        if not lock.acquire(blocking=False):
            return False
        lock.release()
    return True


def in_a_thread(run: Callable[[], object]) -> object:
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(run()))
    thread.start()
    thread.join()
    return found[0]


@contextlib.contextmanager
def notes() -> Iterator[list[Any]]:
    """What `note` is told: kept where no forward can reach it, as writing it would be an effect."""
    home = vars(threading.main_thread())
    home["notes"] = []
    try:
        yield home["notes"]
    finally:
        del home["notes"]


def note(value: object) -> int:
    """Keep a value; how many are kept."""
    kept = vars(threading.main_thread())["notes"]
    kept.append(value)
    return len(kept)


def test_no_other_thread_sees_a_trace() -> None:
    """But for some functions of torch, which give other threads what they always did.

    The names in the module that a model is written in do so, too.
    """
    before = the_process()

    def look() -> object:
        changed = [a for a, b in zip(before, the_process(), strict=True) if a != b]
        with torch.no_grad():  # a context that a trace refuses, in the thread that traces
            answers = isinstance(1, int), isinstance(1, str), torch.is_tensor(torch.ones(1))
        return (
            changed,
            answers,
            torch.zeros(2, 3),
            math.sqrt(4),
            sqrt(9),
            nn.Conv2d(1, 1, 1)(torch.ones(1, 1, 1, 1)),
        )

    with notes() as seen:
        fast = fxrep.optimize(randomize(Asking(lambda: note(in_a_thread(look)))).eval())
    assert batchnorms(fast) == 0 and len(seen) == 3  # traced once, then run twice on a copy
    changed, answers, zeros, *_ = seen[0]
    assert {name for _, name, _ in changed} == set(OF_TORCH)
    assert torch.equal(zeros, torch.zeros(2, 3))
    assert answers == (True, False, True)
    assert the_process() == before and not _names and "isinstance" not in globals()


def test_two_captures_share_the_names() -> None:
    """The one that ends first must not take the names away from the other."""
    first, second = threading.Event(), threading.Event()
    results: list[nn.Module] = []

    def wait() -> None:
        first.set()
        assert second.wait(60)

    thread = threading.Thread(
        target=lambda: results.append(fxrep.optimize(randomize(Asking(wait)).eval()))
    )
    thread.start()
    assert first.wait(60)
    results.append(fxrep.optimize(randomize(Asking()).eval()))  # ends while the other is at it
    assert _names
    second.set()
    thread.join()
    assert [batchnorms(each) for each in results] == [0, 0], fxrep.report(results[-1])
    assert not _names and "isinstance" not in globals() and math.sqrt is vars(math)["sqrt"]


def test_names_that_another_capture_replaces_are_not_written_by_a_forward() -> None:
    """One model is run, to check its capture, while the capture of another begins or ends."""
    first, second, ended = threading.Event(), threading.Event(), threading.Event()
    results: list[nn.Module] = []
    with notes():

        def wait() -> None:
            if note("call") > 1:  # the trace is over: the capture is run
                first.set()
                assert second.wait(60)

        def go_on() -> None:
            second.set()  # the first ends while this one is traced
            assert ended.wait(60)

        def run() -> None:
            results.append(fxrep.optimize(randomize(Asking(wait)).eval()))
            ended.set()

        thread = threading.Thread(target=run)
        thread.start()
        assert first.wait(60)
        results.append(fxrep.optimize(randomize(Asking(go_on)).eval()))
        thread.join()
    for fast in results:
        assert batchnorms(fast) == 0, str(fxrep.report(fast))
    assert not _names and "isinstance" not in globals() and math.sqrt is vars(math)["sqrt"]


def test_numbers_drawn_by_another_thread_are_not_the_forwards() -> None:
    """Torch's generator is watched call by call; of the others, a quiet moment is waited for."""
    stop = threading.Event()

    def draw(left: list[Any]) -> object:
        return torch.rand(1), left and left.pop()()

    def drawn_by_another() -> None:
        in_a_thread(lambda: draw(vars(threading.main_thread())["notes"]))

    other = threading.Thread(target=stop.wait)
    other.start()
    with notes() as left:
        left += [random.random, np.random.rand]
        fast = fxrep.optimize(randomize(Asking(drawn_by_another)).eval())
    stop.set()
    assert batchnorms(fast) == 0, fxrep.report(fast)


class Drawing(Asking):
    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.norm(self.conv(x))) * self.draw()


@pytest.mark.parametrize(
    "draw",
    [
        lambda: random.random(), lambda: random.gauss(0, 1), lambda: float(np.random.rand()),
        lambda: float(torch.rand(())), lambda: float(torch.empty(()).normal_()),
        lambda: float(torch.randint(9, ())), lambda: float(torch.bernoulli(torch.tensor(0.5))),
        lambda: float(F.dropout(torch.ones(()), 0.5, True)), lambda: float(torch.randperm(9)[0]),
        lambda: float(torch.rand((), generator=torch.Generator().manual_seed(3))),
    ],
)  # fmt: skip
def test_drawn_numbers_are_not_baked_in(
    draw: Callable[[], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    for home in ("state", "tracer", "trace"):  # what runs these tests has threads of its own
        monkeypatch.setattr(f"fxrep.capture.{home}.is_only_thread", lambda: True)
    model = Drawing(draw).eval()
    states = random.getstate(), np.random.get_state()[2], torch.get_rng_state()
    fast = fxrep.optimize(model)
    assert random.getstate() == states[0] and np.random.get_state()[2] == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert type(fast) is Drawing, "a graph would hold one number for good"


# --- interrupts ----------------------------------------------------------------------------------

_WATCHED = (
    "islands", "trace", "tracer", "hollow", "modes", "substitution", "state", "snapshot", "kept",
    "namespaces", "answers",
)  # fmt: skip


class Interrupt:
    """Raises KeyboardInterrupt at one instruction of what captures a model, or of a context."""

    def __init__(self, at: int) -> None:
        self.at, self.count = at, 0
        home = Path(fxrep.__file__).parent
        self.files = {str(home / "capture" / f"{name}.py") for name in _WATCHED}
        self.files |= {str(home / "pipeline.py"), __file__}
        self.files |= {contextlib_file(), torch.random.__file__, torch.autograd.grad_mode.__file__}

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename not in self.files:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            self.count += 1
            if self.count == self.at:
                raise KeyboardInterrupt
        return self


def contextlib_file() -> str:
    import contextlib

    return contextlib.__file__


def interrupted(model: nn.Module, at: int) -> int:
    """Optimize with an interrupt at an instruction; the number of instructions it got to."""
    tracer, before = Interrupt(at), sys.gettrace()
    sys._getframe().f_trace_opcodes = True  # Python 3.12 asks whether any frame has it, here only
    gc.disable()  # CPython runs the callbacks of a collection with the error set, and loses it
    sys.settrace(tracer)
    try:
        fxrep.optimize(model, passes=["batchnorm"], validate=False)
    except (KeyboardInterrupt, FxrepError, RuntimeError):
        pass
    finally:
        sys.settrace(before)  # a debugger's, or that of coverage
        gc.enable()
    return tracer.count


def everywhere(positions: Iterator[int]) -> None:
    model = randomize(Asking()).eval()
    x = torch.randn(1, 3, 8, 8)
    expected = model(x)
    gc.collect()
    before, modes, weights = the_process(), this_thread(), dict(model.state_dict())
    for at in positions:
        interrupted(model, at)
        assert the_process() == before and this_thread() == modes, f"instruction {at}"
        assert not _names and "isinstance" not in globals(), f"instruction {at}"
        assert in_a_thread(all_are_free), f"instruction {at}"
        assert globals()["math"] is math and globals()["sqrt"] is math.sqrt
        now = model.state_dict()
        assert all(now[k].data_ptr() == v.data_ptr() for k, v in weights.items())
    assert torch.equal(model(x), expected)
    assert batchnorms(fxrep.optimize(model)) == 0


class Interrupted(Asking):
    """Leaves what an interrupt at the end of a `with` leaves."""

    def forward(self, x: Tensor) -> Tensor:
        torch._C.DisableTorchFunction().__enter__()
        for lock in _locks:
            lock.acquire()
        raise KeyboardInterrupt


def test_an_interrupt_in_a_context_leaves_nothing_behind() -> None:
    before = this_thread()
    with pytest.raises(KeyboardInterrupt):
        fxrep.optimize(Interrupted().eval())
    assert this_thread() == before and in_a_thread(all_are_free)


def test_an_interrupt_leaves_nothing_behind() -> None:
    last = interrupted(randomize(Asking()).eval(), -1)
    everywhere(iter(random.Random(0).sample(range(1, last), 60)))


@pytest.mark.slow
def test_an_interrupt_at_any_instruction_leaves_nothing_behind() -> None:
    last = interrupted(randomize(Asking()).eval(), -1)
    everywhere(iter(range(1, last, max(last // 1000, 1))))


# --- stress --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_optimizing_serving_and_training_at_once() -> None:
    """For a while: two threads optimize, one serves, one trains and draws numbers."""
    failures: list[BaseException] = []
    rounds, stop = 4, threading.Event()
    served = randomize(Asking(width=8)).eval()
    x = torch.randn(2, 3, 16, 16)
    expected = served(x)
    before = the_process()

    def guarded(work: Callable[[], None]) -> threading.Thread:
        def run() -> None:
            try:
                work()
            except BaseException as error:
                failures.append(error)
                stop.set()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread

    def optimize() -> None:
        for turn in range(rounds):
            model = randomize(Asking(width=4 + turn % 3)).eval()
            fast = fxrep.optimize(model, x)
            assert batchnorms(fast) == 0, fxrep.report(fast)
            assert torch.allclose(fast(x), model(x), atol=1e-5)

    def serve() -> None:
        while not stop.is_set():
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                assert torch.equal(served(x), expected)
            assert isinstance(x, Tensor) and torch.is_tensor(x)

    def train() -> None:
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.ReLU())
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        while not stop.is_set():
            optimizer.zero_grad()
            model(torch.randn(2, 3, 8, 8) * 2).sum().backward()
            optimizer.step()
            model.extra = nn.Identity()
            with torch.inference_mode():
                model(x)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # threads take turns often: more can go wrong, and none waits long
    try:
        optimizers = [guarded(optimize), guarded(optimize)]
        others = [guarded(serve), guarded(train)]
        for thread in optimizers:
            thread.join(300)
        stop.set()
        for thread in others:
            thread.join(60)
    finally:
        sys.setswitchinterval(interval)
    assert not any(thread.is_alive() for thread in optimizers + others), "waits for another"
    assert not failures, failures
    assert the_process() == before and not _names
