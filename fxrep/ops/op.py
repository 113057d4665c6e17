"""The types of the table of operators (`fxrep.ops.table`)."""

from __future__ import annotations

import ast
import functools
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any


class Shape(Enum):
    """How the shape of the result follows from the operands; `fxrep.analysis` has the rules."""

    UNKNOWN = auto()
    KEEPS = auto()  # the shape of the first operand
    KEEPS_RANK = auto()  # its rank only; nothing where `dim` is None
    BROADCASTS = auto()  # the common shape of all operands
    LAYER = auto()  # convolution and linear: channels from the weight
    TRANSPOSED_LAYER = auto()
    POOL = auto()  # the axes before the spatial ones stay
    NORM = auto()  # keeps the shape, and raises unless its vectors fit the channels
    INSTANCE_NORM = auto()
    LAYER_NORM = auto()
    PAD = auto()
    RESIZE = auto()
    PIXEL_SHUFFLE = auto()
    PIXEL_UNSHUFFLE = auto()
    CAT = auto()
    STACK = auto()
    PARTS = auto()  # a tuple of tensors along an axis
    UNBIND = auto()
    ITEM = auto()
    TRANSPOSE = auto()
    PERMUTE = auto()
    FLATTEN = auto()
    UNFLATTEN = auto()
    SIZES = auto()  # one given size for each axis of the result
    LIKE = auto()  # the shape of the second operand
    UNSQUEEZE = auto()
    SELECT = auto()
    REDUCE = auto()
    MATMUL = auto()  # all axes but the last two broadcast
    ATTENTION = auto()  # all axes but the last two of query, key and value broadcast
    BATCHED_MATMUL = auto()  # all values have three axes
    EINSUM = auto()
    EMBEDDING = auto()


class Memory(Enum):
    """Whose memory the result is in, and whose memory an operator writes."""

    FRESH = auto()  # the result has memory of its own
    VIEW = auto()  # the result may be the first operand, or a view of it
    DROPOUT = auto()  # like VIEW; in eval mode it writes nothing, whatever `inplace` is
    UPDATES = auto()  # like FRESH; the operator may write statistics or tables among its operands
    WRITES = auto()  # the operator writes its first operand, which is the result
    UNKNOWN = auto()  # the result may share memory with every operand


class Result(Enum):
    """The type of an operator's result."""

    TENSOR = auto()
    SIZE = auto()  # an int or a torch.Size, taken from a shape
    NUMBER = auto()  # any other number of Python
    PARTS = auto()  # a tuple of tensors
    OTHER = auto()


class Dtype(Enum):
    """How the dtype of the result follows from the operands; `fxrep.analysis.dtypes` has the rules.

    Wherever a call names a dtype (``x.sum(dtype=torch.int64)``), the result has that dtype.
    """

    UNKNOWN = auto()
    KEEPS = auto()  # that of the first operand; integral where that is
    FLOATS = auto()  # that of the operands; floating point where they are integral
    WEIGHT = auto()  # that of the weight
    PROMOTES = auto()  # that of the operands; integral where they are
    INTEGRAL = auto()  # integers or truth values, whatever the operands are
    INDICES = auto()  # a tuple: values of the operand, and integers second


class Reads(Enum):
    """The properties of its operands that an operator reads."""

    VALUES = auto()
    SIZES = auto()
    KIND = auto()  # rank, dtype, device: the same for every value of a linear region
    LAYOUT = auto()  # strides


REQUIRED = object()


@dataclass(frozen=True)
class Parameter:
    """One parameter: its names, of which fxrep uses the first, and its default."""

    names: tuple[str, ...]
    default: Any = REQUIRED


@dataclass(frozen=True, eq=False)
class Op:
    """One operator.

    Attributes:
        names: its spellings. A name with a capital is a class of torch.nn. A name with a dot is
            that function only: ``F.unfold`` is no method, ``torch.ops.mylib.swish`` may be your
            own. Any other name stands for the function of torch, the function of
            torch.nn.functional and the method of that name, as far as they exist.
        parameters: as in a `def`. Other names of a parameter stand behind a bar (``dim|axis=0``).
            For a class of torch.nn they are attributes of the module. ``*size`` takes a sequence
            or its items; ``...`` at the end takes all other arguments.
        shape: how the shape of the result follows from the operands.
        memory: whose memory the result is in, and whose memory it writes.
        result: the type of the result.
        reads: the properties of its operands that it reads.
        dtype: how the dtype of the result follows from the operands. Views keep that of their
            operand.
        spatial: number of spatial axes.
        elementwise: the operator does the same to each element of its first operand.
    """

    names: str
    parameters: str = "input, ..."
    shape: Shape = Shape.UNKNOWN
    memory: Memory = Memory.FRESH
    result: Result = Result.TENSOR
    reads: Reads = Reads.VALUES
    dtype: Dtype = Dtype.UNKNOWN
    spatial: int = 0
    elementwise: bool = False

    @functools.cached_property
    def name(self) -> str:
        """The first of its names, without the namespace."""
        return self.names.split()[0].rpartition(".")[2]

    @functools.cached_property
    def signature(self) -> Signature:
        """Its parameters, parsed."""
        return Signature.of(self.parameters)


@dataclass(frozen=True, eq=False)
class Signature:
    """The parameters of an operator.

    Attributes:
        parameters: in order.
        variadic: the last parameter takes all positional arguments that are left.
        open: arguments without a parameter are allowed.
    """

    parameters: tuple[Parameter, ...]
    variadic: bool
    open: bool

    @staticmethod
    def of(text: str) -> Signature:
        """Parse ``input, dim|axis=0, *size, ...``; no default may contain a comma."""
        found, variadic, is_open = [], False, False
        for part in (part.strip() for part in text.split(",")):
            if part == "...":
                is_open = True
                continue
            name, _, default = part.partition("=")
            variadic = variadic or name.startswith("*")
            value = ast.literal_eval(default) if default else () if name[0] == "*" else REQUIRED
            found.append(Parameter(tuple(name.lstrip("*").split("|")), value))
        return Signature(tuple(found), variadic, is_open)

    @functools.cached_property
    def by_name(self) -> dict[str, str]:
        """The first name of a parameter, by each of its names."""
        return {name: p.names[0] for p in self.parameters for name in p.names}

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """The arguments of a call by name, with defaults; None if they do not fit.

        Arguments of other overloads do not fit, and neither do those that no entry has: `out=`.
        """
        parameters = self.parameters
        if self.variadic and len(args) >= len(parameters):
            rest = args[len(parameters) - 1 :]
            single = len(rest) == 1 and isinstance(rest[0], (tuple, list))
            args = (*args[: len(parameters) - 1], rest[0] if single else rest)
        if len(args) > len(parameters) and not self.open:
            return None
        found = {p.names[0]: value for p, value in zip(parameters, args, strict=False)}
        for key, value in kwargs.items():
            name = self.by_name.get(key)
            if (name is None and not self.open) or name in found:
                return None
            found[key if name is None else name] = value
        for p in parameters:
            if p.names[0] not in found:
                if p.default is REQUIRED:
                    return None
                found[p.names[0]] = p.default
        return found
