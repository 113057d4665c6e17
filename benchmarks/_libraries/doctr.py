"""python-doctr: detection and recognition of text, and its classifiers."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from torch import nn

from _libraries.case import Case, Library, named, noise, of_images


def _classifier(name: str, side: int = 64, other: int | None = 96) -> Case:
    model = named(f"doctr.models.classification.{name}")(pretrained=False)
    return of_images(model, side, other)


def _exportable(path: str) -> nn.Module:
    """A network that returns logits: boxes and words are found by code outside torch."""
    build = named(f"doctr.models.{path}")
    return build(pretrained=False, pretrained_backbone=False, exportable=True)


def _detector(name: str) -> Case:
    case = of_images(_exportable(f"detection.{name}"), 128, 160)
    convert = named("doctr.models.detection.reparameterize") if name == "fast_tiny" else None
    return replace(case, author=convert)


def _reader(name: str) -> Case:
    model = _exportable(f"recognition.{name}")
    return Case(model, (noise(1, 3, 32, 128),), (noise(2, 3, 32, 128),))


LIBRARY = Library(
    "python-doctr",
    {
        "resnet18": partial(_classifier, "resnet18"),
        "resnet31": partial(_classifier, "resnet31", 32, None),
        "magc_resnet31": partial(_classifier, "magc_resnet31", 32, None),
        "mobilenet_v3_small": partial(_classifier, "mobilenet_v3_small"),
        "mobilenet_v3_large_r": partial(_classifier, "mobilenet_v3_large_r"),
        "textnet_tiny": partial(_classifier, "textnet_tiny"),
        "vgg16_bn_r": partial(_classifier, "vgg16_bn_r"),
        "starnet_s3": partial(_classifier, "starnet_s3"),
        "vip_tiny": partial(_classifier, "vip_tiny", 32, None),
        "db_resnet34": partial(_detector, "db_resnet34"),
        "db_mobilenet_v3_large": partial(_detector, "db_mobilenet_v3_large"),
        "linknet_resnet18": partial(_detector, "linknet_resnet18"),
        "fast_tiny": partial(_detector, "fast_tiny"),
        "crnn_vgg16_bn": partial(_reader, "crnn_vgg16_bn"),
        "crnn_mobilenet_v3_small": partial(_reader, "crnn_mobilenet_v3_small"),
        "sar_resnet31": partial(_reader, "sar_resnet31"),
    },
)
