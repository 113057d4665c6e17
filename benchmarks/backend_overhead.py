"""What `torch.compile(backend="fxrep")` costs per call: is each folded weight still right?

    python benchmarks/backend_overhead.py [--quick] [--models timm:resnet18 ...] [--inner eager]

Whole calls of a compiled model (batch 1, 224 pixels) take turns: with the checks, and the same
compiled graphs without them. The checks are timed inside the calls, where they find caches as the
model leaves them; the median difference between neighbours with and without them is printed beside
it. The plain inner backend is timed afterwards. Exits with 1 if the checks take more than the
budget of the model's run time there; the share of the folded model's own time stands beside it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from statistics import median
from time import perf_counter
from typing import Any

import _results
import _torchvision  # noqa: F401
import torch
from tabulate import tabulate

from fxrep.cli.models import load
from fxrep.torch_compile.backend import compile_graph
from fxrep.torch_compile.compiled import Folded, _CachedWeights, _Compiled

MODELS = ("timm:resnet18", "timm:repvgg_a0", "timm:mobileone_s0")
BUDGET = 0.05


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    _results.add_options(parser)
    parser.add_argument("--models", nargs="+", help="these instead, such as timm:resnet50")
    parser.add_argument("--inner", help="the inner backend (default: inductor; quick: eager)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    inner = options.inner or ("eager" if options.quick else "inductor")
    seconds = 4.0 if options.quick else 30.0
    rows = [_measure(name, inner, seconds) for name in options.models or MODELS]
    print(tabulate([row.values() for row in rows], list(rows[0]), floatfmt=".3f"))
    _results.write(
        options.output, "backend_overhead", options, inner=inner, budget=BUDGET, rows=rows
    )
    within = all(row[f"of_{inner}"] <= BUDGET for row in rows)
    return 0 if within or options.quick else 1  # too short a run to judge by


class Switched:
    """A compiled graph that runs with its checks or without, and times them inside its calls."""

    checks = True
    seconds = 0.0  # of all checks, since somebody set it to 0

    def __init__(self, graph: Folded) -> None:
        self.graph = graph
        self.started = 0.0
        ((key, cached),) = graph.cache.items()
        self.cached = cached

        def take(args: Sequence[Any]) -> tuple[Any, ...]:  # the first thing after the checks
            Switched.seconds += perf_counter() - self.started
            return cached.compiled.take(args)

        fields = {name: getattr(cached, name) for name in _CachedWeights.__dataclass_fields__}
        graph.cache[key] = _CachedWeights(
            **fields | {"compiled": _Compiled(cached.compiled.run, take)}
        )

    def __call__(self, *args: Any) -> Any:
        if self.checks:
            self.started = perf_counter()
            return self.graph(*args)
        compiled = self.cached.compiled
        return compiled.run(*compiled.take(args), *self.cached.folded)


def _measure(name: str, inner: str, seconds: float) -> dict[str, Any]:
    torch._dynamo.reset()
    example = load(name)
    model, inputs = example.model, example.inputs
    graphs: list[Switched] = []

    def backend(gm: torch.fx.GraphModule, given: Any) -> Callable[..., Any]:
        made = compile_graph(gm, given, options={"inner": inner})
        assert isinstance(made, Folded), made.report  # type: ignore[attr-defined]
        graphs.append(Switched(made))
        return graphs[-1]

    plain = torch.compile(lambda *args: model(*args), backend=inner)
    folded = torch.compile(lambda *args: model(*args), backend=backend)
    times: dict[str, list[float]] = {"plain": [], "with": [], "without": [], "check": []}
    with torch.no_grad():
        for _ in range(3):
            plain(*inputs)
            folded(*inputs)
        end = perf_counter() + seconds
        while perf_counter() < end:
            for turn in ("with", "without", "without", "with"):
                Switched.checks, Switched.seconds = turn == "with", 0.0
                times[turn].append(_seconds(folded, inputs))
                if Switched.checks:
                    times["check"].append(Switched.seconds)
        end = perf_counter() + seconds / 2
        while perf_counter() < end:
            times["plain"].append(_seconds(plain, inputs))
    medians = {turn: median(seen) for turn, seen in times.items()}
    differences = [a - b for a, b in zip(times["with"], times["without"], strict=True)]
    return {
        "model": name,
        "graphs": len(graphs),
        "weights": sum(len(graph.cached.storages) for graph in graphs),
        "calls": len(times["with"]),
        f"{inner}_ms": medians["plain"] * 1e3,
        "fxrep_ms": medians["with"] * 1e3,
        "unchecked_ms": medians["without"] * 1e3,
        "check_us": medians["check"] * 1e6,
        "difference_us": median(differences) * 1e6,
        f"of_{inner}": medians["check"] / medians["plain"],
        "of_fxrep": medians["check"] / medians["with"],
    }


def _seconds(call: Callable[..., Any], inputs: Sequence[Any]) -> float:
    started = perf_counter()
    call(*inputs)
    return perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
