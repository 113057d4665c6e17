"""spandrel: super-resolution and restoration."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from _libraries.case import Case, Library, image, named, of_images


def _net(path: str, channels: int = 3, side: int = 32, **options: Any) -> Case:
    model = named(f"spandrel.architectures.{path}")(**options)
    return of_images(model, side, 2 * side, channels)


def _lama() -> Case:
    model = named("spandrel.architectures.LaMa.LaMa")(in_nc=4)

    def inputs(side: int) -> dict[str, Tensor]:
        return {"img": image(side), "mask": (image(side, channels=1) > 0).float()}

    return Case(model, inputs(64), inputs(96))


LIBRARY = Library(
    "spandrel",
    {
        "SPAN": partial(_net, "SPAN.SPAN", num_in_ch=3, num_out_ch=3),
        "ESRGAN": partial(_net, "ESRGAN.ESRGAN", num_blocks=2),
        "Compact": partial(_net, "Compact.Compact"),
        "PLKSR": partial(_net, "PLKSR.PLKSR", n_blocks=2),
        "RealPLKSR": partial(_net, "PLKSR.RealPLKSR", n_blocks=2),
        "RCAN": partial(_net, "RCAN.RCAN", n_resgroups=2, n_resblocks=2),
        "NAFNet": partial(_net, "NAFNet.NAFNet", enc_blk_nums=[1, 1], dec_blk_nums=[1, 1]),
        "DRUNet": partial(_net, "DRUNet.DRUNet", 3, in_nc=3, out_nc=3, nc=[16, 32, 48, 64], nb=2),
        "DnCNN": partial(_net, "DnCNN.DnCNN", 1),
        "SAFMN": partial(_net, "SAFMN.SAFMN", dim=36, n_blocks=2),
        "FBCNN": partial(_net, "FBCNN.FBCNN"),
        "SwiftSRGAN": partial(_net, "SwiftSRGAN.SwiftSRGAN", num_blocks=4),
        "MoSR": partial(_net, "MoSR.MoSR", n_block=2),
        "MixDehazeNet": partial(_net, "MixDehazeNet.MixDehazeNet", side=64),
        "LaMa": _lama,
    },
)
