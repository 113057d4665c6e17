"""What is measured: a model by name and its inputs, on a device, in a dtype and a memory format."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import _blocks
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from fxrep.cli.models import Example, load

DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


@dataclass(frozen=True)
class Setting:
    """What a model is measured in.

    Attributes:
        device: where it runs.
        dtype: a key of `DTYPES`.
        batch: images.
        size: height and width of the images; what the model was made for by default.
        channels_last: whether weights and images have their channels last in memory.
    """

    device: torch.device
    dtype: str = "fp32"
    batch: int = 1
    size: int | None = None
    channels_last: bool = False


def example(name: str, size: int | None = None, batch: int = 1) -> Example:
    """A model by name with inputs: those of `fxrep.cli.models.load`, and `block:NAME`.

    Raises:
        FxrepError: there is no such model.
    """
    source, _, rest = name.partition(":")
    return _blocks.load(rest, size, batch) if source == "block" else load(name, size, batch)


def placed(given: Example, setting: Setting) -> Example:
    """The model and its inputs on a device, in a dtype and a memory format."""
    to: dict[str, Any] = {"device": setting.device, "dtype": DTYPES[setting.dtype]}

    def move(x: Tensor) -> Tensor:
        x = x.to(**to) if x.is_floating_point() else x.to(setting.device)
        image = setting.channels_last and x.dim() == 4
        return x.contiguous(memory_format=torch.channels_last) if image else x

    model = given.model.to(**to)
    if setting.channels_last:
        model = model.to(memory_format=torch.channels_last)
    return Example(given.name, model, tree_map_only(Tensor, move, given.inputs))


def batch_of(inputs: tuple[Any, ...]) -> int:
    """Images in the inputs: a factory that brings its own decides."""
    return len(inputs[0]) if isinstance(inputs[0], Tensor | list | tuple) else 1


def shapes(inputs: tuple[Any, ...]) -> str:
    """Shapes of the inputs, such as "1x3x224x224"."""
    leaves = (x for x in tree_leaves(inputs) if isinstance(x, Tensor))
    return ", ".join("x".join(map(str, x.shape)) for x in leaves)


@contextlib.contextmanager
def precision(dtype: str) -> Iterator[None]:
    """TF32 in convolutions and matrix products, or not; cuDNN may search for its fastest kernel."""
    matmul, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    search = torch.backends.cudnn.benchmark
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = dtype == "tf32"
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = cudnn, search
