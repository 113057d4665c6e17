"""pretrainedmodels: classifiers before torchvision had them."""

from __future__ import annotations

from functools import partial

from _libraries.case import Case, Library, named, of_images


def _net(name: str, side: int = 224, other: int | None = None) -> Case:
    return of_images(named(f"pretrainedmodels.{name}")(pretrained=None), side, other)


LIBRARY = Library(
    "pretrainedmodels",
    {
        "bninception": partial(_net, "bninception"),
        "cafferesnet101": partial(_net, "cafferesnet101"),
        "dpn68": partial(_net, "dpn68"),
        "inceptionresnetv2": partial(_net, "inceptionresnetv2", 299),
        "inceptionv4": partial(_net, "inceptionv4", 299),
        "nasnetamobile": partial(_net, "nasnetamobile"),
        "polynet": partial(_net, "polynet", 331),
        "se_resnet50": partial(_net, "se_resnet50"),
        "se_resnext50_32x4d": partial(_net, "se_resnext50_32x4d"),
        "xception": partial(_net, "xception", 128, 160),
    },
)
