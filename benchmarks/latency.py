"""How much faster, than what, how exact, how far from the limit: a model in many modes.

    python benchmarks/latency.py                                  # a default set, here
    python benchmarks/latency.py --models timm:resnet50 my.package:make_model --batch 1 32 128
    python benchmarks/latency.py --device cuda --dtype bf16 --channels-last
    python benchmarks/latency.py --paper repvgg                   # the paper's own comparison

Models are `repvgg_a0` (built in), `block:NAME` (of the literature: see _blocks.py), `timm:NAME`,
`torchvision:NAME` and `package.module:factory`; modes are in _modes.py. Every mode is compared with
float64 before it is timed, and all are timed in turns. Exits with 1 if fxrep's result is not equal.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import _paper
import _plot
import _results
import _torchvision  # noqa: F401
import torch
from _measure import finished, measure, steps
from _modes import MODES, Mode, chosen
from _results import positive
from _roofline import Rates, measure_rates
from _subject import DTYPES, Setting, batch_of, example, precision
from _timing import Effort
from tabulate import tabulate
from tqdm import tqdm

from fxrep.errors import FxrepError, OptionError

DEFAULT = ("repvgg_a0", "timm:resnet18")
QUICK = ("block:repvgg",)
FULL_EFFORT, QUICK_EFFORT = Effort(rounds=5, seconds=0.3), Effort(rounds=2, seconds=0.05)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0, 1 if fxrep is not equal somewhere, 2 for what cannot be run."""
    options = _parser().parse_args(arguments)
    warnings.simplefilter("ignore")
    try:
        return _run(options)
    except FxrepError as error:
        print(f"latency.py: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], epilog=f"modes: {', '.join(m.name for m in MODES)}"
    )
    _results.add_options(parser)
    add = parser.add_argument
    add("--models", nargs="+", help=f"names of models (default: {' '.join(DEFAULT)})")
    add("--modes", nargs="+", help="these modes only, and eager (default: all that run here)")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto")
    add("--dtype", choices=tuple(DTYPES), default="fp32")
    add("--batch", nargs="+", type=positive, help="images per batch (default 1; paper 128)")
    add(
        "--size",
        type=positive,
        help="height and width in pixels (default: the model's own)",
    )
    add("--channels-last", action="store_true", help="memory format of weights and images")
    add(
        "--rounds",
        type=positive,
        help=f"turns of each mode (default {FULL_EFFORT.rounds})",
    )
    add("--paper", choices=("repvgg",), help="the comparison of a paper instead, as ratios")
    add("--json", action="store_true", help="print JSON instead of tables")
    add("--plot", type=Path, metavar="PNG", help="draw the speed-up over eager of each model")
    return parser


def _run(options: argparse.Namespace) -> int:
    if options.threads:
        torch.set_num_threads(options.threads)
    device = _device(options.device, options.dtype)
    effort = QUICK_EFFORT if options.quick else FULL_EFFORT
    effort = Effort(options.rounds or effort.rounds, effort.seconds)
    if options.paper:
        _refuse_beside_paper(options)
        return _paper.run(options, device, effort)
    if options.plot:
        _plot.require()
    modes = chosen(options.modes, device)
    settings = list(_settings(options, device))
    with precision(options.dtype):
        rates = measure_rates(device, DTYPES[options.dtype], effort.seconds)
    rows: list[dict[str, Any]] = []
    content: dict[str, Any] = {}
    for setting, found in _measured(settings, modes, effort, rates):
        rows += found
        if not options.json:
            tqdm.write(f"{_title(found[0], setting)}\n{table(found)}\n")
        content = {"asked": _asked(options), "rates": vars(rates), "summary": summary(rows)}
        content["rows"] = rows
        # After each model: a run that is cut off keeps its rows.
        _results.write(options.output, _file(options, device), options, device, **content)
    if options.json:
        print(json.dumps({"setting": _results.setting(device), **content}, indent=1))
    else:
        print(_summary(rows), _footer(rates, device), sep="\n\n")
    if options.plot:
        _plot.speedups(rows, options.plot, _results.setting(device))
    return 1 if any(broken(row) for row in rows) else 0


def _measured(
    settings: Sequence[tuple[str, Setting]], modes: Sequence[Mode], effort: Effort, rates: Rates
) -> Iterator[tuple[Setting, list[dict[str, Any]]]]:
    """Measure one model after the other, under a progress bar on a terminal."""
    with tqdm(total=len(settings) * steps(modes, effort), disable=None, leave=False) as bar:

        def progress(doing: str, done: int) -> None:
            bar.set_description(doing)
            bar.update(done)

        for name, setting in settings:
            yield setting, finished(measure(name, setting, modes, effort, progress), rates)


def _refuse_beside_paper(options: argparse.Namespace) -> None:
    for name in ("models", "modes", "plot"):
        if getattr(options, name):
            raise OptionError(f"--{name}: not with --paper, whose models and modes are fixed")
    if len(options.batch or []) > 1:
        raise OptionError(f"--batch {options.batch}: --paper takes one batch")


def _device(name: str, dtype: str) -> torch.device:
    """The device that `--device` means.

    Raises:
        OptionError: there is none, or not for this dtype.
    """
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise OptionError(
            f"--device cuda: torch {torch.__version__} sees no CUDA device; --device cpu runs here"
        )
    device = torch.device("cuda", torch.cuda.current_device()) if there else torch.device("cpu")
    device = torch.device("cpu") if name == "cpu" else device
    if dtype == "tf32" and device.type == "cpu":
        raise OptionError(
            "--dtype tf32: a format of NVIDIA's cards, not of CPUs; fp32 or bf16 runs"
        )
    if dtype == "tf32" and torch.cuda.get_device_capability(device) < (8, 0):
        raise OptionError("--dtype tf32: this card has none (Ampere and later do); use fp32")
    return device


def _settings(options: argparse.Namespace, device: torch.device) -> Iterator[tuple[str, Setting]]:
    """What to measure, in order; names are tried before anything is.

    Raises:
        FxrepError: there is no such model.
    """
    for name in options.models or (QUICK if options.quick else DEFAULT):
        # A factory that brings its inputs has one batch, whatever --batch says.
        batches = {batch_of(example(name, options.size, b).inputs) for b in options.batch or [1]}
        for batch in sorted(batches):
            yield name, Setting(device, options.dtype, batch, options.size, options.channels_last)


def _file(options: argparse.Namespace, device: torch.device) -> str:
    parts = ["latency", device.type]
    parts += [options.dtype] if options.dtype != "fp32" else []
    parts += ["channels_last"] if options.channels_last else []
    return "-".join(parts)


def _asked(options: argparse.Namespace) -> dict[str, Any]:
    keys = ("dtype", "channels_last", "size", "quick")
    return {key: getattr(options, key) for key in keys}


def broken(row: dict[str, Any]) -> bool:
    """Whether fxrep gave another result, or none where it should have."""
    failed = row["mode"] == "fxrep" and row["reason"] is not None
    return bool(row["ours"] and (row["equal"] is False or failed))


def _title(row: dict[str, Any], setting: Setting) -> str:
    layout = ", channels last" if setting.channels_last else ""
    return f"{row['model']}, input {row['input']}, {setting.dtype}{layout}, {setting.device.type}"


HEADERS = (
    "mode", "ms (quartiles)", "images/s", "x eager", "x best peer", "error", "convs", "kernels",
    "GMACs", "M params", "peak MB", "% roofline",
)  # fmt: skip
MOST_REASON = 24  # characters in a cell


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of one model as text; a mode that was not timed says why, at length below."""
    lines = [_cells(row) for row in rows]
    text = tabulate(lines, HEADERS, disable_numparse=True, colalign=("left",))
    long = [row for row in rows if len(row["reason"] or "") > MOST_REASON]
    return "\n".join([text, *(f"{row['mode']}: {row['reason']}" for row in long)])


def _cells(row: dict[str, Any]) -> list[str]:
    if row["reason"] is not None:
        return [row["mode"], textwrap.shorten(row["reason"], MOST_REASON, placeholder=" ...")]
    counts = row["counts"] or {}
    return [
        row["mode"],
        f"{row['ms']:.2f} ({row['ms_low']:.2f}-{row['ms_high']:.2f})",
        f"{row['images_per_s']:.0f}",
        _format(row["over_eager"], ".2f"),
        _format(row["over_best_peer"], ".2f"),
        _format(row["error"], ".0e"),
        _format(row["convs"], "d"),
        _format(row["kernels"], "d"),
        _format(counts.get("macs"), ".3f", 1e9),
        _format(row["parameters"], ".2f", 1e6),
        _format(row["peak"], ".1f", 1e6),
        _format(row.get("roofline_percent"), ".0f"),
    ]


def _format(value: float | None, how: str, unit: float = 1) -> str:
    if value is None:
        return "-"
    return format(value if unit == 1 else value / unit, how)


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line for each model: times of fxrep over those of others (below 1 is faster), the fastest.

    Args:
        rows: of all models.
    """
    lines = []
    for model, batch in dict.fromkeys((row["model"], row["batch"]) for row in rows):
        mine = [r for r in rows if (r["model"], r["batch"]) == (model, batch) and "ms" in r]
        times = {row["mode"]: row["ms"] for row in mine}
        peers = [row["mode"] for row in mine if not row["ours"]]
        lines.append(
            {
                "model": model,
                "batch": batch,
                "fxrep / eager": _ratio(times, "fxrep", "eager"),
                "measured / fxrep": _ratio(times, "fxrep-measured", "fxrep"),
                "fxrep / author": _ratio(times, "fxrep", "author"),
                "fastest": min(times, key=times.__getitem__, default=None),
                "fastest peer": min(peers, key=times.__getitem__, default=None),
            }
        )
        line = lines[-1]
        line["fastest / peer"] = _ratio(times, line["fastest"], line["fastest peer"])
    return lines


def _ratio(times: dict[str, float], a: str, b: str) -> float | None:
    return times[a] / times[b] if a in times and b in times else None


def _summary(rows: Sequence[dict[str, Any]]) -> str:
    lines = summary(rows)
    return tabulate([line.values() for line in lines], list(lines[0]), floatfmt=".2f")


def _footer(rates: Rates, device: torch.device) -> str:
    setting = _results.setting(device)
    named = (f"{name}: {value}" for name, value in setting.items() if value is not None)
    rate = f"matrix rate {rates.macs / 1e9:.0f} GMAC/s, copy rate {rates.copied / 1e9:.0f} GB/s"
    missing = {package for m in MODES if device.type in m.devices for package in m.missing_packages}
    absent = f"not installed, so not compared: {', '.join(sorted(missing))}" if missing else ""
    return "\n".join(filter(None, (rate, ", ".join(named), absent)))


if __name__ == "__main__":
    sys.exit(main())
