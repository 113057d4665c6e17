"""JSON beside every table: the rows, and what they were measured with."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
from pathlib import Path
from typing import Any

import torch

import fxrep

FOLDER = Path(__file__).with_name("results")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options all benchmarks share."""
    parser.add_argument("--quick", action="store_true", help="a bounded run of about a minute")
    parser.add_argument("--threads", type=positive, help="torch threads (default: torch's own)")
    parser.add_argument("--output", type=Path, help="where the JSON goes")


def positive(text: str) -> int:
    """A number of things, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def write(
    path: Path | None,
    name: str,
    options: argparse.Namespace,
    device: torch.device | str = "cpu",
    **content: Any,
) -> None:
    """Write the result of one benchmark.

    Args:
        path: where to; by default ``results/NAME.json`` for a full run and nowhere for a part.
        name: of the benchmark.
        options: as parsed; ``quick`` and the choice of models say whether the run is full.
        device: what it ran on.
        content: the rows and totals.
    """
    chosen = (getattr(options, name, None) for name in ("models", "modes", "family", "library"))
    part = options.quick or any(chosen)
    if path is None:
        if part:
            return
        path = FOLDER / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"setting": setting(device), **content}, indent=1) + "\n")


def setting(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Versions, device, threads and date; nothing that names the machine or its user."""
    cuda = torch.device(device).type == "cuda"
    return {
        "fxrep": fxrep.__version__,
        "torch": torch.__version__,
        "timm": _version("timm"),
        "torchvision": _version("torchvision"),
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if cuda else f"CPU, {_processor()}",
        **({"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()} if cuda else {}),
        "threads": torch.get_num_threads(),
        "date": datetime.date.today().isoformat(),
    }


def _version(package: str) -> str | None:
    try:
        return str(__import__(package).__version__)
    except (ImportError, RuntimeError):
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
