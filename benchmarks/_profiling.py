"""What one forward really ran and allocated, as torch's profiler sees it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

# The profiler would announce each start and stop on stderr.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

# Operators that compute nothing: they allocate, or look at a tensor in another way.
_NO_WORK = {
    "alias", "as_strided", "chunk", "detach", "empty", "empty_like", "empty_strided", "expand",
    "flatten", "narrow", "numpy_T", "permute", "reshape", "resize_", "select", "slice", "split",
    "split_with_sizes", "squeeze", "swapaxes", "t", "transpose", "unbind", "unflatten",
    "unsqueeze", "unsafe_split", "view", "view_as",
}  # fmt: skip


@dataclass(frozen=True)
class Profile:
    """One forward.

    Attributes:
        kernels: on CUDA, kernels launched; on a CPU, operators that compute and loops that Inductor
            generated. None where the profiler saw nothing.
        convs: convolutions, however they are spelt. None where it saw none: a CUDA graph replays
            kernels, not operators.
        working: bytes allocated at the peak, beyond what was before.
    """

    kernels: int | None
    convs: int | None
    working: int


def profiled(call: Callable[[], Any], device: torch.device) -> Profile:
    """Profile one forward, which has run before."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    before = torch.cuda.memory_allocated(device) if cuda else 0
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    with profile(activities=activities, profile_memory=not cuda) as result:
        call()
        if cuda:
            torch.cuda.synchronize(device)
    events = result.events() or []
    operators = [e for e in events if _is_operator(e)]
    if cuda:
        kernels = sum(_is_kernel(e) for e in events) or None
        working = torch.cuda.max_memory_allocated(device) - before
    else:
        computing = (e for e in operators if not any(map(_is_operator, _ancestors(e))))
        kernels = sum(_bare(e) not in _NO_WORK for e in computing) + _generated_loops(call)
        working = _peak_on_cpu(result)
    convs = sum(_is_conv(e) and not any(map(_is_conv, _ancestors(e))) for e in operators)
    return Profile(kernels, convs or None, working)


def _is_operator(event: Any) -> bool:
    return "::" in event.name and event.device_type == DeviceType.CPU


def _is_conv(event: Any) -> bool:
    return _is_operator(event) and "conv" in _bare(event)


def _is_kernel(event: Any) -> bool:
    return (
        event.device_type == DeviceType.CUDA
        and not getattr(event, "is_user_annotation", False)
        and not event.name.startswith(("Memcpy", "Memset"))
    )


def _bare(event: Any) -> str:
    return str(event.name).rpartition("::")[2]


def _ancestors(event: Any) -> list[Any]:
    found = []
    while (event := event.cpu_parent) is not None:
        found.append(event)
    return found


def _generated_loops(call: Callable[[], Any]) -> int:
    """Calls of Inductor's C++ loops, which the profiler does not see.

    Each is an extension module of its own with one function, called `kernel`.
    """
    calls = 0

    def watch(frame: Any, event: str, function: Any) -> None:
        nonlocal calls
        if event == "c_call" and function.__name__ == "kernel":
            calls += 1

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(before)
    return calls


def _peak_on_cpu(result: Any) -> int:
    raw = result.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in raw if e.name() == "[memory]")
    held = peak = 0
    for _, size in changes:
        held += size
        peak = max(peak, held)
    return peak
