"""Whose code a call of a module runs: the only place that decides it.

The class of a module says what the module computes only if a call runs the code of a class of
torch.nn and nothing else. A subclass, a method set on the instance or a hook may change everything,
the rank and the type of the result included; of such a call nothing is known.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules import module as _nn_module
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from fxrep.words import words

EVERY_MODULE = frozenset(vars(nn.Module()))
"""The names of the attributes that every module has: tensors, children, hooks, flags."""


def weight_hooks(module: nn.Module) -> list[Any]:
    """Pre-hooks of torch itself that compute a weight: old weight_norm, spectral_norm, pruning."""
    return [hook for hook in module._forward_pre_hooks.values() if _computes_weight(hook)]


def foreign_hooks(module: nn.Module) -> list[Any]:
    """All other hooks that run at a call of the module, those for all modules included."""
    own = [hook for hook in module._forward_pre_hooks.values() if not _computes_weight(hook)]
    for hooks in (module._forward_hooks, module._backward_hooks, module._backward_pre_hooks):
        own += hooks.values()
    return own + global_hooks()


def global_hooks() -> list[Any]:
    """Hooks for all modules: those of ``torch.nn.modules.module.register_module_*_hook``."""
    return [
        hook
        for hooks in (
            _nn_module._global_forward_pre_hooks,
            _nn_module._global_forward_hooks,
            _nn_module._global_backward_pre_hooks,
            _nn_module._global_backward_hooks,
        )
        for hook in hooks.values()
    ]


def own_calls(module: nn.Module) -> list[Any]:
    """The methods that a call runs around the forward, other than torch's own."""
    if isinstance(module, fx.GraphModule | torch.jit.ScriptModule):
        return []
    method = type(module).__call__
    return [*([] if method is nn.Module.__call__ else [method]), *own_call_impls(module)]


def own_call_impls(module: nn.Module) -> list[Any]:
    """The same for the methods that ``nn.Module.__call__`` runs."""
    if isinstance(module, fx.GraphModule | torch.jit.ScriptModule):
        return []
    names = ("_wrapped_call_impl", "_call_impl")
    found = [getattr(type(module), name) for name in names]
    own = [f for f, name in zip(found, names, strict=True) if f is not getattr(nn.Module, name)]
    return own + [vars(module)[name] for name in names if name in vars(module)]


def _computes_weight(hook: object) -> bool:
    return isinstance(hook, WeightNorm | SpectralNorm | prune.BasePruningMethod)


def torch_class(module: nn.Module) -> type[nn.Module] | None:
    """The class of torch.nn whose code a module's methods are, hooks aside; None if they differ.

    A subclass counts as its base class if it overrides nothing that a call of the base runs. A
    method set on the instance (``conv._conv_forward = ...``) overrides like one of a subclass.
    """
    kind: type = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        return None
    if parametrize.is_parametrized(module):
        kind = parametrize.type_before_parametrizations(module)
    if not all(_is_defined_by_torch(kind, name) for name in _METHODS_RUN):
        return None
    for index, base in enumerate(kind.__mro__):
        if base is nn.Module or not base.__module__.startswith(("torch.nn.", "torch.ao.nn.")):
            continue
        inherited = {name for parent in kind.__mro__[index:-1] for name in vars(parent)}
        inherited = (inherited | {"__getattribute__"}) - _INERT
        if any(vars(child).keys() & inherited for child in kind.__mro__[:index]):
            return None
        own = vars(module).keys() & inherited
        return None if any(callable(getattr(kind, name, None)) for name in own) else base
    return None


# Methods that a call runs. Other libraries set their own on torch's classes.
_METHODS_RUN = ("forward", "_conv_forward", "_check_input_dim", "_call_impl")


def _is_defined_by_torch(kind: type, name: str) -> bool:
    namespace = getattr(getattr(kind, name, None), "__module__", None) or "torch"
    return namespace.partition(".")[0] == "torch"


# Names that a subclass or an instance may define without changing the result of a call.
_INERT = words(
    "__module__ __qualname__ __doc__ __init__ __annotations__ __dict__ __weakref__ __slots__ "
    "__constants__ __parameters__ __orig_bases__ __firstlineno__ __static_attributes__ "
    "__annotate__ __annotate_func__ __annotations_cache__ __repr__ "
    "extra_repr reset_parameters reset_running_stats"
)


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is a leaf of the trace: its call is one node of the graph.

    True for modules of torch.nn that run torch's own code and are no containers, and for
    ScriptModules, which cannot be traced.
    """
    return isinstance(module, torch.jit.ScriptModule) or leaf_class(module) is not None


def leaf_class(module: nn.Module) -> type[nn.Module] | None:
    """The class of torch.nn whose code a module runs, hooks aside; None also for a container."""
    base = torch_class(module)
    return None if base is None or issubclass(base, _CONTAINERS) else base


_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def called_class(module: nn.Module) -> type[nn.Module] | None:
    """The class of torch.nn whose code a call of the module runs and nothing else, or None."""
    return None if foreign_hooks(module) else leaf_class(module)


def owner(node: fx.Node, module: nn.Module) -> type[nn.Module] | None:
    """`called_class` of the module that a node calls, as it was at capture."""
    if _OWNER not in node.meta:
        node.meta[_OWNER] = called_class(module)
    found: type[nn.Module] | None = node.meta[_OWNER]
    return found


def known_class(node: fx.Node, module: nn.Module, known: Container[Any]) -> Any:
    """The class among `known` whose code a node runs and nothing else, or None."""
    base = owner(node, module)
    found = next((kind for kind in base.__mro__ if kind in known), None) if base else None
    return found if base is not None and found is not None and _same_code(base, found) else None


def _same_code(base: type[nn.Module], kind: type[nn.Module]) -> bool:
    """Whether a class of torch computes the same as `kind`, from which it derives."""
    below = base.__mro__[: base.__mro__.index(kind)]
    return not any((vars(child).keys() & vars(kind).keys()) - _INERT for child in below)


_OWNER = "owner"
