"""What `fxrep.optimize` costs: time in forward passes, growth with the model, peak memory.

    python benchmarks/optimize_cost.py [--quick] [--models torchvision:resnet50 ...]

Times are medians in one process, forwards and optimizes in turns. Memory is the rise of the peak
resident set over its value before the call, in a process of its own, in multiples of the model's
parameters (the result itself is one of them).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _results
import _torchvision  # noqa: F401
import torch
from tabulate import tabulate
from torch import nn

import fxrep
from fxrep.cli.demo import RepVGG, randomize_batchnorm
from fxrep.cli.models import load

# The most forward passes that optimize may take (batch 1, 224 pixels, validation on).
BUDGETS = {"torchvision:resnet50": 12, "repvgg_a0": 25, "timm:mobileone_s0": 25}
GROWTH_BLOCKS = (8, 64)
GROWTH_BUDGET = 10.0
MEMORY_BUDGET = 3.0


def main() -> int:
    options = _parser().parse_args()
    if options.memory_of:
        print(json.dumps(_measure_memory(options.memory_of)))
        return 0
    if options.threads:
        torch.set_num_threads(options.threads)
    rounds = 3 if options.quick else 7
    rows = [_measure(name, rounds) for name in options.models or BUDGETS]
    growth = _growth(rounds)
    print(tabulate([r.values() for r in rows], list(rows[0]), floatfmt=".2f"))
    print("\n" + tabulate(growth.items(), tablefmt="plain", floatfmt=".2f"))
    _results.write(options.output, "optimize_cost", options, rows=rows, growth=growth)
    within = all(map(_within, rows)) and growth["ratio"] <= GROWTH_BUDGET
    return 0 if within or options.quick else 1  # too short a run to judge by


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    _results.add_options(parser)
    parser.add_argument("--models", nargs="+", help="these instead, such as timm:resnet18")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    return parser


def _within(row: dict[str, Any]) -> bool:
    in_time = row["budget"] is None or row["forwards"] <= row["budget"]
    return in_time and (row["memory_x"] is None or row["memory_x"] < MEMORY_BUDGET)


def _measure(name: str, rounds: int) -> dict[str, Any]:
    example = load(name)
    model, inputs = example.model, example.inputs
    with torch.no_grad():
        forward, optimize = _interleaved(
            [lambda: model(*inputs), lambda: fxrep.optimize(model)], rounds
        )
    memory = _memory(name)
    return {
        "model": name,
        "forward_s": forward,
        "optimize_s": optimize,
        "forwards": optimize / forward,
        "budget": BUDGETS.get(name),
        "parameters_MiB": memory["parameters"] / 2**20,
        "extra_peak_MiB": None if memory["extra"] is None else memory["extra"] / 2**20,
        "memory_x": None if memory["extra"] is None else memory["extra"] / memory["parameters"],
    }


def _interleaved(runs: list[Callable[[], Any]], rounds: int) -> list[float]:
    """Median seconds of each, in turns; the first turn warms up and does not count."""
    times: list[list[float]] = [[] for _ in runs]
    for turn in range(rounds + 1):
        for run, found in zip(runs, times, strict=True):
            gc.collect()
            # A forward takes milliseconds: the median of several makes one turn.
            repeats = 10 if run is runs[0] else 1
            single = []
            for _ in range(repeats):
                start = time.perf_counter()
                run()
                single.append(time.perf_counter() - start)
            if turn:
                found.append(statistics.median(single))
    return [statistics.median(found) for found in times]


def _growth(rounds: int) -> dict[str, float]:
    """Seconds of optimize for RepVGG stages of 8 and of 64 blocks of 16 channels."""
    seconds = []
    for blocks in GROWTH_BLOCKS:
        model = RepVGG((16,), (blocks,), classes=10).eval()
        randomize_batchnorm(model)
        seconds.append(_interleaved([lambda m=model: fxrep.optimize(m)] * 2, rounds)[1])
    small, large = seconds
    return {f"{GROWTH_BLOCKS[0]}_blocks_s": small, f"{GROWTH_BLOCKS[1]}_blocks_s": large,
            "ratio": large / small}  # fmt: skip


def _memory(name: str) -> dict[str, Any]:
    """Bytes of the parameters, and by how much optimize raised the peak, in a new process."""
    # Large blocks go straight to and from the system: the peak is then what is really held.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, str(Path(__file__)), "--memory-of", name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _measure_memory(name: str) -> dict[str, Any]:
    warm_up = RepVGG((8, 8), (2, 2), classes=10).eval()
    fxrep.optimize(warm_up)  # imports and caches are not the model's
    model: nn.Module = load(name).model
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
        before = _status("VmRSS")
        optimized = fxrep.optimize(model)
        extra: int | None = _status("VmHWM") - before
        del optimized
    except OSError:  # no /proc
        extra = None
    return {"parameters": size, "extra": extra}


def _status(key: str) -> int:
    """A figure of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


if __name__ == "__main__":
    sys.exit(main())
