"""What the modules of a model are given in one run of a copy on the user's inputs."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from fxrep.capture.answers import Given
from fxrep.capture.shadows import faked
from fxrep.capture.sharing import Reached
from fxrep.capture.skeleton import call_arguments, duplicate
from fxrep.capture.state import unchanged_random_state
from fxrep.capture.surroundings import Surroundings


def recorded(
    model: nn.Module, reached: list[Reached], surroundings: Surroundings, example_inputs: object
) -> Mapping[str, Given]:
    """The arguments of the first call of each module, by path, with fake tensors.

    Args:
        model: the model.
        reached: the tensors that it reaches.
        surroundings: what a copy shares with it.
        example_inputs: as given to `optimize`.

    Returns:
        None of the arguments, where a copy must not be run or does not run.
    """
    scripted = any(isinstance(module, torch.jit.ScriptModule) for module in model.modules())
    if surroundings.unrunnable is not None or scripted:
        return {}
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    found: dict[str, Given] = {}
    twin = duplicate(model, found=reached)
    for path, module in twin.named_modules():

        def record(module: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
            with contextlib.suppress(TypeError, ValueError):
                bound = inspect.signature(module.forward).bind(*args, **kwargs)
                found.setdefault(path, Given(faked(mode, dict(bound.arguments)), mode=mode))

        module.register_forward_pre_hook(record, with_kwargs=True)
    args, kwargs = tree_map_only(Tensor, Tensor.clone, call_arguments(example_inputs))
    try:
        # The user's code may raise; a later step tells the user.
        with torch.no_grad(), unchanged_random_state(), contextlib.suppress(Exception):
            surroundings.run(twin, *args, **kwargs)
    finally:
        surroundings.restore()
    return found
