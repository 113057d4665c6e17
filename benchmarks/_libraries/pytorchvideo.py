"""pytorchvideo: networks over space and time."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from _libraries.case import Case, Library, named, noise

_SIDE = 64


def _clip(frames: int, batch: int = 1) -> Tensor:
    return noise(batch, 3, frames, _SIDE, _SIDE)


def _net(builder: str, frames: int = 8, **options: Any) -> Case:
    model = named(f"pytorchvideo.models.{builder}")(**options)
    return Case(model, (_clip(frames),), (_clip(frames, 2),))


def _slowfast() -> Case:
    model = named("pytorchvideo.models.slowfast.create_slowfast")(
        model_depth=18,
        head_pool_kernel_sizes=((2, 2, 2), (8, 2, 2)),
        slowfast_channel_reduction_ratio=(8,),
    )
    return Case(model, ([_clip(2), _clip(8)],), ([_clip(2, 2), _clip(8, 2)],))


LIBRARY = Library(
    "pytorchvideo",
    {
        "resnet50": partial(_net, "resnet.create_resnet", head_pool_kernel_size=(4, 2, 2)),
        "csn_r50": partial(_net, "csn.create_csn", head_pool_kernel_size=(1, 4, 4)),
        "r2plus1d_r50": partial(
            _net, "r2plus1d.create_r2plus1d", dropout_rate=0.5, head_pool_kernel_size=(2, 2, 2)
        ),
        "x3d_xs": partial(_net, "x3d.create_x3d", 4, input_clip_length=4, input_crop_size=_SIDE),
        "efficient_x3d_xs": partial(_net, "hub.efficient_x3d_xs", 4),
        "slowfast": _slowfast,
    },
)
