"""speechbrain: networks for speech, on filter banks (batch, time, channels)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from _comparison import Run, plain_run
from torch import nn

from _libraries.case import Case, Library, named, noise

_BANDS = 40


def _net(path: str, *args: Any, run: Run = plain_run, **options: Any) -> Case:
    model = named(f"speechbrain.lobes.models.{path}")(*args, **options)
    return Case(model, (noise(1, 64, _BANDS),), (noise(2, 96, _BANDS),), run)


def _seeded(model: nn.Module, *inputs: Any) -> Any:
    """The statistics pooling of x-vectors adds noise to what it returns."""
    torch.manual_seed(0)
    return model(*inputs)


def _wave(path: str, *args: Any, **options: Any) -> Case:
    model = named(f"speechbrain.lobes.models.{path}")(*args, **options)
    return Case(model, (noise(1, 4096),), (noise(2, 6144),))


def _hifigan() -> Case:
    model = named("speechbrain.lobes.models.HifiGAN.HifiganGenerator")(
        in_channels=20, out_channels=1, resblock_type="1", upsample_kernel_sizes=(8, 4),
        resblock_dilation_sizes=((1, 3, 5), (1, 3, 5)), resblock_kernel_sizes=(3, 7),
        upsample_initial_channel=32, upsample_factors=(4, 2),
    )  # fmt: skip
    return Case(model, (noise(1, 20, 32),), (noise(2, 20, 48),))


def _conformer() -> Case:
    model = named("speechbrain.lobes.models.transformer.Conformer.ConformerEncoder")(
        2, 32, 64, 4, kernel_size=7
    )
    x, y = noise(1, 24, 32), noise(2, 32, 32)

    def positions(length: int) -> torch.Tensor:
        return noise(1, 2 * length - 1, 32)

    return Case(model, {"src": x, "pos_embs": positions(24)}, {"src": y, "pos_embs": positions(32)})


LIBRARY = Library(
    "speechbrain",
    {
        "ECAPA_TDNN": partial(_net, "ECAPA_TDNN.ECAPA_TDNN", 40, channels=[64] * 4 + [192]),
        "Xvector": partial(_net, "Xvector.Xvector", run=_seeded),
        "ResNet": partial(_net, "ResNet.ResNet", 40, channels=[32, 32, 64, 64]),
        "Cnn14": partial(_net, "Cnn14.Cnn14", 40, 64),
        "CRDNN": partial(_net, "CRDNN.CRDNN", 40, cnn_channels=[16, 32], rnn_neurons=32),
        "ContextNet": partial(_net, "ContextNet.ContextNet", (None, None, 40), 32, num_layers=2),
        "ConvolutionFrontEnd": partial(
            _net, "convolution.ConvolutionFrontEnd", (None, None, 40), out_channels=[16, 32, 64]
        ),
        "EnhanceResnet": partial(_wave, "EnhanceResnet.EnhanceResnet", channel_counts=[8, 16, 16]),
        "Conv2dEncoder_v2": partial(_net, "PIQ.Conv2dEncoder_v2", 32),
        "HifiganGenerator": _hifigan,
        "ConformerEncoder": _conformer,
    },
)
