"""How far a time is from what the device could do: the roofline of Williams et al., CACM 2009."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from _timing import samples
from torch import Tensor

# Sides of the matrices: for full speed large, on a CPU small enough for many runs in a second.
MATRICES = {"cpu": (512, 1024), "cuda": (4096, 8192)}
# Far from fitting in any cache.
COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}


@dataclass(frozen=True)
class Rates:
    """The most this device was seen to do.

    Attributes:
        macs: multiply-accumulates a second.
        copied: bytes a second, read and written, of a copy in main memory.
    """

    macs: float
    copied: float


def measure_rates(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> Rates:
    """Measure the rates of a device at a dtype, in the precision mode that is set (TF32 or not).

    It is a limit that is wanted, so the fastest run of each counts, and the fastest kind of matrix
    product: on a CPU oneDNN's convolutions are not slower than BLAS and may be faster. On CUDA a
    convolution would be no measure, as Winograd's algorithm multiplies less than it says.

    Args:
        device: to measure.
        dtype: of the products.
        seconds: for each of them.
    """

    def fastest(call: Callable[..., Any], *operands: Tensor) -> float:
        return min(samples(lambda: call(*operands), device, seconds))

    def made(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    with torch.no_grad():
        macs = [n**3 / fastest(torch.mm, made(n, n), made(n, n)) for n in MATRICES[device.type]]
        if device.type == "cpu":
            convolve = functools.partial(F.conv2d, padding=1)
            images, weight = made(1, 256, 28, 28), made(256, 256, 3, 3)
            macs.append(weight.numel() * 28 * 28 / fastest(convolve, images, weight))
        source = torch.zeros(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
        # Written once before: its pages exist.
        copied = 2 * source.nbytes / fastest(Tensor.copy_, torch.zeros_like(source), source)
    return Rates(max(macs), copied)


def limit(macs: int, traffic: int, rates: Rates) -> float:
    """Seconds that these layers take at least if no cache helps from one to the next.

    Args:
        macs: multiply-accumulates.
        traffic: bytes that convolutions and matrix products read and write.
        rates: of the device.
    """
    return max(macs / rates.macs, traffic / rates.copied)


def percent(macs: int, traffic: int, rates: Rates, seconds: float) -> float:
    """The limit as a share of the time that it took, in percent.

    Above 100 where the layers hand their results on in a cache, which the copy rate does not know,
    or where a convolution algorithm multiplies less than it says.
    """
    return 100 * limit(macs, traffic, rates) / seconds
