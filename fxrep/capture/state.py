"""The generators of random numbers that the whole process shares."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator

import torch


def _on_cuda() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


class GeneratorStates:
    """The states of the generators of `random` and NumPy, which the whole process shares.

    Torch's own generators are watched call by call, in `fxrep.capture.modes`.
    """

    def __init__(self) -> None:
        self.python = random.getstate()
        numpy = sys.modules.get("numpy")
        self.numpy = None if numpy is None else numpy.random.get_state(legacy=True)

    def changed(self) -> bool:
        """Whether this thread or another has drawn numbers since the states were recorded."""
        now = GeneratorStates()
        if self.python != now.python:
            return True
        if self.numpy is None or now.numpy is None:
            return False
        changed = self.numpy[1].tobytes() != now.numpy[1].tobytes()
        return bool(changed or self.numpy[2] != now.numpy[2])

    def restore(self) -> None:
        """Set the generators to the states that were recorded."""
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)


def is_only_thread() -> bool:
    """Whether no other thread runs Python code."""
    return len(sys._current_frames()) == 1


@contextlib.contextmanager
def unchanged_random_state(*, despite_other_threads: bool = False) -> Iterator[None]:
    """Restore all random number generators at the end, so that running a model changes none.

    Without `despite_other_threads` nothing is restored while other threads run.

    Args:
        despite_other_threads: restore the generators even if other threads run; the numbers that
            those threads draw meanwhile are then drawn a second time.
    """
    if not despite_other_threads and not is_only_thread():
        yield
        return
    states = GeneratorStates()
    devices = [torch.cuda.current_device()] if _on_cuda() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        states.restore()
