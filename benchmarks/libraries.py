"""Models of other libraries than timm and torchvision: what fxrep folds in them, and how exactly.

    python benchmarks/libraries.py [--quick] [--library monai ...] [--models monai:UNet ...]
                                   [--exported]

Every model is built from its configuration with random weights and randomised BatchNorm statistics,
and is optimized without and with example inputs. Each result is called twice at each of two sizes;
the comparison is this script's own. A model runs in a process of its own, so that a crash ends
nothing else. Libraries that are not installed are left out; `--help` says how to install them.
With `--exported` fxrep also optimizes what `torch.export` makes of each model, as another capture.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import _results
import _torchvision  # noqa: F401
import torch
from _captured import WHOLE, captured
from _comparison import (
    EXACT32,
    EXACT64,
    Inputs,
    Row,
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
from _libraries import LIBRARIES
from _libraries.case import Case
from tabulate import tabulate
from torch import nn
from torch.fx.experimental.optimization import fuse as torch_fuse

import fxrep
from fxrep.cli.demo import randomize_batchnorm

QUICK = (
    "transformers:efficientnet", "transformers:cvt", "transformers:upernet_convnext",
    "segmentation-models-pytorch:Linknet-resnet18", "monai:BasicUNet", "monai:UNETR",
    "spandrel:DnCNN", "spandrel:SAFMN", "efficientnet-pytorch:b0", "pytorchcv:resnet10",
    "pytorchcv:mobilenet_wd4",
)  # fmt: skip
SECONDS = 600  # a model that takes longer is given up
SLACK = 3.0  # times the original's own error in float32: an argmax of a text decoder magnifies it
# A model that differs from itself by more than this in float32 (a detector that takes the best of
# scores that are nearly equal) magnifies the rounding of float64 as well.
DROWNS, EXACT64_OF_DROWNING = 1e-2, 1e-6
KEEPING = ("capture", "batchnorm", "branches")  # the passes that say why a BatchNorm stays
WAYS = ("without_inputs", "with_inputs")


def main() -> int:
    options = _parser().parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.row:
        warnings.simplefilter("ignore")
        print(json.dumps(measure(*options.row.split(":"), exports=options.exported)))
        return 0
    rows: list[Row] = []
    for library, name in _chosen(options):
        rows.append(_in_own_process(library, name, options.threads, options.exported))
        print(_progress(rows[-1]), flush=True)
        _write(options, rows)  # after each model: a run that is cut off keeps its rows
    print("\n" + text(rows))
    return 0 if rows and not any(map(_faulty, rows)) else 1


def _parser() -> argparse.ArgumentParser:
    lines = [f"  python -m pip install {library.install}" for library in LIBRARIES.values()]
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="\n".join(["the libraries:", *lines]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _results.add_options(parser)
    parser.add_argument("--models", nargs="+", help="these only, such as monai:UNet")
    parser.add_argument(
        "--library", nargs="+", choices=LIBRARIES, metavar="NAME", help="these libraries only"
    )
    parser.add_argument(
        "--exported", action="store_true", help="also optimize what torch.export captures"
    )
    parser.add_argument("--row", metavar="MODEL", help="print the row of one model as JSON")
    return parser


def _chosen(options: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """The models of the libraries that are installed."""
    wanted = options.models or (QUICK if options.quick else None)
    for name, library in LIBRARIES.items():
        if options.library and name not in options.library:
            continue
        cases = [x for x in library.cases if wanted is None or f"{name}:{x}" in wanted]
        if cases and installed(name) is None:
            print(f"{name} is not installed: python -m pip install {library.install}")
            continue
        yield from ((name, case) for case in cases)


def installed(library: str) -> str | None:
    """The version of a library, None where it is not installed."""
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _in_own_process(library: str, name: str, threads: int | None, exports: bool = False) -> Row:
    command = [sys.executable, __file__, "--row", f"{library}:{name}"]
    command += ["--exported"] if exports else []
    command += ["--threads", str(threads)] if threads else []
    row = {"library": library, "model": name}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return row | {"failed": f"no result after {SECONDS} s"}
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or [""])[-1]
        return row | {"failed": f"the process ended with {done.returncode}: {last[:140]}"}


def measure(library: str, name: str, *, exports: bool = False) -> Row:
    """One row; a model that does not run by itself says why.

    Args:
        library: its name on PyPI.
        name: of one of its models.
        exports: also optimize what `torch.export` captures of it.
    """
    row: Row = {"library": library, "model": name}
    stage = "build"
    try:
        torch.manual_seed(0)
        case = LIBRARIES[library].cases[name]()
        model = case.model.eval()
        randomize_batchnorm(model)
        row["parameters"] = sum(p.numel() for p in model.parameters())
        row["input"] = shapes(case.inputs)
        stage = "run"
        reference, exact = steady_reference(model, case.run, case.inputs, row)
        row["before"] = counts(case.run, model, case.inputs)
        sizes = [(case.inputs, reference)]
        if case.other is not None:
            source, given = (model, case.other) if exact is None else (exact, double(case.other))
            sizes.append((case.other, values(case.run, source, given)))
            row["rounding"] = max(row["rounding"], _largest_error(case, model, sizes[1:]))
    except Exception as error:
        return row | {"failed": f"{stage}: {short(error)}"}
    for way in WAYS:
        example = case.inputs if way == "with_inputs" else None
        row[way] = optimized(case, model, exact, example, sizes)
    row["torch_fuse"] = peer(torch_fuse, case.run, model, case.inputs, reference)
    if case.author is not None:
        row["author"] = peer(case.author, case.run, model, case.inputs, reference)
    if exports and case.run is plain_run:
        export = partial(_exported, inputs=case.inputs)
        row["exported"] = peer(export, case.run, model, case.inputs, reference)
    return row


def _exported(model: nn.Module, inputs: Inputs) -> nn.Module:
    """What fxrep makes of the graph that `torch.export` captures on these inputs."""
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    return fxrep.optimize(torch.export.export(model, args, kwargs, strict=False).module())


def optimized(
    case: Case, model: nn.Module, exact: nn.Module | None, example: Any, sizes: list[Any]
) -> Row:
    """What `fxrep.optimize` makes of a model, or where it raises.

    Args:
        case: the model's inputs and how it runs.
        model: in float32.
        exact: in float64, None where that does not run.
        example: the example inputs of `fxrep.optimize`.
        sizes: inputs and what the float64 model makes of them, for each size.
    """
    row: Row = {}
    stage = "optimize"
    try:
        start = time.perf_counter()
        result = fxrep.optimize(model, example)
        row["seconds"] = time.perf_counter() - start
        row["captured"] = captured(result)
        stage = "run optimized"
        row["error"] = _largest_error(case, result, sizes)
        row["after"] = counts(case.run, result, case.inputs)
        if case.other is not None:
            row["other_batch_norms"] = counts(case.run, result, case.other)["batch_norms"]
        row |= _reported(fxrep.report(result), row["after"]["batch_norms"] > 0)
        del result
        if exact is not None:
            stage = "optimize in float64"
            doubled = fxrep.optimize(exact, None if example is None else double(example))
            stage = "run optimized in float64"
            sizes64 = [(double(inputs), reference) for inputs, reference in sizes]
            row["error64"] = _largest_error(case, doubled, sizes64)
    except Exception as error:
        row["failed"] = f"{stage}: {short(error)}"
    return row


def _largest_error(case: Case, result: nn.Module, sizes: list[Any]) -> float:
    """Over all sizes and two calls of each; NaN if there is any."""
    errors = [
        relative_error(values(case.run, result, inputs), reference)
        for inputs, reference in sizes
        for _ in range(2)
    ]
    return max(errors, key=lambda error: (error != error, error))


def _reported(report: fxrep.Report, explain: bool) -> Row:
    row: Row = {"rewrites": len(report.rewrites), "skipped": len(report.skipped)}
    if explain:
        reasons = Counter(
            f"{skip.pass_name}: {skip.reason}"
            for skip in report.skipped
            if skip.pass_name in KEEPING
        )
        row["reasons"] = dict(reasons.most_common())
    return row


def _write(options: argparse.Namespace, rows: list[Row]) -> None:
    used = {row["library"]: installed(row["library"]) for row in rows}
    _results.write(
        options.output, "libraries", options, libraries=used, totals=totals(rows), rows=rows
    )


def totals(rows: list[Row]) -> dict[str, Row]:
    """The sums the README quotes: for each library, and for all."""
    names = dict.fromkeys(row["library"] for row in rows)
    groups = {name: [row for row in rows if row["library"] == name] for name in names}
    return {name: _sums(group) for name, group in (groups | {"all": rows}).items()}


def _sums(rows: list[Row]) -> Row:
    sums: Row = {"models": len(rows), "do not run here": sum("failed" in row for row in rows)}
    sums["faulty"] = sum(map(_faulty, rows))
    done = [row for row in rows if all("after" in row.get(way, {}) for way in WAYS)]
    for key in ("convs", "batch_norms", "ops"):
        sums[key] = _cell(
            sum(row["before"][key] for row in done),
            *(sum(row[way]["after"][key] for row in done) for way in WAYS),
        )
    with_norms = [row for row in done if row["before"]["batch_norms"]]
    sums["models with BatchNorms"] = len(with_norms)
    sums["all folded"] = _pair(
        *(sum(not row[way]["after"]["batch_norms"] for row in with_norms) for way in WAYS)
    )
    exported = [row["exported"] for row in with_norms if "exported" in row]
    folded = [each for each in exported if each.get("counts", {}).get("batch_norms") == 0]
    sums["all folded, exported"] = f"{len(folded)} of {len(exported)}" if exported else "-"
    sums["whole graph"] = _pair(
        *(sum(row[way]["captured"] in WHOLE for row in done) for way in WAYS)
    )
    return sums


def _faulty(row: Row) -> bool:
    """Whether fxrep raises, or gives a wrong value, where the model itself runs."""
    rounding = row.get("rounding", 0.0)
    allowed = max(EXACT32, SLACK * rounding), EXACT64 if rounding < DROWNS else EXACT64_OF_DROWNING
    return "failed" not in row and not all(_exact(row[way], *allowed) for way in WAYS)


def _exact(result: Row, allowed32: float, allowed64: float) -> bool:
    return (
        "failed" not in result
        and result["error"] <= allowed32
        and result.get("error64", 0.0) <= allowed64
    )


def _progress(row: Row) -> str:
    name = f"{row['library']}:{row['model']}"
    if "failed" in row:
        return f"{name}: not measured, {row['failed']}"
    failed = [f"{way}: {row[way]['failed']}" for way in WAYS if "failed" in row[way]]
    if failed:
        return f"{name}: FAILED {'; '.join(failed)}"
    wrong = "" if not _faulty(row) else " WRONG"
    norms = _cell(*_each(row, "batch_norms"))
    return f"{name}: {norms} BatchNorms, error {_worst(row, 'error')}{wrong}"


def text(rows: list[Row]) -> str:
    """Tables for each library, and the totals; `a -> b / c` is before -> after, without / with."""
    if not rows:
        return "no model: none of the libraries is installed"
    headers = (
        "model", "convs", "BNs", "ops", "GMACs", "captured", "float32", "float64", "s",
        "torch.fx fuse", "author: convs, BNs, ops", "exported",
    )  # fmt: skip
    found = totals(rows)
    parts = []
    for library in found:
        cells = [_cells(row) for row in rows if row["library"] == library]
        if cells:
            table = tabulate(cells, headers, tablefmt="simple", disable_numparse=True)
            parts.append(f"{library} {installed(library)}\n{table}")
    for title, lines in (("failures", _failures(rows)), ("BatchNorms that stay", _stayed(rows))):
        if lines:
            parts.append("\n".join([f"{title}:", *lines]))
    sums = [(library, *each.values()) for library, each in found.items()]
    parts.append(tabulate(sums, ("", *found["all"]), tablefmt="simple", disable_numparse=True))
    return "\n\n".join(parts)


def _failures(rows: list[Row]) -> list[str]:
    return [_progress(row) for row in rows if "failed" in row or _faulty(row)]


def _stayed(rows: list[Row]) -> list[str]:
    """Models with BatchNorms left, with inputs, and the reasons that most places have."""
    lines = []
    for row in rows:
        reasons = row.get("with_inputs", {}).get("reasons")
        if reasons:
            left = row["with_inputs"]["after"]
            lines.append(
                f"{row['library']}:{row['model']}: {left['batch_norms']}, "
                f"{left['directly_after_conv']} of them after a convolution"
            )
            lines += [f"    {n} x {reason}" for reason, n in list(reasons.items())[:3]]
    return lines


def _cells(row: Row) -> tuple[str, ...]:
    if "failed" in row:
        return row["model"], "not measured"
    seconds = (f"{row[way]['seconds']:.1f}" if "seconds" in row[way] else "-" for way in WAYS)
    return (
        row["model"],
        *(_cell(*_each(row, key)) for key in ("convs", "batch_norms", "ops")),
        _cell(*(x if isinstance(x, str) else f"{x / 1e9:.2f}" for x in _each(row, "macs"))),
        _pair(*(row[way].get("captured", "-") for way in WAYS)),
        _worst(row, "error"),
        _worst(row, "error64"),
        _pair(*seconds),
        peer_cell(row["torch_fuse"], ("batch_norms",)),
        peer_cell(row.get("author"), ("convs", "batch_norms", "ops")),
        peer_cell(row.get("exported"), ("batch_norms",)),
    )


def _each(row: Row, key: str) -> tuple[Any, ...]:
    after = (row[way]["after"][key] if "after" in row[way] else "raises" for way in WAYS)
    return row["before"][key], *after


def _cell(before: Any, without: Any, given: Any) -> str:
    return f"{before} -> {_pair(without, given)}"


def _pair(without: Any, given: Any) -> str:
    return f"{without} / {given}"


def _worst(row: Row, key: str) -> str:
    errors = [row[way][key] for way in WAYS if key in row[way]]
    return f"{max(errors):.0e}" if errors else "-"


if __name__ == "__main__":
    sys.exit(main())
