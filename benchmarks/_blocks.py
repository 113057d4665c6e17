"""The train-time blocks of the literature at a size they have in real networks.

Their code is the tests' (`tests/support/blocks*.py`); `latency.py` knows them as `block:NAME`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from fxrep.cli.demo import randomize_batchnorm
from fxrep.cli.models import Example, UnknownModelError

sys.path.append(str(Path(__file__).parent.parent / "tests"))

from support import blocks, blocks_linear

CHANNELS, SIZE = 64, 56

BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "repvgg": lambda: blocks.RepVGG(CHANNELS, CHANNELS),
    "mobileone": lambda: blocks.MobileOne(CHANNELS, CHANNELS, 3, groups=CHANNELS),
    "repmixer": lambda: blocks.RepMixer(CHANNELS),
    "acnet": lambda: blocks.ACNet(CHANNELS, CHANNELS),
    "dbb": lambda: blocks_linear.DBB(CHANNELS, CHANNELS),
    "ecb": lambda: blocks_linear.ECB(CHANNELS, CHANNELS),
    "large_kernel": lambda: blocks.LargeKernel(CHANNELS),
    "dilated": lambda: blocks.DilatedReparam(CHANNELS),
}


def load(name: str, size: int | None = None, batch: int = 1) -> Example:
    """One block, and an input (batch, 64, size, size) for it; 56 pixels by default.

    Raises:
        UnknownModelError: there is no such block.
    """
    if name not in BLOCKS:
        raise UnknownModelError(f"block:{name}: no such block; there are {', '.join(BLOCKS)}")
    torch.manual_seed(0)
    model = BLOCKS[name]().eval()
    randomize_batchnorm(model)
    side = size or SIZE
    return Example(f"block:{name}", model, (torch.randn(batch, CHANNELS, side, side),))
