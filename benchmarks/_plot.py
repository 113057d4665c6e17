"""Bars of speed-up over eager: a group for each model, a bar for each mode."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fxrep.errors import OptionError


def require() -> None:
    """Make sure that there is something to draw with, before anything is measured.

    Raises:
        OptionError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise OptionError("--plot: matplotlib is not installed; python -m pip install matplotlib")


def speedups(rows: Sequence[dict[str, Any]], path: Path, setting: dict[str, Any]) -> None:
    """Draw rows, as `_measure.finished` gives them, into a PNG.

    Args:
        rows: of all models.
        path: of the picture.
        setting: for the title: device, torch and date.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = list(dict.fromkeys((row["model"], row["batch"]) for row in rows))
    modes = [m for m in dict.fromkeys(row["mode"] for row in rows) if m != "eager"]
    found = {(row["model"], row["batch"], row["mode"]): row.get("over_eager") for row in rows}
    figure = Figure(figsize=(max(6.0, 2.2 * len(groups)), 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    width = 0.85 / max(1, len(modes))
    for index, mode in enumerate(modes):
        heights = [found.get((*group, mode)) or 0.0 for group in groups]
        places = [place + (index - (len(modes) - 1) / 2) * width for place in range(len(groups))]
        ours = any(row["ours"] for row in rows if row["mode"] == mode)
        style: dict[str, Any] = {"edgecolor": "white"}
        if ours:
            style = {"edgecolor": "black", "hatch": "//"}
        axes.bar(places, heights, width, label=mode, linewidth=0.5, **style)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(groups)), [f"{model}\nbatch {batch}" for model, batch in groups])
    axes.set_ylabel("speed-up over eager")
    axes.set_title(
        f"{setting['device']}, torch {setting['torch']}, {setting['date']} (hatched: fxrep)",
        fontsize="small",
    )
    axes.legend(fontsize="x-small", ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    figure.savefig(path, dpi=150)
