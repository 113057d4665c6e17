"""Layers with other tensors, and how they run: the twins that translation validation compares."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from fxrep.ops.calls import ModuleTensor
from fxrep.reading.view import View
from fxrep.rewriting.layers import Lookup


def in_float64(view: View, node: fx.Node, exact: Lookup) -> Callable[..., Any]:
    """The call of a module with all its tensors in float64.

    A weight that torch computes from others is computed in the dtype of the model, and widened.
    """
    path = str(node.target)
    module, called = view.submodule(path), view.calls.of(node)
    held = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
    tensors = {name: exact(f"{path}.{name}") for name in held}
    arguments = called.arguments if called is not None else None
    names = [a.name for a in (arguments or {}).values() if isinstance(a, ModuleTensor)]
    computed = {name: exact(f"{path}.{name}") for name in names if name not in tensors}
    if module._modules and not parametrize.is_parametrized(module):
        return lambda *args, **kwargs: torch.func.functional_call(module, tensors, args, kwargs)
    return twin(module, tensors, computed).forward


def twin(
    module: nn.Module, tensors: Mapping[str, Tensor], computed: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """A layer with other tensors.

    Args:
        module: the layer; its parametrizations are left out.
        tensors: its parameters and buffers, by name.
        computed: attributes that are neither, by name.
    """
    computed = computed or {}
    kind: type[nn.Module] = type(module)
    if parametrize.is_parametrized(module):
        kind = parametrize.type_before_parametrizations(module)
    made: nn.Module = kind.__new__(kind)
    made.__dict__.update({key: v for key, v in vars(module).items() if key not in computed})
    made.__dict__["_modules"] = {}
    for registered in ("_parameters", "_buffers"):
        own: dict[str, Tensor | None] = vars(module)[registered]
        made.__dict__[registered] = {name: tensors.get(name, value) for name, value in own.items()}
    made.__dict__["_buffers"] |= computed
    if kind is nn.Conv2d and module.groups != 1:
        made.__dict__["_conv_forward"] = functools.partial(_grouped, module)
    return made


def _grouped(conv: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What ``conv._conv_forward(x, weight, bias)`` computes.

    On a CPU torch runs the groups of a Conv2d in float64 one by one, those of a Conv3d at once: a
    plane is a volume of depth one.
    """
    found: Tensor
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str) or x.device.type != "cpu":
        found = nn.Conv2d._conv_forward(conv, x, weight, bias)
        return found
    volume, window = x.unsqueeze(-3), weight.unsqueeze(-3)
    stride, padding, dilation = (1, *conv.stride), (0, *conv.padding), (1, *conv.dilation)
    found = F.conv3d(volume, window, bias, stride, padding, dilation, conv.groups)
    return found.squeeze(-3)
