"""kornia: local features, edges, image restoration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from _libraries.case import Case, Library, named, noise


def _net(
    path: str, shape: tuple[int, ...], other: tuple[int, ...] | None = None, **options: Any
) -> Callable[[], Case]:
    def build() -> Case:
        model = named(f"kornia.{path}")(**options)
        return Case(model, (noise(*shape),), None if other is None else (noise(*other),))

    return build


_PATCHES = (2, 1, 32, 32), (5, 1, 32, 32)
_IMAGES = (1, 3, 64, 64), (2, 3, 96, 96)
_GREY = (1, 1, 64, 64), (2, 1, 96, 96)


LIBRARY = Library(
    "kornia",
    {
        "HardNet": _net("feature.HardNet", *_PATCHES, pretrained=False),
        "HardNet8": _net("feature.HardNet8", *_PATCHES, pretrained=False),
        "HyNet": _net("feature.HyNet", *_PATCHES, pretrained=False),
        "SOSNet": _net("feature.SOSNet", *_PATCHES, pretrained=False),
        "OriNet": _net("feature.OriNet", *_PATCHES, pretrained=False),
        "KeyNet": _net("feature.KeyNet", *_GREY, pretrained=False),
        "DexiNed": _net("models.dexined.DexiNed", *_IMAGES, pretrained=False),
        "RRDBNet": _net("models.rrdbnet.RRDBNet", *_IMAGES, num_in_ch=3, num_out_ch=3, num_block=2),
        "TinyViT": _net("models.tiny_vit.TinyViT", (1, 3, 224, 224), depths=(1, 1, 2, 1)),
    },
)
