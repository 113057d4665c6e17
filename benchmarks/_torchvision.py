"""Importing this makes torchvision importable beside a torch its binary part was not made for."""

from __future__ import annotations

import torch

try:
    import torchvision  # noqa: F401
except (
    RuntimeError
):  # torchvision::nms is missing: declare it, the models call it in detection only
    for _name in ("nms", "qnms"):
        torch.library.define(
            f"torchvision::{_name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        )
