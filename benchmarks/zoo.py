"""One model of every timm and torchvision family: what fxrep and its peers leave, and how exactly.

    python benchmarks/zoo.py [--quick] [--models timm:resnet18 ...] [--family timm.byobnet ...]

Every model has random weights and randomised BatchNorm statistics, runs at the size it was made
for, and is optimized without example inputs; the comparison is this script's own.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import _results
import _torchvision  # noqa: F401
import torch
from _comparison import (
    EXACT32,
    EXACT64,
    Row,
    Run,
    counts,
    double,
    peer,
    peer_cell,
    plain_run,
    shapes,
    short,
    steady_reference,
    values,
)
from _counting import relative_error
from tabulate import tabulate
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse as torch_fuse

import fxrep
from fxrep.cli.models import load

LIST = Path(__file__).with_name("models.txt")
QUICK = ("timm:repvgg_a0", "timm:repghostnet_050", "timm:levit_128s", "torchvision:mobilenet_v2")
# Their authors wrote converters: the yardstick for convolutions, BatchNorms and operators left.
YARDSTICK = (
    "repvgg_a0", "mobileone_s0", "mobileone_s4", "fastvit_t8", "repvit_m1", "repghostnet_050",
    "levit_128s", "efficientvit_m0", "shvit_s1",
)  # fmt: skip
# None has a converter, all have something to fold.
OTHERS = ("resnet18", "densenet121", "swiftformer_xs", "starnet_s050")


def main() -> int:
    options = _parser().parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    rows = []
    for family, name in _chosen(options):
        row = measure(family, name)
        rows.append(row)
        print(_progress(row), flush=True)
        gc.collect()
        summary = totals(rows)  # written after each model: a run that is cut off keeps its rows
        _results.write(options.output, "zoo", options, totals=summary, rows=rows)
    print("\n" + table(rows))
    print("\n" + tabulate(summary.items(), tablefmt="plain", disable_numparse=True))
    return 0 if summary["optimized"] == summary["exact"] == summary["models"] else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    _results.add_options(parser)
    parser.add_argument("--models", nargs="+", help="these instead, such as timm:resnet18")
    parser.add_argument("--family", nargs="+", help="these families only, such as timm.byobnet")
    return parser


def _chosen(options: argparse.Namespace) -> list[tuple[str, str]]:
    if options.models or options.quick:
        return [("", name) for name in options.models or QUICK]
    lines = [x.split() for x in LIST.read_text().splitlines() if not x.startswith("#")]
    lines.sort(key=lambda line: int(line[2]))  # small models first
    listed = [(family, name) for family, name, _ in lines]
    if options.family:
        return [pair for pair in listed if pair[0] in options.family]
    known = {name for _, name in listed}
    extra = [f"timm:{name}" for name in (*YARDSTICK, *OTHERS)]
    return [("", name) for name in extra if name not in known] + listed


def measure(family: str, name: str) -> Row:
    """One row; a model that fails anywhere says where and why."""
    row: Row = {"family": family, "model": name}
    stage = "load"
    try:
        example = load(name)
        model, inputs = example.model, example.inputs
        row["parameters"] = sum(p.numel() for p in model.parameters())
        row["input"] = shapes(inputs)
        stage = "run"
        run = _runner(model)
        reference, exact = steady_reference(model, run, inputs, row)
        row["before"] = counts(run, model, inputs)
        stage = "optimize"
        start = time.perf_counter()
        optimized = fxrep.optimize(model)
        row["seconds"] = time.perf_counter() - start
        stage = "run optimized"
        row["error"] = relative_error(values(run, optimized, inputs), reference)
        row["after"] = counts(run, optimized, inputs)
        report = fxrep.report(optimized)
        row["rewrites"], row["skipped"] = len(report.rewrites), len(report.skipped)
        named = sum(skip.pass_name in ("batchnorm", "branches") for skip in report.skipped)
        row["unexplained"] = max(0, row["after"]["directly_after_conv"] - named)
        del optimized
        stage = "optimize in float64"
        if exact is not None:
            doubled = fxrep.optimize(exact)
            row["error64"] = relative_error(values(run, doubled, double(inputs)), reference)
            del doubled, exact
        row["torch_fuse"] = peer(torch_fuse, run, model, inputs, reference)
        if name.startswith("timm:"):
            author = peer(_author, run, model, inputs, reference)
            changed = author.get("counts") != row["before"]
            row["author"] = author if changed else None
    except Exception as error:
        row["failed"] = f"{stage}: {short(error)}"
    return row


def _author(model: nn.Module) -> nn.Module:
    from timm.utils.model import reparameterize_model

    converted: nn.Module = reparameterize_model(model)
    return converted


def _runner(model: nn.Module) -> Run:
    """How to run a model: detectors by their dense parts, as boxes jump at the least rounding."""
    if type(model).__module__.startswith("torchvision.models.detection"):
        return _dense_parts
    return plain_run


def _dense_parts(model: Any, images: list[Tensor]) -> list[Any]:
    features = model.backbone(torch.stack(images))
    features = list(features.values()) if isinstance(features, dict) else [features]
    if not hasattr(model, "rpn"):
        return [features, model.head(features)]
    heads = model.roi_heads
    crops = torch.linspace(-1, 1, 2 * features[0].shape[1] * 49, dtype=features[0].dtype)
    results = [features, model.rpn.head(features)]
    crops = crops.reshape(2, features[0].shape[1], 7, 7)
    results.append(heads.box_predictor(heads.box_head(crops)))
    for part in ("mask", "keypoint"):
        if getattr(heads, f"{part}_head", None) is not None:
            head, predictor = getattr(heads, f"{part}_head"), getattr(heads, f"{part}_predictor")
            results.append(predictor(head(crops)))
    return results


def totals(rows: list[Row]) -> dict[str, Any]:
    """The sums the README quotes."""
    done = [row for row in rows if "after" in row]
    fused = [row["torch_fuse"] for row in rows if "torch_fuse" in row]
    pairs = [
        (row["before"]["batch_norms"], row["torch_fuse"]["counts"]["batch_norms"])
        for row in rows
        if "counts" in row.get("torch_fuse", {}) and row["before"]["batch_norms"]
    ]
    result: dict[str, Any] = {
        "models": len(rows),
        "optimized": len(done),
        "exact": sum(_exact(row) for row in done),
        "more MACs": sum(r["after"]["macs"] > r["before"]["macs"] for r in done),
        "unexplained BatchNorms after a convolution": sum(row["unexplained"] for row in done),
    }
    for key in ("convs", "batch_norms", "ops", "macs"):
        before, after = (sum(row[x][key] for row in done) for x in ("before", "after"))
        result[key] = f"{before:,} -> {after:,}"
    with_norms = [row for row in done if row["before"]["batch_norms"]]
    result |= {
        "models with BatchNorms": len(with_norms),
        "all folded by fxrep": sum(not row["after"]["batch_norms"] for row in with_norms),
        "torch.fx fuse raises": sum("raises" in peer for peer in fused),
        "torch.fx fuse folds all": sum(not left for _, left in pairs),
        "torch.fx fuse folds none": sum(left == had for had, left in pairs),
    }
    return result


def _exact(row: Row) -> bool:
    return bool(row["error"] <= EXACT32 and row.get("error64", 0.0) <= EXACT64)


def _progress(row: Row) -> str:
    if "failed" in row:
        return f"{row['model']}: FAILED in {row['failed']}"
    return f"{row['model']}: {_arrow(row, 'batch_norms')} BatchNorms, error {row['error']:.1e}"


def table(rows: list[Row]) -> str:
    """The rows as text; `a -> b` is before -> after fxrep."""
    headers = (
        "model", "convs", "BNs", "ops", "GMACs", "float32", "float64", "s", "torch.fx fuse",
        "author: convs, BNs, ops",
    )  # fmt: skip
    cells = []
    for row in rows:
        if "after" not in row:
            cells.append((row["model"], row.get("failed", "")))
            continue
        macs = "{:.3f} -> {:.3f}".format(*(row[x]["macs"] / 1e9 for x in ("before", "after")))
        cells.append(
            (
                row["model"],
                *(_arrow(row, key) for key in ("convs", "batch_norms", "ops")),
                macs,
                f"{row['error']:.0e}",
                f"{row['error64']:.0e}" if "error64" in row else "-",
                f"{row['seconds']:.1f}",
                peer_cell(row.get("torch_fuse"), ("batch_norms",)),
                peer_cell(row.get("author"), ("convs", "batch_norms", "ops")),
            )
        )
    return tabulate(cells, headers, tablefmt="simple", disable_numparse=True)


def _arrow(row: Row, key: str) -> str:
    return f"{row['before'][key]} -> {row['after'][key]}"


if __name__ == "__main__":
    sys.exit(main())
