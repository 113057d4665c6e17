"""The operator that a node of a graph calls, and its arguments by name.

Given::

    F.avg_pool2d(x, 2)      nn.AvgPool2d(2)(x)      torch._C._nn.avg_pool2d(x, kernel_size=2)

Result: of all three the operator ``avg_pool2d`` on x, ``kernel_size`` 2, ``ceil_mode`` False.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from fxrep.ops.op import Op, Reads
from fxrep.ops.owner import known_class
from fxrep.ops.spellings import CLASSES, FUNCTIONS, METHODS
from fxrep.ops.table import ATTRIBUTES


@dataclass(frozen=True)
class ModuleTensor:
    """An argument that is an attribute of the called module: a tensor it holds or computes.

    Attributes:
        module: the module.
        path: its path below the traced module.
        name: of the attribute.
    """

    module: nn.Module
    path: str
    name: str


@dataclass(frozen=True, eq=False)
class Called:
    """A call of an operator.

    Attributes:
        op: the operator.
        node: the call.
        module: the module of torch.nn that it calls; None for functions and methods.
        in_place: the call writes its first operand.
    """

    op: Op
    node: fx.Node
    module: nn.Module | None = None
    in_place: bool = False

    @functools.cached_property
    def arguments(self) -> Mapping[str, Any] | None:
        """All arguments by name, those of a module from its attributes; None if they do not fit.

        Tensors of a module stand as `ModuleTensor`.
        """
        args, kwargs = self.node.args, self.node.kwargs
        if self.module is None:
            return self.op.signature.bind(args, kwargs)
        if len(args) + len(kwargs) != 1:
            return None
        first, *others = self.op.signature.parameters
        found = {p.names[0]: self._attribute(p.names, p.default) for p in others}
        return {first.names[0]: args[0] if args else next(iter(kwargs.values())), **found}

    def _attribute(self, names: tuple[str, ...], default: Any) -> Any:
        module = self.module
        assert module is not None
        for name in names:
            tensor = ModuleTensor(module, str(self.node.target), name)
            for tensors in (module._parameters, module._buffers):
                if name in tensors:
                    # Not by index: that records a read, while a forward is traced.
                    known = dict(tensors.items())
                    return None if known[name] is None else tensor
            if parametrize.is_parametrized(module, name):
                return tensor  # without running the code of the parametrization
            if hasattr(module, name):
                value = getattr(module, name)
                return tensor if isinstance(value, Tensor) else value
        return default

    def __getitem__(self, name: str) -> Any:
        """An argument by the name that the operator's entry in the table has for it.

        Raises:
            KeyError: the entry has no such parameter, or the arguments do not fit.
        """
        if self.arguments is None or name not in self.arguments:
            raise KeyError(f"{name!r} is no argument of {self.op.name} ({self.op.parameters})")
        return self.arguments[name]

    def get(self, name: str) -> Any:
        """An argument by name; None where there is none, or the arguments do not fit."""
        return None if self.arguments is None else self.arguments.get(name)

    @property
    def first(self) -> Any:
        """The first argument, even if the others do not fit."""
        if self.node.args:
            return self.node.args[0]
        kwargs = self.node.kwargs
        if self.module is not None:
            return next(iter(kwargs.values()), None)
        return next((kwargs[n] for n in ("input", "self", "tensors") if n in kwargs), None)

    @property
    def source(self) -> fx.Node | None:
        """The first argument, if it is a value of the graph."""
        return self.first if isinstance(self.first, fx.Node) else None


class _Known:
    """The call that a node is with these arguments, and what `fxrep.ops.effects` says of it."""

    __slots__ = ("args", "called", "effect", "kwargs")

    def __init__(self, args: Any, kwargs: Any, called: Called | None) -> None:
        self.args = args
        self.kwargs = kwargs
        self.called = called
        self.effect: Any = None


class Calls:
    """The calls of one graph, remembered by node; the graph may be rewritten meanwhile.

    Args:
        module: the module that the targets of the graph refer to.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._modules: dict[str, nn.Module] = {}
        self._known: dict[fx.Node, _Known] = {}

    def of(self, node: fx.Node) -> Called | None:
        """The call that a node makes, if the table has its operator."""
        return self.known(node).called

    def known(self, node: fx.Node) -> _Known:
        """The call that a node makes with its arguments, and its effect on memory."""
        found = self._known.get(node)
        if found is None or found.args is not node.args or found.kwargs is not node.kwargs:
            found = self._known[node] = _Known(node.args, node.kwargs, self._read(node))
        return found

    def _read(self, node: fx.Node) -> Called | None:
        if node.op == "call_module":
            try:
                module = self.submodule(str(node.target))
            except AttributeError:
                return None
            kind = known_class(node, module, CLASSES)
            return None if kind is None else Called(CLASSES[kind], node, module)
        if node.op == "call_function" and node.target is getattr:
            attribute = ATTRIBUTES.get(str(node.args[1])) if len(node.args) == 2 else None
            return None if attribute is None else Called(attribute, node)
        if node.op == "call_function":
            spelling = FUNCTIONS.get(node.target)
        else:
            spelling = METHODS.get(str(node.target)) if node.op == "call_method" else None
        return None if spelling is None else Called(spelling.op, node, in_place=spelling.in_place)

    def submodule(self, path: str) -> nn.Module:
        """The module at a path, '' for the module itself; AttributeError if there is none."""
        found = self._modules.get(path) if path else self.module
        if found is None:
            owner, _, name = path.rpartition(".")
            found = self._modules[path] = self.submodule(owner).get_submodule(name)
        return found

    def invalidate(self, path: str) -> None:
        """Look up the module at a path anew: another was registered there."""
        self._modules.pop(path, None)

    def tensor(self, path: str) -> Any:
        """The attribute at a path that a `get_attr` node reads; None if there is none."""
        owner, _, name = path.rpartition(".")
        try:
            return getattr(self.submodule(owner), name, None)
        except AttributeError:
            return None

    def reads(self, node: fx.Node) -> Reads:
        """The properties of its operands that a node reads; values if the operator is unknown."""
        called = self.of(node)
        return Reads.VALUES if called is None else called.op.reads


def is_function_of(node: fx.Node, *namespaces: str) -> bool:
    """Whether a node calls a function that one of these Python modules defines."""
    namespace = getattr(node.target, "__module__", None)
    return node.op == "call_function" and namespace in namespaces


def is_torch(target: Any) -> bool:
    """Whether a function is torch's own, and no operator that a library registered with torch."""
    namespace = getattr(target, "__module__", None) or "torch"  # builtins of torch have none
    registered = namespace.startswith(("torch._ops", "torch.ops"))
    return namespace.partition(".")[0] == "torch" and not registered


def target_name(target: Any) -> str:
    """The name of a method (a str) or function; empty if it has none."""
    return target if isinstance(target, str) else getattr(target, "__name__", "")


def is_item(node: fx.Node) -> bool:
    """Whether a node takes an item of a value."""
    return node.op == "call_function" and node.target is operator.getitem


def schemas(name: str) -> tuple[Any, ...]:
    """Torch's own declarations of an operator that takes a tensor first."""
    return _schemas(name[:-1] if name.endswith("_") and not name.endswith("__") else name)


@functools.cache
def _schemas(name: str) -> tuple[Any, ...]:
    found = torch._C._jit_get_schemas_for_operator(f"aten::{name}")
    first = [s for s in found if s.arguments]
    return tuple(s for s in first if declared_kind(s.arguments[0].type) == "TensorType")


def declared_kind(declared: Any) -> str:
    """The name of a type in torch's schemas, such as "TensorType"; of a list, that of its items."""
    return str((declared.getElementType() if declared.kind() == "ListType" else declared).kind())
