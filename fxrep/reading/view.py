"""What is known of one traced graph, and the answers a node can give.

`View.read` says of a node that it is ``sum_i map_i(operand_i) + bias`` (an `Affine`), why it is
not although it looks like it (a `Refusal`), or nothing. Who reads which spelling is in
`fxrep.reading.layers` and `fxrep.reading.structure`.
"""

from __future__ import annotations

import functools
import inspect
import numbers
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxrep.algebra.maps import Linear
from fxrep.algebra.recipe import Call, Expr, Load, record
from fxrep.analysis.aliasing import Aliasing
from fxrep.analysis.channels import Channels
from fxrep.analysis.ranks import Ranks
from fxrep.ops.owner import weight_hooks
from fxrep.refusal import Refusal


@dataclass(frozen=True, eq=False)
class Term:
    """One summand: a map of the value of `operand`; weight None stands for ones."""

    operand: fx.Node
    map: Linear
    weight: Expr | None = None


@dataclass(frozen=True, eq=False)
class Affine:
    """A node's value as ``sum_i map_i(operand_i) + bias``.

    Attributes:
        kind: the operation in the field's words, as the report shows it.
        relies: values whose batched rank is assumed and must be guarded if this is used.
        promotes: dtypes of constants that would promote the result.
        proves: it raises unless its operand has the channels of its map.
        weight: the weight tensor of a convolution or linear layer.
        owner: what shares the weight if two layers do.
        inside: other nodes that are part of this one operation.
        outside: the value it pads with, (C,) or (), if it is not zero.
        settled: what is written into it after it was computed is part of the reading.
    """

    kind: str
    terms: tuple[Term, ...]
    bias: Expr | None = None
    relies: tuple[fx.Node, ...] = ()
    promotes: tuple[torch.dtype, ...] = ()
    proves: bool = True
    weight: Tensor | None = None
    owner: object = None
    inside: tuple[fx.Node, ...] = ()
    outside: Expr | None = None
    settled: bool = False

    @property
    def is_layer(self) -> bool:
        """A convolution or linear layer."""
        return self.weight is not None


Reading = Affine | Refusal | None
ModuleReader = Callable[["View", fx.Node, nn.Module, Any, Any], Reading]


@dataclass(frozen=True, eq=False)
class Constant:
    """A number or a tensor of the model, and the expression that recomputes it."""

    value: Tensor | float
    expr: Expr
    owner: object = None  # what is shared if it is: the tensor, or the module that computes it

    @property
    def shape(self) -> torch.Size:
        """Its shape; a number has none."""
        return self.value.shape if isinstance(self.value, Tensor) else torch.Size()


@dataclass(eq=False)
class View:
    """One traced graph and what is known of it."""

    graph: fx.Graph
    module: nn.Module
    reader: Callable[[View, fx.Node], Reading]
    aliasing: Aliasing
    ranks: Ranks
    channels: Channels
    derived: dict[str, Expr] = field(default_factory=dict)
    originals: dict[str, Tensor] = field(default_factory=dict)
    readings: dict[fx.Node, Reading] = field(default_factory=dict)
    parts: dict[fx.Node, set[fx.Node]] = field(default_factory=dict)  # in whose readings they are
    constants: dict[fx.Node, bool] = field(default_factory=dict)
    submodules: dict[str, nn.Module] = field(default_factory=dict)
    trained: set[int] = field(default_factory=set)  # ids of constants made from trained parameters
    looked: set[str] = field(default_factory=set)  # tensors whose content decided something

    def read(self, node: fx.Node) -> Reading:
        """What `node` computes, if it is linear in its operands."""
        if node not in self.readings:
            reading = self.readings[node] = self._read(node)
            for part in reading.inside if isinstance(reading, Affine) else ():
                self.parts.setdefault(part, set()).add(node)
        return self.readings[node]

    # The editor calls the next three: a view follows every change of its graph.

    def invalidate(self, *nodes: fx.Node) -> None:
        """Read these nodes anew, and those that have one of them inside their reading."""
        for node in nodes:
            for each in (node, *self.parts.pop(node, ())):
                self.readings.pop(each, None)
        # Whether a value is constant is inherited by its readers.
        doubtful = [node for node in nodes if node in self.constants]
        for node in doubtful:  # grows while it is read
            if self.constants.pop(node, None) is not None:
                doubtful.extend(node.users)

    def same(self, new: fx.Node, old: fx.Node) -> None:
        """Let `new`, an equal value, have the facts of `old`, which it takes the place of."""
        self.aliasing.same(new, old)
        self.ranks.same(new, old)
        self.channels.same(new, old)

    def installed(self, path: str) -> None:
        """Look up the module at `path` anew, and take its tensors for what they are."""
        self.submodules.pop(path, None)
        for name in ("weight", "bias"):
            self.derived.pop(f"{path}.{name}", None)

    def _read(self, node: fx.Node) -> Reading:
        reading = self.reader(self, node)
        if isinstance(reading, Affine) and not self.aliasing.pure(node):
            return Refusal("it writes in place a value that others still read")
        return reading

    def submodule(self, path: str) -> nn.Module:
        """The module at a path below the traced one."""
        if path not in self.submodules:
            self.submodules[path] = self.module.get_submodule(path)
        return self.submodules[path]

    def tensor(self, path: str) -> Tensor:
        """The tensor at a path below the traced module."""
        owner, _, name = path.rpartition(".")
        value = getattr(self.submodule(owner), name)
        assert isinstance(value, Tensor)
        return value

    def constant(self, arg: Any) -> Constant | None:
        """`arg` as a constant: a number, or a parameter, buffer or attribute never written."""
        if isinstance(arg, numbers.Real) and not isinstance(arg, bool):
            try:
                return Constant(float(arg), Call(number, (float(arg),)))
            except OverflowError:  # an int that no float holds
                return None
        if isinstance(arg, fx.Node) and arg.op == "get_attr":
            path = str(arg.target)
            if self.aliasing.writes_attribute(arg):
                return None
            try:
                return self.stored(path)
            except (AttributeError, AssertionError):
                return None
        return None

    def stored(self, path: str) -> Constant:
        """The tensor at a path as a constant.

        What fxrep made itself is expressed by the tensors it was made from, so that however many
        rewrites follow each other the weight is rounded once.
        """
        tensor = self.tensor(path)
        if path in self.derived:
            return Constant(tensor, self.derived[path], tensor)
        self.originals.setdefault(path, tensor)
        return Constant(tensor, Load(path), tensor)

    def attribute(self, module: nn.Module, path: str, name: str) -> Constant | None:
        """A tensor of a leaf module, which torch's own hooks or parametrizations may compute."""
        if getattr(module, name) is None:
            return None
        if name in module._parameters or name in module._buffers:
            return self.stored(f"{path}.{name}")
        parts = [n for n, _ in (*module.named_parameters(), *module.named_buffers())]
        loads = [self.stored(f"{path}.{part}").expr for part in parts]
        expr = Call(_computed, (module, name, tuple(parts), *loads))
        return Constant(_Computed(module, name)().detach(), expr, module)

    def value(self, expr: Expr) -> Tensor:
        """The value of an expression, in float64, to decide by."""
        self.look(expr)
        value: Tensor = record(expr).run(lambda path: double(self.originals[path]))
        return value

    def look(self, expr: Expr) -> None:
        """Note that a decision rests on the content of what an expression reads."""
        self.looked.update(record(expr).paths)

    def reads(self, node: fx.Node) -> list[Tensor]:
        """The tensors of the model that this very node reads."""
        if node.op == "call_module":
            module = self.submodule(str(node.target))
            return [*module.parameters(), *module.buffers()]
        found = []
        for source in node.all_input_nodes:
            if source.op == "get_attr":
                constant = self.constant(source)
                if constant is not None and isinstance(constant.value, Tensor):
                    found.append(constant.value)
        return found

    def rank(self, node: fx.Node) -> tuple[int | None, bool]:
        """The rank of a value, and whether that is an assumption to be guarded."""
        proven = self.ranks.rank(node)
        if proven is not None:
            return proven, False
        return self.ranks.assumed(node), True


class _Computed(nn.Module):
    """Gives a tensor that a module computes from its parameters at each call."""

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
    """The same from other parameters; the module is left as it was."""
    given = {f"module.{part}": tensor for part, tensor in zip(parts, tensors, strict=True)}
    computed = _Computed(module, name)
    value = torch.func.functional_call(computed, given, ())
    computed()
    assert isinstance(value, Tensor)
    return value


def double(tensor: Tensor) -> Tensor:
    """A tensor of the model in the precision to compute in."""
    return tensor.detach().double() if tensor.is_floating_point() else tensor.detach()


METADATA = frozenset({"shape", "ndim", "dtype", "device", "is_cuda", "requires_grad"})
METADATA_METHODS = frozenset({"size", "dim", "ndimension", "is_floating_point"})


def reads_metadata(node: fx.Node) -> bool:
    """Whether a node reads only the shape, dtype or device of its operand."""
    if node.op == "call_function":
        return node.target is getattr and node.args[1] in METADATA
    return node.op == "call_method" and node.target in METADATA_METHODS


def sizeless(reader: fx.Node) -> bool:
    """A metadata read that gives the same answer for every value of the region."""
    name = reader.args[1] if reader.op == "call_function" else reader.target
    return name not in ("shape", "size")


_IN_PLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv}


def writes(node: fx.Node) -> bool:
    """Whether an operation writes its result over its first operand, and so keeps its dtype."""
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    return node.target in _IN_PLACE


def scope(node: fx.Node) -> str:
    """The path of the module whose forward made the node; '' for the traced module itself."""
    stack = node.meta.get("nn_module_stack")
    return str(next(reversed(stack.values()))[0]) if stack else ""


def number(value: float) -> Tensor:
    """A number as a tensor to compute with."""
    return torch.tensor(value, dtype=torch.float64)


@dataclass(frozen=True)
class Spelling:
    """A reader and the parameters of a function, as they stand in a `def`."""

    read: Callable[..., Reading]
    parameters: str


@functools.cache
def _signature(parameters: str) -> inspect.Signature:
    namespace: dict[str, Any] = {}
    exec(f"def f({parameters}): ...", {}, namespace)
    return inspect.signature(namespace["f"])


def arguments(parameters: str, node: fx.Node) -> dict[str, Any] | None:
    """A call's arguments by name, defaults filled in; None for forms that are not read.

    Those are `out=`, `dtype=` and positional forms of other overloads.
    """
    try:
        bound = _signature(parameters).bind(*node.args, **node.kwargs)
    except TypeError:
        return None
    bound.apply_defaults()
    return bound.arguments
