"""The RepVGG paper's own comparison on this device: throughput as ratios beside the published ones.

Ding et al., "RepVGG: Making VGG-style ConvNets Great Again", CVPR 2021: tables 4 and 6; images a
second on a GTX 1080 Ti at batch 128 in fp32. Another device has other numbers: ratios carry over.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import _results
import torch
from _measure import finished, measure
from _modes import chosen
from _roofline import measure_rates
from _subject import DTYPES, Setting, precision
from _timing import Effort
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

BATCH = 128
BASE = "ResNet-18"  # what speeds are relative to

# Network: name for the loader, and images a second in the paper, after merging.
NETWORKS: dict[str, tuple[str, float]] = {
    "ResNet-18": ("timm:resnet18", 2442),
    "ResNet-34": ("timm:resnet34", 1419),
    "ResNet-50": ("timm:resnet50", 719),
    "ResNet-101": ("timm:resnet101", 430),
    "ResNet-152": ("timm:resnet152", 297),
    "RepVGG-A0": ("timm:repvgg_a0", 3256),
    "RepVGG-A1": ("timm:repvgg_a1", 2339),
    "RepVGG-A2": ("timm:repvgg_a2", 1322),
    "RepVGG-B0": ("timm:repvgg_b0", 1817),
    "RepVGG-B1": ("timm:repvgg_b1", 685),
    "RepVGG-B1g2": ("_paper:repvgg_b1g2", 792),
    "RepVGG-B1g4": ("timm:repvgg_b1g4", 868),
    "RepVGG-B2": ("timm:repvgg_b2", 460),
    "RepVGG-B2g4": ("timm:repvgg_b2g4", 581),
    "RepVGG-B3": ("timm:repvgg_b3", 363),
}
# Merged over trained form, which the paper has for this one only (table 6: 1061 and 1810).
MERGED_OVER_TRAINED = {"RepVGG-B0": 1.71}
QUICK = ("ResNet-18", "RepVGG-A0")


def repvgg_b1g2() -> nn.Module:
    """RepVGG-B1 with two groups in every second block, which timm has no name for."""
    from timm.models import byobnet

    blocks = byobnet._rep_vgg_bcfg(wf=(2, 2, 2, 4), d=(4, 6, 16, 1), groups=2)
    return byobnet.ByobNet(byobnet.ByoModelCfg(blocks=blocks, stem_type="rep", stem_chs=64))


def run(options: argparse.Namespace, device: torch.device, effort: Effort) -> int:
    """Measure, print and write; 1 if a merged network is not equal to its trained form."""
    batch = (options.batch or [1 if options.quick else BATCH])[0]
    size = options.size or (64 if options.quick else None)
    setting = Setting(device, options.dtype, batch, size, options.channels_last)
    modes = chosen(["eager", "author", "fxrep"], device)
    rows: list[dict[str, Any]] = []
    with precision(options.dtype):
        rates = measure_rates(device, DTYPES[options.dtype], effort.seconds)
    for network in tqdm(QUICK if options.quick else NETWORKS, disable=None, leave=False):
        name, _ = NETWORKS[network]
        rows += [
            {"network": network, **row}
            for row in finished(measure(name, setting, modes, effort), rates)
        ]
        summary = compared(rows)
        content = {"batch": batch, "dtype": options.dtype, "networks": summary, "rows": rows}
        _results.write(options.output, f"paper-repvgg-{device.type}", options, device, **content)
    if options.json:
        print(json.dumps({"setting": _results.setting(device), **content}, indent=1))
    else:
        print(f"batch {batch}, {options.dtype}, {_results.setting(device)['device']}, eager torch")
        print(tabulate([s.values() for s in summary], list(summary[0]), floatfmt=".2f"))
        for row in rows:
            if row["reason"] not in (None, "no converter"):
                print(f"{row['network']}, {row['mode']}: {row['reason']}")
    return 1 if any(row["ours"] and row["reason"] for row in rows) else 0


def compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line for each network: images a second, and the paper's ratios beside those measured.

    As in the paper, ResNets too are timed with their BatchNorms folded.
    """
    speed = {(row["network"], row["mode"]): row.get("images_per_s") for row in rows}
    base = speed.get((BASE, "fxrep"))
    lines = []
    for network in dict.fromkeys(row["network"] for row in rows):
        trained, merged = speed[network, "eager"], speed[network, "fxrep"]
        lines.append(
            {
                "network": network,
                "trained form, images/s": trained,
                "merged, images/s": merged,
                "author's, images/s": speed.get((network, "author")),
                "merged / trained": _ratio(merged, trained),
                "in the paper": MERGED_OVER_TRAINED.get(network),
                f"speed / {BASE}": _ratio(merged, base),
                "in the paper ": NETWORKS[network][1] / NETWORKS[BASE][1],
            }
        )
    return lines


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None
