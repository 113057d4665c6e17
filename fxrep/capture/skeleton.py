"""The user's model: checked, unwrapped, and copied without its tensors."""

from __future__ import annotations

import copy
import inspect
import types
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from fxrep.capture.kept import filled_slots
from fxrep.capture.sharing import Reached, of_tree
from fxrep.capture.state import unchanged_random_state
from fxrep.errors import InputError, ModelError
from fxrep.ops.memory import Memory, addresses


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
    for path, module in model.named_modules():
        slot = next((slot for _, slot in filled_slots(module)), None)
        if slot is not None:
            where = f"model.{path}" if path else "model"
            raise ModelError(
                f"{where} ({type(module).__name__}) keeps '{slot}' in __slots__, which no copy of "
                "a module has (copy.deepcopy loses it, too): keep it as an attribute"
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


def skeleton(model: nn.Module, found: Iterable[Reached]) -> nn.Module:
    """Copy the module tree and its Python attributes, but share its parameters and buffers.

    What shares the memory of a parameter or buffer is shared too: tensors in other attributes,
    NumPy arrays, storages.

    Args:
        model: the model.
        found: the tensors that it reaches.

    Raises:
        ModelError: an attribute cannot be copied.
    """
    registered = [tensor for module in model.modules() for tensor in _registered(module)]
    memo: dict[int, Any] = {id(tensor): tensor for tensor in registered}
    memory = Memory(registered)
    for each in found:
        if each.holder is not each.tensor or id(each.tensor) not in memo:
            memo |= {id(each.holder): each.holder} if each.tensor in memory else {}
    try:
        copied = _copied(model, memo)
    except Exception as error:
        raise ModelError(
            f"model ({type(model).__name__}) cannot be copied{_cause(model, memo)}: "
            f"{type(error).__name__}: {error}; remove that attribute before optimizing"
        ) from error
    _refuse_shared_modules(model, copied)
    return copied


def _refuse_shared_modules(model: nn.Module, copied: nn.Module) -> None:
    """Refuse a module whose copy is itself: a rewrite of the copy would be one of the user's."""
    users = {id(module): path for path, module in model.named_modules()}
    for module in copied.modules():
        # A script is no part of a graph; where its tensors are those of the model, it is shared.
        if id(module) in users and not isinstance(module, torch.jit.ScriptModule):
            where = f"model.{users[id(module)]}" if users[id(module)] else "model"
            raise ModelError(
                f"{where} ({type(module).__name__}) cannot be copied: its copy is the module "
                "itself, so that optimizing the copy would change the original; give its "
                "__deepcopy__ a copy to return, or optimize the modules around it"
            )


def _registered(module: nn.Module) -> Iterator[torch.Tensor]:
    """The parameters and buffers of a module, without those of its children or of a script."""
    if isinstance(module, torch.jit.ScriptModule):  # copies them itself
        return
    for tensors in (module._parameters, module._buffers):
        yield from (tensor for tensor in tensors.values() if tensor is not None)


def duplicate(
    tree: nn.Module,
    memo: dict[int, Any] | None = None,
    found: Sequence[Reached] | None = None,
) -> nn.Module:
    """A deepcopy in which tensors share memory as in the tree.

    The memory that the modules reach through what no deepcopy copies (a function, a class, a weak
    reference, a NumPy array) stays one: the copy and the tree share it.

    Args:
        tree: the modules to copy.
        memo: as for `copy.deepcopy`.
        found: the tensors that the tree reaches, if they are known.
    """
    memo = {} if memo is None else memo
    found = of_tree(tree) if found is None else found
    fixed = Memory(each.tensor for each in found if not each.copied)
    holders = {(addresses(each.tensor), id(each.holder)) for each in found}
    users = Counter(address for address, _ in holders)
    for each in found:
        if id(each.holder) not in memo:
            alone = users[addresses(each.tensor)] == 1
            _remember(each.holder, memo, stays=each.tensor in fixed, alone=alone)
    return _copied(tree, memo)


def _remember(holder: Any, memo: dict[int, Any], *, stays: bool, alone: bool) -> None:
    """Put a tensor, or what holds one, into the memo if its copy is no plain deepcopy.

    Args:
        holder: the tensor, or what holds one.
        memo: as for `copy.deepcopy`.
        stays: it stays in its memory.
        alone: no other tensor of the tree shares its memory.
    """
    if type(holder) is nn.Parameter:
        if stays:
            data = holder.detach()
        elif alone:  # as deepcopy does, in a fraction of the time
            data = holder.detach().clone()
        else:  # deepcopy clones a parameter, but copies the storage of a tensor once
            data = copy.deepcopy(holder.detach(), memo)
        memo[id(holder)] = nn.Parameter(data, requires_grad=holder.requires_grad)
    elif stays:
        memo[id(holder)] = holder
    elif alone and type(holder) is torch.Tensor and _is_dense(holder):
        memo[id(holder)] = holder.clone()


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether a clone of a tensor is all that a deepcopy is."""
    return (
        tensor.layout is torch.strided
        and not (tensor.requires_grad or tensor.is_quantized or tensor.__dict__)
        and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    )


def _copied(tree: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deepcopy; what is copied often, or cannot be deepcopied, is put into the memo before."""
    modules = list(tree.modules())
    for module in modules:
        for value in vars(module).values():
            kind = type(value)
            if kind in _ATOMS or id(value) in memo:
                continue
            if kind in _OFTEN_EMPTY and not value:
                memo[id(value)] = kind()
            elif isinstance(value, torch.Tensor) and not value.is_leaf:
                # deepcopy refuses tensors that have an autograd history
                memo[id(value)] = value.detach().clone()
    plain = _plain_modules(modules, memo)
    memo |= {id(module): object.__new__(type(module)) for module in plain}
    for module in plain:  # in a fraction of the time of deepcopy: most attributes are numbers
        made = vars(memo[id(module)])
        for name, value in vars(module).items():
            made[name] = value if type(value) in _ATOMS else _copied_value(value, memo)
    if all(id(module) in memo for module in modules):
        return copy.deepcopy(tree, memo)
    with unchanged_random_state(despite_other_threads=True):  # the user's code may draw numbers
        return copy.deepcopy(tree, memo)


def _plain_modules(modules: list[nn.Module], memo: Mapping[int, Any]) -> list[nn.Module]:
    """The modules of which, with all below them, a copy runs no code of the user's.

    Such code would meet the copies of other modules before they have their attributes.

    Args:
        modules: the modules of a tree, from its root.
        memo: as for `copy.deepcopy`.
    """
    plain: dict[int, nn.Module] = {}
    for module in reversed(modules):
        children = (child for child in module._modules.values() if child is not None)
        if (
            id(module) not in memo
            and _copies_like_any(module)
            and all(id(child) in plain or id(child) in memo for child in children)
            and all(
                type(value) in _ATOMS or id(value) in memo or _is_plain(value, memo)
                for name, value in vars(module).items()
                if name != "_modules"
            )
        ):
            plain[id(module)] = module
    return list(plain.values())


def _is_plain(value: Any, memo: Mapping[int, Any]) -> bool:
    kind = type(value)
    if kind in _ATOMS or id(value) in memo or kind in (torch.Tensor, nn.Parameter):
        return True
    if kind in (list, tuple, set):
        return all(_is_plain(each, memo) for each in value)
    if kind in (dict, OrderedDict):
        return all(_is_plain(each, memo) for item in value.items() for each in item)
    return False


def _copied_value(value: Any, memo: dict[int, Any]) -> Any:
    if type(value) in _ATOMS:
        return value
    if id(value) in memo:
        return memo[id(value)]
    if type(value) is tuple and all(type(each) in _ATOMS for each in value):
        return value  # as deepcopy gives it back
    if type(value) is dict:
        made = memo[id(value)] = {}
        for key, each in value.items():
            made[_copied_value(key, memo)] = _copied_value(each, memo)
        return made
    return copy.deepcopy(value, memo)


def _copies_like_any(module: nn.Module) -> bool:
    """Whether a module has no code of its own for copies: its attributes are copied one by one."""
    kind = type(module)
    return (
        not hasattr(kind, "__deepcopy__")
        and kind.__new__ is object.__new__
        and kind.__setstate__ in _PLAIN_STATES
        and all(getattr(kind, n, None) is getattr(nn.Module, n, None) for n in _COPYING)
        and "_compiled_call_impl" not in vars(module)
        and not any("__slots__" in vars(each) for each in kind.__mro__)
    )


# The dicts of hooks, and the sets of names of buffers.
_OFTEN_EMPTY = (OrderedDict, set)
_PLAIN_STATES = (nn.Module.__setstate__, nn.modules.conv._ConvNd.__setstate__)
_COPYING = ("__reduce__", "__reduce_ex__", "__getstate__", "__getattribute__")
_ATOMS = frozenset(
    {int, float, bool, str, type(None), type, types.FunctionType, types.BuiltinFunctionType}
)


def private(module: nn.Module, shared: Collection[int]) -> nn.Module:
    """A copy of the modules that hold others, as far down as they are not to be shared.

    Layers can be put into the copy, and taken out of it, while the module stays as it is.

    Args:
        module: the module at the top; it is always copied.
        shared: ids of modules that the copy has in common with the module, whole.
    """
    return _private(module, shared, {})


def _private(module: nn.Module, shared: Collection[int], copies: dict[int, nn.Module]) -> nn.Module:
    if id(module) in shared or isinstance(module, torch.jit.ScriptModule):
        return module
    if id(module) not in copies:
        copies[id(module)] = new = _shallow(module)
        for name, child in module._modules.items():
            new._modules[name] = None if child is None else _private(child, shared, copies)
    return copies[id(module)]


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
