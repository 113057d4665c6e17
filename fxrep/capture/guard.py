"""Whether the modules that a graph was made from are what they were.

A graph of fused layers stands for a module's forward only as long as nobody changes the module:
loads or trains its weights, calls ``train()``, sets a stride, registers a hook. Python code has
many ways to do so and no way to tell of it; so the state of the modules is compared at each call,
in about a microsecond for each module.

What the comparison does not see: writes that leave a tensor's version as it is (through `numpy()`,
DLPack, a storage, or ``tensor.data.mul_``), and changes inside objects other than containers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.jit import ScriptModule

from fxrep.capture.kept import is_container
from fxrep.ops.owner import EVERY_MODULE, global_hooks, weight_hooks

_DEPTH = 4  # of containers in containers

_attributes_of = attrgetter("__dict__")
_requires_grad = attrgetter("requires_grad")
_version = torch._C.TensorBase._version.__get__  # type: ignore[attr-defined]


class Unchanged:
    """The state of some modules, recorded once and compared at each call.

    A copy or a pickle of a record that holds is a record of the copied modules.

    Args:
        modules: the modules, each once.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.modules = list(modules)
        self.types = list(map(type, self.modules))
        # The hook of a weight_norm sets the weight at each call.
        self.plain = [m for m in self.modules if not weight_hooks(m)]
        self.attributes = [copy.copy(m.__dict__) for m in self.plain]
        self.hooked = [m for m in self.modules if weight_hooks(m)]
        self.hooked_attributes = [_without_weights(m) for m in self.hooked]
        containers = {id(c): c for m in self.modules for c in _containers(m)}.values()
        self.empty = [each for each in containers if not each]
        self.filled = [each for each in containers if each]
        self.content = [copy.copy(each) for each in self.filled]
        self.tensors = list({id(t): t for m in self.modules for t in _tensors(m)}.values())
        self._read_tensors()

    def _read_tensors(self) -> None:
        self.versioned = [tensor for tensor in self.tensors if not tensor.is_inference()]
        self.versions = list(map(_version, self.versioned))
        self.placed = list(filter(_has_address, self.tensors))
        self.addresses = list(map(Tensor.data_ptr, self.placed))
        self.classes = list(dict.fromkeys(each for kind in self.types for each in _own_mro(kind)))
        self.class_attributes = [dict(vars(each)) for each in self.classes]
        self.global_hooks = global_hooks()
        self.trainable = [tensor for tensor in self.tensors if isinstance(tensor, nn.Parameter)]

    def holds(self, *, exported: bool = False) -> bool:
        """Whether the modules, their attributes and the content of their tensors are the same.

        Args:
            exported: torch.export runs the modules, with fake tensors in place of their own.
        """
        # Lists and dicts compare their items by identity first, without a step of Python code.
        try:
            return (
                list(map(_version, self.versioned)) == self.versions
                and list(map(Tensor.data_ptr, self.placed)) == self.addresses
                and list(map(type, self.modules)) == self.types
                and list(map(vars, self.classes)) == self.class_attributes
                # An export sets hooks of its own.
                and (exported or global_hooks() == self.global_hooks)
                and list(map(_attributes_of, self.plain)) == self.attributes
                and list(map(_without_weights, self.hooked)) == self.hooked_attributes
                and not any(self.empty)
                and (self.filled == self.content if not exported else self._faked())
            )
        except Exception:  # a value that cannot be compared is another value than before
            return False

    def _faked(self) -> bool:
        """Whether the containers are the same but for fake tensors."""
        for container, saved in zip(self.filled, self.content, strict=True):
            if isinstance(container, dict):
                fakes = {k: saved.get(k) for k, v in container.items() if isinstance(v, FakeTensor)}
                container = {**container, **fakes}
            if container != saved:
                return False
        return True

    def is_trained(self) -> bool:
        """Whether a parameter takes gradients."""
        return any(map(_requires_grad, self.trainable))

    def __deepcopy__(self, memo: dict[int, Any]) -> Unchanged:
        made = Unchanged.__new__(Unchanged)
        memo[id(self)] = made
        made.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return made

    def __getstate__(self) -> dict[str, Any]:
        read_again = (
            "versioned", "versions", "placed", "addresses", "trainable", "classes",
            "class_attributes", "global_hooks",
        )  # fmt: skip
        state = {name: v for name, v in self.__dict__.items() if name not in read_again}
        return {**state, "types": self.types if self.holds() else []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._read_tensors()


def _own_mro(kind: type) -> list[type]:
    """The classes of modules, less nn.Module, whose attributes a symbolic trace changes."""
    if issubclass(kind, ScriptModule):  # its code is no attribute of the class
        return []
    return [each for each in kind.__mro__ if issubclass(each, nn.Module) and each is not nn.Module]


def _without_weights(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module without those that torch's hooks set at each call."""
    hooks = weight_hooks(module)
    computed = {getattr(each, key, None) for each in hooks for key in ("name", "_tensor_name")}
    return {name: value for name, value in module.__dict__.items() if name not in computed}


def _has_address(tensor: Tensor) -> bool:
    try:
        tensor.data_ptr()
    except RuntimeError:  # a tensor without a storage of its own
        return False
    return True


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    for kind in (module._parameters, module._buffers):
        yield from (tensor for tensor in kind.values() if tensor is not None)
    yield from (value for value in _without_weights(module).values() if isinstance(value, Tensor))


def _containers(module: nn.Module) -> Iterator[Any]:
    """The dicts of tensors, children and hooks of a module, and the containers it keeps."""
    for name, value in module.__dict__.items():
        if name not in EVERY_MODULE:
            yield from _nested(value, 0)
        elif isinstance(value, dict):
            yield value


def _nested(value: Any, depth: int) -> Iterator[Any]:
    if is_container(value) and depth < _DEPTH:
        yield value
        if not isinstance(value, set):
            for each in value.values() if isinstance(value, dict) else value:
                yield from _nested(each, depth + 1)
