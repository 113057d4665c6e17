"""Removal of modules and tensors that no graph calls or reads any more.

Given: a model whose forward became a graph, with a BatchNormAct2d at ``bn`` of which only the
activation is still called, at ``bn.act``.

Result: a `Container` at ``bn`` that holds ``act`` and nothing else. It is no BatchNorm any more, is
not called, and prints its children.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fxrep.capture.islands import Program


class Container(nn.Module):
    """The rest of a module whose forward became part of a graph; it cannot be called.

    It prints under the name of the module's class. It has the module's plain attributes and, under
    their old names, the submodules and tensors that are still used: ``blocks[2]`` is the child
    named ``2``.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def _get_name(self) -> str:
        return self._name

    def extra_repr(self) -> str:
        """The shapes of its own tensors, by name."""
        own = {**self._parameters, **self._buffers}
        return ", ".join(f"{n}={tuple(t.shape)}" for n, t in own.items() if t is not None)

    def __getitem__(self, key: int | str | slice) -> Any:
        if isinstance(key, slice):
            return list(self._modules.values())[key]
        if str(key) in self._modules:
            return self._modules[str(key)]
        numbered = all(name.isdigit() for name in self._modules)
        if isinstance(key, str) or (numbered and key >= 0):
            names = ", ".join(self._modules)
            kind = KeyError if isinstance(key, str) else IndexError
            raise kind(f"{key} was merged into another layer; there are {names}")
        return list(self._modules.values())[key]

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[nn.Module | None]:
        return iter(self._modules.values())

    def __bool__(self) -> bool:
        return True


def prune(program: Program) -> None:
    """Remove the modules and tensors below a program's module that its graph does not use."""
    _Pruning(program).run()


@dataclass(eq=False)
class _Pruning:
    """The pruning of one program's module."""

    program: Program
    called: set[int] = field(default_factory=set)  # ids of modules
    read: dict[int, set[str]] = field(default_factory=dict)  # names of tensors, by their owner
    results: dict[int, nn.Module | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        submodule = self.program.calls.submodule
        for node in self.program.graph.nodes:
            if node.op == "call_module":
                self.called.add(id(submodule(str(node.target))))
            elif node.op == "get_attr":
                owner, _, name = str(node.target).rpartition(".")
                self.read.setdefault(id(submodule(owner)), set()).add(name)

    def run(self) -> None:
        root = self.program.module
        children = {
            name: self._pruned(child) if child is not None else None
            for name, child in root._modules.items()
        }
        own = root.__dict__  # a class may refuse to set attributes
        own["_modules"] = {
            name: child
            for name, child in children.items()
            if child is not None or root._modules[name] is None
        }
        for kind in ("_parameters", "_buffers"):
            own[kind] = {
                name: tensor
                for name, tensor in own[kind].items()
                if name in self.read.get(id(root), ())
            }

    def _pruned(self, module: nn.Module) -> nn.Module | None:
        """The module, a container of its rest, or None."""
        if id(module) in self.called:
            return module
        if id(module) not in self.results:
            self.results[id(module)] = self._container(module)
        return self.results[id(module)]

    def _container(self, module: nn.Module) -> nn.Module | None:
        if isinstance(module, torch.jit.ScriptModule):  # its attributes are not Python's
            used = any(id(m) in self.called or id(m) in self.read for m in module.modules())
            return module if used else None
        children = {}
        for name, child in module._modules.items():
            if child is not None:
                found = self._pruned(child)
                if found is not None:
                    children[name] = found
        read = self.read.get(id(module), set())
        if not children and not read:
            return None
        left = Container(type(module).__name__)
        own = left.__dict__.keys() | {"forward"}
        copies_itself = _copies_itself(type(module))
        for name, value in vars(module).items():
            if name not in own and (name in read or not _holds_modules(value)):
                if copies_itself and not _can_copy(value):
                    continue
                left.__dict__[name] = value
        for kind in ("_parameters", "_buffers"):
            tensors = vars(module)[kind]
            vars(left)[kind].update({name: t for name, t in tensors.items() if name in read})
        left._non_persistent_buffers_set = module._non_persistent_buffers_set & read
        left._modules.update(children)
        left.training = module.training
        return left


def _copies_itself(kind: type[nn.Module]) -> bool:
    """Whether a class says how it is copied, as one does that holds a lock or a handle."""
    names = ("__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__")
    return any(getattr(kind, name, None) is not getattr(nn.Module, name, None) for name in names)


def _can_copy(value: object) -> bool:
    try:
        copy.deepcopy(value)
    except Exception:
        return False
    return True


def _holds_modules(value: object, depth: int = 0) -> bool:
    """Whether a plain attribute is a module or tensor, or a collection that holds some."""
    if isinstance(value, nn.Module | torch.Tensor):
        return True
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple | set) and depth < 4:
        return any(_holds_modules(each, depth + 1) for each in value)
    return False
