"""Models by name, with inputs that fit them, for the command line and the benchmarks."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxrep.cli.demo import RepVGG, randomize_batchnorm
from fxrep.errors import FxrepError

BUILT_IN = "repvgg_a0"
DEFAULT_SIZE = 224


class UnknownModelError(FxrepError):
    """A model name that does not exist, or whose library is not installed."""


@dataclass(frozen=True)
class Example:
    """A model in eval mode with randomised BatchNorms, and positional inputs for it."""

    name: str
    model: nn.Module
    inputs: tuple[Any, ...]


def load(name: str = BUILT_IN, size: int | None = None, batch: int = 1) -> Example:
    """Build a model; nothing is downloaded.

    Args:
        name: ``timm:NAME``, ``torchvision:NAME``, ``package.module:factory``; by default the
            built-in network. A factory takes no argument and returns a module, or a module and a
            tuple of its inputs.
        size: height and width of the images in pixels; by default those the model was made for.
        batch: number of images.

    Raises:
        UnknownModelError: the model does not exist, or the library it needs is missing.
    """
    torch.manual_seed(0)
    model: nn.Module
    source, _, rest = name.partition(":")
    if name == BUILT_IN:
        model, shape = RepVGG(), _image(size)
    elif source == "timm" and rest:
        model, shape = _timm(rest, size)
    elif source == "torchvision" and rest:
        model, shape = _torchvision(rest, size)
    elif rest:
        model, given = _factory(source, rest)
        if given is not None:
            return Example(name, _prepare(model), given)
        shape = _image(size)
    else:
        raise UnknownModelError(
            f"{name!r} is no model name; write timm:NAME, torchvision:NAME or "
            "package.module:factory, or nothing for the built-in network"
        )
    return Example(name, _prepare(model), _inputs(model, batch, shape))


def _prepare(model: nn.Module) -> nn.Module:
    randomize_batchnorm(model)
    return model.eval()


def _image(size: int | None, default: int = DEFAULT_SIZE) -> tuple[int, ...]:
    return (3, size or default, size or default)


def _timm(name: str, size: int | None) -> tuple[nn.Module, tuple[int, ...]]:
    timm = _library("timm")
    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name}*")[:5]) or "see timm.list_models()"
        raise UnknownModelError(f"timm:{name}: timm {timm.__version__} has no such model; {near}")
    model: nn.Module = timm.create_model(name, pretrained=False)
    made_for = tuple(model.pretrained_cfg["input_size"])  # type: ignore[index]
    return model, made_for if size is None else (made_for[0], size, size)


def _torchvision(name: str, size: int | None) -> tuple[nn.Module, tuple[int, ...]]:
    torchvision = _library("torchvision")
    models = torchvision.models
    if name not in models.list_models():
        near = ", ".join(m for m in models.list_models() if name in m) or "see its list_models()"
        raise UnknownModelError(
            f"torchvision:{name}: torchvision {torchvision.__version__} has no such model; {near}"
        )
    builder = models.get_model_builder(name)
    # Without this option torchvision downloads the backbones of these models.
    kind = builder.__module__.removeprefix("torchvision.models.").partition(".")[0]
    options = {"weights_backbone": None} if kind in ("detection", "segmentation") else {}
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = True  # type: ignore[assignment]  # silences a warning
    model: nn.Module = models.get_model(name, weights=None, **options)
    if kind == "video":
        frames = 16
        side = 224 if name.startswith(("mvit", "swin", "s3d")) else 112
        return model, (3, frames, *_image(size, side)[1:])
    made_for = {"optical_flow": 128, "detection": 320}.get(kind, DEFAULT_SIZE)
    return model, _image(size, 299 if name == "inception_v3" else made_for)


def _factory(module: str, name: str) -> tuple[nn.Module, tuple[Any, ...] | None]:
    """The module that a factory makes, and its inputs if the factory returns any."""
    try:
        factory = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UnknownModelError(f"{module}:{name} cannot be imported: {error}") from error
    made = factory()
    model, given = made if isinstance(made, tuple) else (made, None)
    if not isinstance(model, nn.Module):
        raise UnknownModelError(
            f"{module}:{name} returned {type(model).__name__}, which is no module"
        )
    if given is not None and not isinstance(given, tuple):
        given = (given,)
    return model, given


def _inputs(model: nn.Module, batch: int, shape: tuple[int, ...]) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)

    def images() -> Tensor:
        return torch.randn(batch, *shape, generator=generator)

    module = type(model).__module__
    if module.startswith("torchvision.models.detection"):
        return (list(images().sigmoid()),)  # a list of images in 0-1
    if module.startswith("torchvision.models.optical_flow"):
        return (images(), images())
    return (images(),)


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UnknownModelError(
            f"{name} is not installed ({error}); python -m pip install {name}"
        ) from error
    except RuntimeError as error:  # its binaries were built for another torch
        raise UnknownModelError(
            f"{name} is installed but does not import beside torch {torch.__version__}: {error}"
        ) from error
