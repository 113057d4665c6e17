"""What a model of a library is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from _comparison import Inputs, Run, plain_run
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """A model with random weights, as its library builds it, and inputs for it.

    Attributes:
        model: in any mode.
        inputs: positional, or keywords.
        other: inputs of another size, None where the model takes one size only.
        run: how it runs, where a plain call would not do.
        author: the library's own conversion for inference, if it has one; may change its argument.
    """

    model: nn.Module
    inputs: Inputs
    other: Inputs | None = None
    run: Run = plain_run
    author: Callable[[nn.Module], nn.Module] | None = None


@dataclass(frozen=True)
class Library:
    """A library on PyPI.

    Attributes:
        install: what ``pip install`` needs for its models, its own name first.
        cases: how each model is made; the library is imported when one is.
    """

    install: str
    cases: dict[str, Callable[[], Case]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name on PyPI."""
        return self.install.split()[0]


def named(path: str) -> Any:
    """A class or function of a library by its path, such as ``monai.networks.nets.UNet``."""
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def image(side: int, batch: int = 1, channels: int = 3) -> Tensor:
    """Random square images (batch, channels, side, side), the same at every call."""
    return noise(batch, channels, side, side)


def noise(*shape: int) -> Tensor:
    """Normal random numbers, the same at every call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def of_images(
    model: nn.Module, side: int, other: int | None = None, channels: int = 3, run: Run = plain_run
) -> Case:
    """A model of one image, and at another size and batch a second one."""
    second = None if other is None else (image(other, 2, channels),)
    return Case(model, (image(side, 1, channels),), second, run)
