"""The facts about one traced graph, and the readings of its nodes.

`View.read` gives the value of a node as ``sum_i map_i(operand_i) + bias`` (an `Affine`). It gives a
`Refusal` if the operation often is affine but is not in this case, and None for all others. The
readers of the operations are in `fxrep.reading.layers` and `fxrep.reading.structure`.
"""

from __future__ import annotations

import enum
import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxrep.algebra.maps import Diagonal, Linear
from fxrep.algebra.recipe import Call, Expr, Load, record
from fxrep.analysis.aliasing import Aliasing
from fxrep.analysis.channels import Channels
from fxrep.analysis.computed import _computed, computed_once, parts_of
from fxrep.analysis.dtypes import Dtypes
from fxrep.analysis.ranks import Ranks
from fxrep.ops.calls import Calls, ModuleTensor
from fxrep.ops.effects import writes_over
from fxrep.ops.op import Reads
from fxrep.refusal import Refusal

# How many roundings may lie between what a model computes in its dtype and the same in float64, for
# a value that a few operations give.
_ROUNDINGS = 8


@dataclass(frozen=True, eq=False)
class Term:
    """A summand: a map of the value of `operand`; weight None stands for ones."""

    operand: fx.Node
    map: Linear
    weight: Expr | None = None


class Operation(enum.Enum):
    """The kinds of operation that decisions tell apart; all others are `OTHER`."""

    OTHER = enum.auto()
    LAYER = enum.auto()  # a convolution or linear layer
    BATCHNORM = enum.auto()
    PRODUCT = enum.auto()  # with a constant, which may be zero
    IDENTITY = enum.auto()  # gives its operand, at most in another shape or memory
    CONCATENATION = enum.auto()
    PART = enum.auto()  # a slice or chunk: a view of some elements of its operand
    PADDING = enum.auto()
    POOLING = enum.auto()  # average pooling


@dataclass(frozen=True, eq=False)
class Affine:
    """A node's value as ``sum_i map_i(operand_i) + bias``.

    Attributes:
        kind: the name of the operation, for the report alone.
        terms: the summands.
        bias: (C,) or (), or None.
        assumes_batched: values that must have a batch dimension for the reading to be right; their
            rank is assumed, and is guarded if the reading is used.
        promotes: dtypes of constants that would promote the result.
        checks_channels: the operation raises unless its operand has the channels of its map.
        weight: the weight tensor of a convolution or linear layer.
        owner: the object that two layers have in common if they share the weight.
        absorbed: other nodes that are part of this one operation.
        pad_value: the value that a padding pads with, (C,) or (), if it is not zero.
        includes_writes: the reading includes writes into the value after it was computed.
        operation: the operation, as far as decisions depend on it.
    """

    kind: str
    terms: tuple[Term, ...]
    bias: Expr | None = None
    assumes_batched: tuple[fx.Node, ...] = ()
    promotes: tuple[torch.dtype, ...] = ()
    checks_channels: bool = True
    weight: Tensor | None = None
    owner: object = None
    absorbed: tuple[fx.Node, ...] = ()
    pad_value: Expr | None = None
    includes_writes: bool = False
    operation: Operation = Operation.OTHER

    @property
    def is_layer(self) -> bool:
        """Whether the operation is a convolution or linear layer."""
        return self.operation is Operation.LAYER

    @property
    def is_identity(self) -> bool:
        """Whether the operation changes no element; it may have absorbed operations that do."""
        return self.operation is Operation.IDENTITY

    @property
    def is_diagonal(self) -> bool:
        """Whether the reading scales and shifts the channels of one value, and no more."""
        return len(self.terms) == 1 and isinstance(self.terms[0].map, Diagonal)

    @property
    def is_map(self) -> bool:
        """Whether the reading is more than a scale and shift of one value."""
        return not self.is_diagonal


@dataclass(frozen=True)
class Unread(Refusal):
    """Why an operation that often is affine is not in this case.

    Attributes:
        operation: its kind.
    """

    operation: Operation = Operation.OTHER


Reading = Affine | Refusal | None
Reader = Callable[..., Reading]  # given the view, the node, and the arguments by name


@dataclass(frozen=True, eq=False)
class Constant:
    """A number or a tensor of the model, and the expression that recomputes it."""

    value: Tensor | float
    expr: Expr
    owner: object = None  # the tensor, or the module that computes it: equal for layers sharing it

    @property
    def shape(self) -> torch.Size:
        """Its shape; a number has none."""
        return self.value.shape if isinstance(self.value, Tensor) else torch.Size()


@dataclass(eq=False)
class View:
    """One traced graph and the facts about it.

    Attributes:
        graph: as traced, then rewritten.
        calls: the operators that the nodes call.
        reader: reads a node (`fxrep.reading.reader.read`).
        aliasing: memory that values share, and writes to it.
        ranks: the ranks of the values.
        channels: the sizes of the values.
        dtypes: the dtypes of the values.
        derived: the expressions of the weights of layers that fxrep made, by path.
        computed: the expressions of constants that were computed once, in the dtypes in which the
            model computes them, by path: of stored constants, and of weights that torch computes
            from others.
        originals: the tensors that expressions load, by path: the user's, and those constants.
        readings: the readings so far.
        absorbed_by: the nodes whose readings include a node.
        constants: whether a node depends on the model's tensors alone, as far as asked.
        trained: ids of stored constants that were computed from trained parameters.
        content_read: paths of the tensors whose content a decision depends on.
    """

    graph: fx.Graph
    calls: Calls
    reader: Callable[[View, fx.Node], Reading]
    aliasing: Aliasing
    ranks: Ranks
    channels: Channels
    dtypes: Dtypes
    derived: dict[str, Expr] = field(default_factory=dict)
    computed: dict[str, Call] = field(default_factory=dict)
    originals: dict[str, Tensor] = field(default_factory=dict)
    readings: dict[fx.Node, Reading] = field(default_factory=dict)
    absorbed_by: dict[fx.Node, set[fx.Node]] = field(default_factory=dict)
    constants: dict[fx.Node, bool] = field(default_factory=dict)
    trained: set[int] = field(default_factory=set)
    content_read: set[str] = field(default_factory=set)

    def read(self, node: fx.Node) -> Reading:
        """The reading of `node`."""
        if node not in self.readings:
            reading = self.readings[node] = self._read(node)
            for part in reading.absorbed if isinstance(reading, Affine) else ():
                self.absorbed_by.setdefault(part, set()).add(node)
        return self.readings[node]

    def affine(self, node: fx.Node) -> Affine | None:
        """The reading of `node` if it is affine in its operands."""
        reading = self.read(node)
        return reading if isinstance(reading, Affine) else None

    # The editor calls the next three: a view follows every change of its graph.

    def invalidate(self, *nodes: fx.Node) -> None:
        """Read these nodes anew, and the nodes whose readings include them."""
        for node in nodes:
            for each in (node, *self.absorbed_by.pop(node, ())):
                self.readings.pop(each, None)
        # Whether a value is constant is inherited by its readers.
        doubtful = [node for node in nodes if node in self.constants]
        for node in doubtful:  # grows while it is read
            if self.constants.pop(node, None) is not None:
                doubtful.extend(node.users)

    def replacing(self, new: fx.Node, old: fx.Node) -> None:
        """Note that `new` is equal to `old` and takes its place, with all that is known of it."""
        self.aliasing.replacing(new, old)
        self.ranks.replacing(new, old)
        self.channels.replacing(new, old)
        self.dtypes.replacing(new, old)

    def installed(self, path: str) -> None:
        """Look up the module at `path` anew; its tensors no longer are those that fxrep made."""
        self.calls.invalidate(path)
        for name in ("weight", "bias"):
            self.derived.pop(f"{path}.{name}", None)

    def _read(self, node: fx.Node) -> Reading:
        reading = self.reader(self, node)
        if isinstance(reading, Affine) and not self.aliasing.replaceable(node):
            return Refusal("it writes in place a value that others still read")
        return reading

    @property
    def module(self) -> nn.Module:
        """The traced module, which the targets of the graph refer to."""
        return self.calls.module

    def submodule(self, path: str) -> nn.Module:
        """The module at a path below the traced one."""
        return self.calls.submodule(path)

    def tensor(self, path: str) -> Tensor:
        """The tensor at a path below the traced module."""
        value = self.calls.tensor(path)
        assert isinstance(value, Tensor)
        return value

    def constant(self, arg: Any) -> Constant | None:
        """`arg` as a constant: a number, or a tensor of the model that is never written."""
        if isinstance(arg, ModuleTensor):
            found = None if self._written(arg) else self.attribute(arg.module, arg.path, arg.name)
            return None if isinstance(found, Refusal) else found
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

    def variable(self, *arguments: Any) -> str | None:
        """Why tensors among the arguments of a layer are no constants; None if all are."""
        for arg in arguments:
            found = None
            if isinstance(arg, ModuleTensor):
                found = self.attribute(arg.module, arg.path, arg.name)
            reason = found.reason if isinstance(found, Refusal) else self._written(arg)
            if reason is not None:
                return reason
        return None

    def _written(self, arg: Any) -> str | None:
        """Why a tensor of the model is no constant: other code may write it."""
        paths: list[str] = []
        if isinstance(arg, ModuleTensor):
            paths = [f"{arg.path}.{name}" for name in parts_of(arg.module, arg.name)]
        elif isinstance(arg, fx.Node) and arg.op == "get_attr":
            paths = [str(arg.target)]
        for path in paths:
            tensor = self.calls.tensor(path)
            writer = self.aliasing.writer(tensor) if isinstance(tensor, Tensor) else None
            if writer is not None:
                return f"it reads '{path}', which {writer} may write"
        return None

    def stored(self, path: str) -> Constant:
        """The tensor at a path as a constant.

        A weight that fxrep made is expressed by the tensors that it was made from: a weight is
        rounded once, however many rewrites follow each other.
        """
        tensor = self.tensor(path)
        if path in self.derived:
            return Constant(tensor, self.derived[path], tensor)
        self.originals.setdefault(path, tensor)
        return Constant(tensor, Load(path), tensor)

    def attribute(self, module: nn.Module, path: str, name: str) -> Constant | Refusal | None:
        """A tensor of a called module as a constant, even if torch computes it.

        Parametrizations and torch's own hooks, such as weight_norm, compute it from other tensors:
        once, in the dtype of the model.
        """
        if name in module._parameters or name in module._buffers:
            held = module._parameters.get(name, module._buffers.get(name)) is not None
            return self.stored(f"{path}.{name}") if held else None
        where = f"{path}.{name}"
        if where not in self.computed:
            parts = parts_of(module, name)
            loads = [self.stored(f"{path}.{part}").expr for part in parts]
            value = computed_once(module, name, parts)
            if isinstance(value, Refusal):
                return value
            self.computed[where] = Call(_computed, (module, name, tuple(parts), *loads))
            self.originals[where] = value
        return Constant(self.originals[where], Load(where), module)

    def value(self, expr: Expr) -> Tensor:
        """The value of an expression in float64, for a decision that depends on it."""
        self.depends_on_content(expr)
        value: Tensor = record(expr).run(lambda path: double(self.originals[path]))
        return value

    def unrounded(self, expr: Expr) -> Tensor:
        """The value of an expression in real arithmetic, as far as float64 can tell.

        A constant that the model computes is computed again, in float64, from the user's tensors.
        If the result is further from the constant than rounding explains (a floor takes another
        step), the constant counts.
        """
        self.depends_on_content(expr)
        value: Tensor = record(expr).run(self._unrounded)
        return value

    def _unrounded(self, path: str) -> Tensor:
        native = double(self.originals[path])
        made = self.computed.get(path)
        if made is None or made.function is _computed or not native.is_floating_point():
            return native
        try:
            value = record(made).run(self._unrounded)
        except (RuntimeError, TypeError):  # it demands the dtype of the model
            return native
        eps = torch.finfo(self.originals[path].dtype).eps
        near = torch.linalg.vector_norm(value - native, math.inf) <= _ROUNDINGS * eps * (
            torch.linalg.vector_norm(native, math.inf)
        )
        return value if near else native

    def depends_on_content(self, expr: Expr) -> None:
        """Note that a decision depends on the content of the tensors that an expression loads."""
        self.content_read.update(self.sources(expr))

    def sources(self, expr: Expr) -> set[str]:
        """The paths of the user's tensors that an expression was made from."""
        found: set[str] = set()
        ahead = [expr]
        for each in ahead:  # grows while it is read
            for path in record(each).paths:
                if path in self.computed:
                    ahead.append(self.computed[path])
                else:
                    found.add(path)
        return found

    def reads_metadata(self, node: fx.Node) -> bool:
        """Whether a node reads only the shape, dtype or device of its operand."""
        return self.calls.reads(node) in (Reads.SIZES, Reads.KIND)

    def reads_size(self, node: fx.Node) -> bool:
        """Whether a node reads only the sizes of its operand."""
        return self.calls.reads(node) is Reads.SIZES

    def writes(self, node: fx.Node) -> bool:
        """Whether an operation writes its result over its first operand, and so keeps its dtype."""
        return writes_over(self.calls, node)

    def rank(self, node: fx.Node) -> tuple[int | None, bool]:
        """The rank of a value, None if unknown, and whether it is an assumption to be guarded."""
        proven = self.ranks.rank(node)
        if proven is not None:
            return proven, False
        return self.ranks.assumed(node), True


def double(tensor: Tensor) -> Tensor:
    """A tensor of the model in float64; integers as they are."""
    return tensor.detach().double() if tensor.is_floating_point() else tensor.detach()


def scope(node: fx.Node) -> str:
    """The path of the module whose forward called the node; '' for the traced module itself."""
    stack = node.meta.get("nn_module_stack")
    return str(next(reversed(stack.values()))[0]) if stack else ""


def number(value: float) -> Tensor:
    """A number as a tensor (); recipes call this, so users' pickles have its name."""
    return torch.tensor(value, dtype=torch.float64)
