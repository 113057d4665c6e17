"""``python -m fxrep [MODEL]``: re-parameterize a network, compare it, time it."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tabulate import tabulate
from torch import nn
from torch.utils.benchmark import Timer

import fxrep
from fxrep.cli.models import BUILT_IN, load

ROUNDS = 9  # alternating, so that a slow moment of the machine hits both models
SECONDS_PER_ROUND = 0.25


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: the words after ``python -m fxrep``; by default those of the process.

    Returns:
        0, or 1 after printing why the model could not be optimized.
    """
    options = _parser().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        return _run(options)
    except fxrep.FxrepError as error:
        print(f"fxrep: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fxrep",
        description="Re-parameterize a network: print what was fused, what was not and why, how "
        "far the results moved and how much faster it runs here. Weights are random; nothing is "
        "downloaded.",
    )
    parser.add_argument(
        "model",
        nargs="?",
        default=BUILT_IN,
        help="timm:NAME, torchvision:NAME or package.module:factory "
        "(default: a RepVGG-A0 built in place)",
    )
    parser.add_argument("--size", type=_positive, help="height and width of the images in pixels")
    parser.add_argument("--batch", type=_positive, default=1, help="images per batch (default 1)")
    parser.add_argument("--threads", type=_positive, help="torch threads (default: torch's own)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def _run(options: argparse.Namespace) -> int:
    example = load(options.model, options.size, options.batch)
    start = time.perf_counter()
    optimized = fxrep.optimize(example.model, example.inputs)
    seconds = time.perf_counter() - start
    report = fxrep.report(optimized)
    before, after = _interleaved(example.model, optimized, example.inputs)
    threads, setting = torch.get_num_threads(), _setting(example.inputs)
    if options.json:
        result = {
            "model": example.name,
            "torch": torch.__version__,
            "threads": threads,
            "inputs": setting,
            "optimize_seconds": seconds,
            "milliseconds_before": before,
            "milliseconds_after": after,
            "speedup": before / after,
            "report": report.to_dict(),
        }
        print(json.dumps(result, indent=2))
        return 0
    print(report)
    rows = [
        ("model", f"{example.name}, input {setting}, random weights"),
        ("optimize", f"{seconds:.2f} s"),
        ("largest error against float64", f"{_error(report.error)} after optimize"),
        ("", f"{_error(report.baseline_error)} before (rounding alone)"),
        ("time of one forward", f"{before:.2f} ms before, {after:.2f} ms after"),
        ("speed-up", f"{before / after:.2f}x  (torch {torch.__version__}, CPU, {threads} threads)"),
    ]
    print("\n" + tabulate(rows, tablefmt="plain", disable_numparse=True))
    return 0


def _error(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1e}"


def _setting(inputs: tuple[Any, ...]) -> str:
    leaves = torch.utils._pytree.tree_leaves(inputs)
    return ", ".join("x".join(map(str, x.shape)) for x in leaves if isinstance(x, torch.Tensor))


def _interleaved(
    first: nn.Module, second: nn.Module, inputs: tuple[Any, ...]
) -> tuple[float, float]:
    """Median milliseconds of one forward of each model, measured in turns."""
    threads = torch.get_num_threads()
    timers = [_timer(model, inputs, threads) for model in (first, second)]
    with torch.no_grad():
        runs = [max(1, int(SECONDS_PER_ROUND / timer.timeit(1).median)) for timer in timers]
        times: list[list[float]] = [[], []]
        for _ in range(ROUNDS):
            for index, timer in enumerate(timers):
                times[index].append(timer.timeit(runs[index]).median * 1e3)
    return statistics.median(times[0]), statistics.median(times[1])


def _timer(model: nn.Module, inputs: tuple[Any, ...], threads: int) -> Timer:
    run: Callable[[], Any] = lambda: model(*inputs)  # noqa: E731
    return Timer("run()", globals={"run": run}, num_threads=threads)


if __name__ == "__main__":
    sys.exit(main())
