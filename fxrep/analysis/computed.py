"""Tensors of a module that code computes from others: parametrizations and torch's own hooks.

Given: a convolution whose weight is ``floor(w * 10) / 10``, by a parametrization.

Result: the weight, computed once in the dtype of w. In float64 another tensor would result: the
float32 next to 0.7 is smaller than 0.7, but ten times as much rounds to 7.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fxrep.capture.sharing import Contents, of_tree
from fxrep.capture.skeleton import duplicate
from fxrep.capture.state import GeneratorStates
from fxrep.ops.owner import weight_hooks
from fxrep.refusal import Refusal

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class KeepsState(Refusal):
    """A tensor is no constant, for the code that computes it writes a state."""


def parts_of(module: nn.Module, name: str) -> list[str]:
    """The paths of the tensors that decide the value of a tensor attribute of a module."""
    if name in module._parameters or name in module._buffers:
        return [name]
    return [path for path, _ in (*module.named_parameters(), *module.named_buffers())]


def module_tensor(module: nn.Module, name: str) -> Tensor | Refusal | None:
    """A tensor attribute of a module: as it is held, or as torch computes it."""
    for held in (module._parameters, module._buffers):
        if name in held:
            return held[name]
    with torch.no_grad():
        return computed_once(module, name, parts_of(module, name))


def computed_once(module: nn.Module, name: str, parts: Sequence[str]) -> Tensor | Refusal:
    """The value of a tensor attribute that a module computes from its parameters and buffers.

    Args:
        module: the module; neither its tensors nor its attributes are changed.
        name: of the attribute.
        parts: the paths of the parameters and buffers.

    Returns:
        The value in the dtype in which the module computes it, or why it is no constant.
    """
    # A copy, since the code may be the user's and write what it reads.
    twin = duplicate(module)
    held = {**dict(twin.named_parameters()), **dict(twin.named_buffers())}
    tensors = [held[part] for part in parts]
    before = [(each, dict(vars(each))) for each in twin.modules()]
    memory = Contents(each.tensor for each in of_tree(twin))
    try:
        value = without_random_numbers(lambda: _computed(twin, name, tuple(parts), *tensors))
    except Exception as error:  # the model's own: unrewritten, it raises where it did
        return Refusal(f"its {name} cannot be computed: {error}")
    finally:
        written = memory.restore()
    if isinstance(value, Refusal):
        return Refusal(f"its {name} is no constant: the code that computes it draws numbers")
    if written or any(_was_set(*each) for each in before):
        return KeepsState(f"its {name} is no constant: the code that computes it keeps a state")
    return value.detach()


def _was_set(module: nn.Module, attributes: dict[str, Any]) -> bool:
    """Whether an attribute of a module was set since, other than the weights that hooks set."""
    now = vars(module)
    return now.keys() != attributes.keys() or any(
        now[key] is not value and not isinstance(value, Tensor) for key, value in attributes.items()
    )


def without_random_numbers(compute: Callable[[], _Value]) -> _Value | Refusal:
    """A computed value; a refusal if random numbers were drawn, whose generators are restored."""
    generators = [torch.default_generator]
    if torch.cuda.is_available():
        generators += torch.cuda.default_generators
    states, others = [generator.get_state() for generator in generators], GeneratorStates()
    drawn = False
    try:
        value = compute()
    finally:
        for generator, state in zip(generators, states, strict=True):
            drawn = drawn or not torch.equal(generator.get_state(), state)
            generator.set_state(state)
        if others.changed():
            drawn = True
            others.restore()
    return Refusal("it draws random numbers") if drawn else value


class _Computed(nn.Module):
    """A module whose result is the tensor that another module computes from its parameters."""

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__()
        self.module = module
        self.name = name

    def forward(self) -> Tensor:
        """The tensor, recomputed."""
        for hook in weight_hooks(self.module):
            hook(self.module, None)  # torch's own: sets the weight from its parts
        value = getattr(self.module, self.name)
        assert isinstance(value, Tensor)
        return value


def _computed(module: nn.Module, name: str, parts: tuple[str, ...], *tensors: Tensor) -> Tensor:
    """The tensor that `_Computed` gives for other parameters.

    Recipes call this, so users' pickles have its name (in `fxrep.reading.view`).
    """
    given = {f"module.{part}": tensor for part, tensor in zip(parts, tensors, strict=True)}
    computed = _Computed(module, name)
    value = torch.func.functional_call(computed, given, ())
    if weight_hooks(module):
        computed()  # the hooks have set the weight: this sets it back
    assert isinstance(value, Tensor)
    return value
