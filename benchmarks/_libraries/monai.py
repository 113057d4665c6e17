"""monai: networks for medical images, in two and three dimensions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from _libraries.case import Case, Library, named, noise


def _net(
    name: str,
    *args: Any,
    size: tuple[int, ...] = (64, 64),
    step: int | None = 32,
    **options: Any,
) -> Callable[[], Case]:
    def build() -> Case:
        model = named(f"monai.networks.nets.{name}")(*args, **options)
        other = None if step is None else (noise(2, 1, *(side + step for side in size)),)
        return Case(model, (noise(1, 1, *size),), other)

    return build


_LEVELS: dict[str, Any] = {
    "kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2],
    "filters": [8, 16, 32],
}  # fmt: skip
_VOLUME = (32, 32, 32)
_BATCH: dict[str, Any] = {"norm": "batch"}


LIBRARY = Library(
    "monai einops",
    {
        "BasicUNet": _net("BasicUNet", 2, 1, 2, (8, 8, 16, 32, 64, 8), **_BATCH),
        "BasicUNetPlusPlus": _net("BasicUNetPlusPlus", 2, 1, 2, (8, 8, 16, 32, 64, 8), **_BATCH),
        "UNet": _net("UNet", 2, 1, 2, (8, 16, 32), (2, 2), num_res_units=2, norm="batch"),
        "UNet-3d": _net("UNet", 3, 1, 2, (8, 16, 32), (2, 2), size=_VOLUME, **_BATCH),
        "AttentionUnet": _net("AttentionUnet", 2, 1, 2, (8, 16, 32), (2, 2)),
        "SegResNet": _net(
            "SegResNet", 2, 8, 1, 2, norm=("batch", {}), blocks_down=(1, 1, 1), blocks_up=(1, 1)
        ),
        "SegResNetVAE": _net(
            "SegResNetVAE", (64, 64), spatial_dims=2, init_filters=8, in_channels=1,
            norm=("batch", {}), blocks_down=(1, 1, 1), blocks_up=(1, 1),
        ),
        "DynUNet": _net("DynUNet", 2, 1, 2, norm_name="batch", **_LEVELS),
        "DynUNet-res": _net("DynUNet", 2, 1, 2, norm_name="batch", res_block=True, **_LEVELS),
        "VNet": _net("VNet", 2),
        "DenseNet121": _net("DenseNet121", 2, 1, 2),
        "SEResNet50": _net("SEResNet50", spatial_dims=2, in_channels=1),
        "ResNet18-3d": _net("resnet18", spatial_dims=3, n_input_channels=1, size=_VOLUME),
        "EfficientNetBN": _net("EfficientNetBN", "efficientnet-b0", False, True, 2, 1, 2),
        "FlexibleUNet": _net("FlexibleUNet", 1, 2, "efficientnet-b0"),
        "HighResNet": _net("HighResNet", 2, 1, 2, norm_type="batch"),
        "AHNet": _net("AHNet", (64, 32, 32, 32), 2, 1, 2, size=(128, 128), step=128),
        "Autoencoder": _net("AutoEncoder", 2, 1, 1, (8, 16), (2, 2), norm="batch"),
        "UNETR": _net(
            "UNETR", 1, 2, (64, 64), spatial_dims=2, feature_size=8, hidden_size=48, mlp_dim=64,
            num_heads=4, norm_name="batch", step=None,
        ),
    },
)  # fmt: skip
