"""Models of other libraries, built from their configurations; nothing is downloaded."""

from __future__ import annotations

from _libraries import (
    braindecode,
    doctr,
    efficientnet,
    kornia,
    monai,
    pretrained_models,
    pytorchcv,
    pytorchvideo,
    segmentation_models,
    spandrel,
    speechbrain,
    transformers,
    ultralytics,
)
from _libraries.case import Library

_MODULES = (
    transformers, ultralytics, segmentation_models, monai, braindecode, doctr, kornia,
    pytorchvideo, speechbrain, spandrel, efficientnet, pretrained_models, pytorchcv,
)  # fmt: skip
LIBRARIES: dict[str, Library] = {each.LIBRARY.name: each.LIBRARY for each in _MODULES}
