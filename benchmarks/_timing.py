"""Times of several calls measured in turns, by the field's own timers.

On a CPU that is `torch.utils.benchmark`, on CUDA `triton.testing.do_bench`: device events, after a
warm-up, with the L2 cache flushed before every run.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.benchmark import Timer

Call = Callable[[], Any]


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        rounds: turns that each call gets.
        seconds: of one turn.
    """

    rounds: int
    seconds: float


@dataclass(frozen=True)
class Spread:
    """Quartiles of the seconds one call takes.

    Attributes:
        low: the lower quartile.
        median: the median.
        high: the upper quartile.
    """

    low: float
    median: float
    high: float


def spread(seconds: Sequence[float]) -> Spread:
    """The quartiles of some times.

    Raises:
        ValueError: there are none.
    """
    if not seconds:
        raise ValueError("seconds=[] has no quartiles: measure at least once")
    if len(seconds) == 1:
        return Spread(seconds[0], seconds[0], seconds[0])
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return Spread(low, median, high)


def interleaved(
    calls: Mapping[str, Call],
    device: torch.device,
    effort: Effort,
    progress: Callable[[], Any] = lambda: None,
) -> dict[str, Spread]:
    """The times of each call, measured in turns, so that whatever drifts hits all alike.

    Args:
        calls: what to time, by name.
        device: where they run.
        effort: how long.
        progress: called after each turn of each call.
    """
    found: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(effort.rounds):
        # There and back: a slow drift then adds the same to the first as to the last.
        for name in list(calls) if turn % 2 == 0 else reversed(list(calls)):
            found[name] += samples(calls[name], device, effort.seconds)
            progress()
    return {name: spread(seconds) for name, seconds in found.items()}


def samples(call: Call, device: torch.device, seconds: float) -> list[float]:
    """Seconds of single runs of `call`, over about as many seconds as given, after a warm-up."""
    if device.type == "cuda":
        # Comes with torch's CUDA builds, and only with those.
        from triton.testing import do_bench

        milliseconds = do_bench(call, warmup=25, rep=int(seconds * 1e3), return_mode="all")
        return [x / 1e3 for x in milliseconds]
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return list(timer.blocked_autorange(min_run_time=seconds).times)
