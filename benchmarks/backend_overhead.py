"""What `torch.compile(backend="fxrep")` costs per call: is each folded weight still right?

    python benchmarks/backend_overhead.py [--quick] [--models timm:resnet18 ...] [--inner eager]

The check is timed alone, with nothing to run behind it, and beside whole calls of the model by
the plain inner backend and by fxrep (batch 1, 224 pixels, medians of one process). Its share is
that of the plain inner backend's time. Exits with 1 if a share is above the budget.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import _results
import _torchvision  # noqa: F401
import torch
from tabulate import tabulate
from torch import nn
from torch.utils.benchmark import Timer

from fxrep._models import load
from fxrep.backend import compile_graph
from fxrep.compiled import Folded, _Compiled, _Kept

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
    seconds = 1.0 if options.quick else 5.0
    rows = [_measure(name, inner, seconds) for name in options.models or MODELS]
    print(tabulate([row.values() for row in rows], list(rows[0]), floatfmt=".3f"))
    _results.write(options.output, "backend_overhead", options, inner=inner, rows=rows)
    return 0 if all(row["share"] <= BUDGET for row in rows) else 1


def _measure(name: str, inner: str, seconds: float) -> dict[str, Any]:
    torch._dynamo.reset()
    example = load(name)
    model, inputs = example.model, example.inputs
    calls: list[tuple[Folded, tuple[Any, ...]]] = []

    def backend(gm: torch.fx.GraphModule, given: Any) -> Callable[..., Any]:
        made = compile_graph(gm, given, options={"inner": inner})
        assert isinstance(made, Folded), made.report  # type: ignore[attr-defined]
        calls.append((made, tuple(given)))
        return made

    with torch.no_grad():
        plain = torch.compile(model, backend=inner)
        before = _median(plain, inputs, seconds)
        torch._dynamo.reset()
        folded = torch.compile(model, backend=backend)
        after = _median(folded, inputs, seconds)
        check = sum(_check(graph, given, seconds) for graph, given in calls)
    return {
        "model": name,
        "weights": len({id(t) for t in _tensors(model)}),
        "graphs": len(calls),
        f"{inner}_ms": before * 1e3,
        "fxrep_ms": after * 1e3,
        "check_us": check * 1e6,
        "share": check / before,
    }


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def _check(graph: Folded, given: tuple[Any, ...], seconds: float) -> float:
    """Seconds of a call of a compiled graph that runs nothing."""
    ((key, kept),) = graph.kept.items()
    idle = _Compiled(lambda *_: None, kept.compiled.take)
    graph.kept[key] = _Kept(
        idle, kept.folded, kept.references, kept.versions, kept.addresses, kept.contents
    )
    return _median(graph, given, seconds)


def _median(call: Callable[..., Any], inputs: tuple[Any, ...], seconds: float) -> float:
    for _ in range(3):
        call(*inputs)
    timer = Timer(
        "call(*inputs)",
        globals={"call": call, "inputs": inputs},
        num_threads=torch.get_num_threads(),
    )
    return float(timer.blocked_autorange(min_run_time=seconds).median)


if __name__ == "__main__":
    sys.exit(main())
