"""The user's model: checked, unwrapped, and copied without its tensors."""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from fxrep.errors import InputError, ModelError


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of torch.compile and (Distributed)DataParallel."""
    while isinstance(model, nn.Module):
        # By name, because importing torch._dynamo takes seconds.
        if type(model).__name__ == "OptimizedModule" and "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            break
    return model


def check(model: object) -> None:
    """Refuse a model that cannot be optimized.

    Raises:
        ModelError: it is no module, a ScriptModule, in training mode, or without real weights.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"model must be a torch.nn.Module, not {type(model).__name__}: {model!r}")
    name = type(model).__name__
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(
            f"model is a TorchScript module ({name}), which keeps no Python forward to rewrite: "
            "pass the nn.Module it was made from and script the result"
        )
    for path, tensor in named_tensors(model):
        if is_lazy(tensor):
            raise ModelError(
                f"model.{path} is not initialised yet (a Lazy module): "
                "run the model once on real inputs before optimizing it"
            )
        if tensor.is_meta or _is_fake(tensor):
            kind = "a fake tensor" if _is_fake(tensor) else "on device meta"
            raise ModelError(
                f"model.{path} is {kind} and has no values to fold: "
                "load the weights (model.to_empty(device=...), load_state_dict) first"
            )
    if model.training:
        raise ModelError(
            f"model ({name}) is in training mode, where BatchNorm uses each batch's own statistics "
            "and cannot be folded: call model.eval() first"
        )


def _is_fake(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, torch._subclasses.FakeTensor)


def named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, then buffers, by path."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def skeleton(model: nn.Module) -> nn.Module:
    """Copy the module tree and its Python attributes, but share its parameters and buffers.

    Raises:
        ModelError: an attribute cannot be copied.
    """
    memo = empty_dicts(model)
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for tensor in tensors.values():
                if tensor is not None:
                    memo[id(tensor)] = tensor
        for value in module.__dict__.values():
            if isinstance(value, torch.Tensor) and id(value) not in memo and not value.is_leaf:
                # deepcopy refuses tensors that have an autograd history
                memo[id(value)] = value.detach().clone()
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise ModelError(
            f"model ({type(model).__name__}) cannot be copied{_cause(model, memo)}: "
            f"{type(error).__name__}: {error}; remove that attribute before optimizing"
        ) from error


def empty_dicts(model: nn.Module) -> dict[int, Any]:
    """A deepcopy memo for the dicts of hooks, which are mostly empty and slow to copy."""
    return {
        id(value): OrderedDict()
        for module in model.modules()
        for value in module.__dict__.values()
        if type(value) is OrderedDict and not value
    }


def private(module: nn.Module, shared: Collection[int]) -> nn.Module:
    """A copy of the modules that hold others, as far down as they are not to be shared.

    Layers can be put into the copy, and taken out of it, while the module stays as it is.

    Args:
        module: the module at the top; it is always copied.
        shared: ids of modules that the copy has in common with the module, whole.
    """
    copies: dict[int, nn.Module] = {}

    def copied(each: nn.Module) -> nn.Module:
        if id(each) in shared or isinstance(each, torch.jit.ScriptModule):
            return each
        if id(each) not in copies:
            copies[id(each)] = new = _shallow(each)
            for name, child in each._modules.items():
                new._modules[name] = None if child is None else copied(child)
        return copies[id(each)]

    return copied(module)


def _shallow(module: nn.Module) -> nn.Module:
    new = object.__new__(type(module))  # a GraphModule's own __new__ makes a class
    new.__dict__.update(module.__dict__)
    for kind in ("_parameters", "_buffers", "_modules"):
        new.__dict__[kind] = module.__dict__[kind].copy()
    return new


def _cause(model: nn.Module, memo: dict[int, Any]) -> str:
    """The first attribute that cannot be copied, as part of a message."""
    for path, module in model.named_modules():
        for name, value in module.__dict__.items():
            if name == "_modules":
                continue
            try:
                copy.deepcopy(value, dict(memo))
            except Exception:
                where = f"{path}.{name}" if path else name
                return f" because of its attribute '{where}' ({type(value).__name__})"
    return ""


def call_arguments(example_inputs: object) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as positional and keyword arguments."""
    if isinstance(example_inputs, Mapping):
        return (), {str(name): value for name, value in example_inputs.items()}
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def named_inputs(model: nn.Module, example_inputs: object) -> dict[str, object]:
    """Example inputs by the name of the forward's argument.

    Raises:
        InputError: they do not fit the signature.
    """
    if example_inputs is None:
        return {}
    try:
        signature = inspect.signature(model.forward)
        if not isinstance(example_inputs, Mapping | tuple | list | torch.Tensor):
            raise InputError(
                "example_inputs must be a tensor, a tuple of positional arguments or a dict of "
                f"keyword arguments, not {type(example_inputs).__name__}"
            )
        args, kwargs = call_arguments(example_inputs)
        bound = signature.bind_partial(*args, **kwargs)
    except TypeError as error:
        raise InputError(
            f"example_inputs do not fit {type(model).__name__}.forward{signature}: {error}"
        ) from error
    return dict(bound.arguments)


def does_not_run(model: nn.Module, error: Exception) -> InputError:
    """The error for a model that does not run on the example inputs."""
    return InputError(
        f"example_inputs: {type(model).__name__} does not run on them "
        f"({type(error).__name__}: {error}); pass inputs it accepts, or none"
    )
