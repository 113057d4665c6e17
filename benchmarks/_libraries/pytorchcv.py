"""pytorchcv: many classifiers, written alike."""

from __future__ import annotations

from functools import partial

from _libraries.case import Case, Library, named, of_images


def _net(name: str, side: int = 224, other: int | None = None) -> Case:
    build = named("pytorchcv.model_provider.get_model")
    return of_images(build(name, pretrained=False), side, other)


_NAMES = (
    "resnet10", "preresnet10", "seresnet10", "mobilenet_wd4", "mobilenetv2_wd4",
    "mobilenetv3_small_w7d20", "shufflenet_g3_wd4", "shufflenetv2_wd2", "menet108_8x1_g3",
    "sqnxt23_w1", "condensenet74_c4_g4", "darts", "fishnet99", "igcv3_wd4", "mnasnet_b1",
    "proxylessnas_mobile", "vovnet27s", "hardnet39ds", "dla34", "diracnet18v2", "ghostnet",
    "pyramidnet101_a360",
)  # fmt: skip


LIBRARY = Library("pytorchcv", {name: partial(_net, name) for name in _NAMES})
