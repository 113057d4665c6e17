"""ultralytics: the YOLO family and RT-DETR, from the YAML files that the package carries."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from _comparison import Run, plain_run
from torch import nn

from _libraries.case import Case, Library, named, of_images


def _dense(model: nn.Module, images: torch.Tensor) -> Any:
    """What the heads give, before the best boxes are chosen: that jumps at the least rounding."""
    return model(images)[1]


def _yolo(file: str, task: str = "Detection", run: Run = plain_run) -> Case:
    build = named(f"ultralytics.nn.tasks.{task}Model")
    case = of_images(build(f"{file}.yaml", verbose=False), 96, 128, run=run)
    return replace(case, author=lambda model: model.fuse(verbose=False))


LIBRARY = Library(
    "ultralytics",
    {
        "yolov3-tiny": partial(_yolo, "yolov3-tiny"),
        "yolov5n": partial(_yolo, "yolov5n"),
        "yolov6n": partial(_yolo, "yolov6n"),
        "yolov8n": partial(_yolo, "yolov8n"),
        "yolov9t": partial(_yolo, "yolov9t"),
        "yolov10n": partial(_yolo, "yolov10n", run=_dense),
        "yolo11n": partial(_yolo, "yolo11n"),
        "yolo12n": partial(_yolo, "yolo12n"),
        "yolo26n": partial(_yolo, "yolo26n", run=_dense),
        "yolov8n-seg": partial(_yolo, "yolov8n-seg", "Segmentation"),
        "yolov8n-pose": partial(_yolo, "yolov8n-pose", "Pose"),
        "yolov8n-obb": partial(_yolo, "yolov8n-obb", "OBB"),
        "yolov8n-cls": partial(_yolo, "yolov8n-cls", "Classification"),
        "yolov8n-ghost": partial(_yolo, "yolov8n-ghost"),
        "rtdetr-resnet50": partial(_yolo, "rtdetr-resnet50", "RTDETRDetection"),
    },
)
