"""Which operator a function, a method or a class of torch.nn is.

Given::

    register(elementwise("i0"))

Result: ``torch.i0(x)`` has the rank and the channels of x, and memory of its own. The passes move
it over chunks and concatenations like relu, and drop it where no node reads it.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fxrep.errors import OptionError
from fxrep.ops.assume import assume
from fxrep.ops.op import Memory, Op
from fxrep.ops.table import TABLE


@dataclass(frozen=True)
class Spelling:
    """An operator by one of its names."""

    op: Op
    in_place: bool = False


FUNCTIONS: dict[Any, Spelling] = {}
METHODS: dict[str, Spelling] = {}
CLASSES: dict[type[nn.Module], Op] = {}
OPS: dict[str, Op] = {}  # by the names of functions

_NAMESPACES = {"torch": torch, "F": F, "torch._C._nn": torch._C._nn, "torch.Tensor": torch.Tensor}
_ALL_NAMESPACES = {**_NAMESPACES, "operator": operator}

# Python's operators, by the name of the operator of torch that they call.
_OPERATORS = {
    "add": "add", "sub": "sub", "mul": "mul", "truediv": "div", "floordiv": "floor_divide",
    "mod": "remainder", "pow": "pow", "matmul": "matmul", "neg": "neg", "pos": "positive",
    "abs": "abs", "invert": "bitwise_not", "and_": "bitwise_and", "or_": "bitwise_or",
    "xor": "bitwise_xor", "lshift": "bitwise_left_shift", "rshift": "bitwise_right_shift",
    "eq": "eq", "ne": "ne", "lt": "lt", "le": "le", "gt": "gt", "ge": "ge",
    "getitem": "getitem", "setitem": "setitem", "delitem": "delitem",
}  # fmt: skip


def register(op: Op) -> None:
    """Add an operator to the table, in place of operators that had its names.

    Args:
        op: ``elementwise("i0")``, ``elementwise("torch.ops.mylib.swish")``, or any other `Op`.

    Raises:
        OptionError: one of its names is no function or method of torch and no class of torch.nn,
            or its parameters cannot be read.
    """
    try:
        op.signature  # noqa: B018
    except (IndexError, SyntaxError, ValueError) as error:
        raise OptionError(
            f"op.parameters={op.parameters!r} cannot be read ({error}): write them as in a def, "
            "such as 'input, alpha=1, ...'"
        ) from error
    unknown = [name for name in op.names.split() if not _enter_name(op, name)]
    if unknown:
        raise OptionError(
            f"op.names={op.names!r}: torch has no function, method or module {unknown[0]!r}; an "
            "operator of a library is 'torch.ops.library.name'"
        )
    _enter_operators()  # `-` is what `sub` is


def _enter_name(op: Op, name: str) -> int:
    """Enter an operator under a name; returns how many functions and classes have the name."""
    kind = getattr(nn, name, None) if name[0].isupper() else None
    if kind is None:
        return _enter_call(op, name)
    CLASSES[kind] = op
    return 1


def _enter_call(op: Op, name: str) -> int:
    namespace, _, last = name.rpartition(".")
    spelling, in_place = Spelling(op), Spelling(op, in_place=True)
    found = 0
    for where in (_namespace(namespace),) if namespace else _NAMESPACES.values():
        for spelt, meaning in ((last, spelling), (f"{last}_", in_place)):
            function = getattr(where, spelt, None)
            if callable(function) and not isinstance(function, type):
                found += 1
                packet = isinstance(function, torch._ops.OpOverloadPacket)
                overloads = [getattr(function, n) for n in function.overloads()] if packet else []
                for each in (function, *overloads):
                    if namespace or each not in _QUALIFIED:
                        FUNCTIONS[each] = meaning
                    if namespace:
                        _QUALIFIED.add(each)
    if not namespace or last not in OPS:
        OPS[last] = op
    if not namespace:
        for spelt, meaning in ((last, spelling), (f"{last}_", in_place)):
            if hasattr(torch.Tensor, spelt):
                METHODS[spelt] = meaning
    return found


def _namespace(name: str) -> Any:
    """The namespace of a name: ``F``, ``torch.special``, ``torch.ops.mylib``; None if unknown."""
    found = _ALL_NAMESPACES.get(name)
    if found is not None:
        return found
    for part in name.removeprefix("torch.").split("."):
        found = getattr(torch if found is None else found, part, None)
    return found


# Functions that an entry names with their namespace: entries without one leave them alone.
_QUALIFIED: set[Any] = set()


def _enter_operators() -> None:
    """Python's operators, their in-place forms, and the methods behind both."""
    for name, meaning in _OPERATORS.items():
        op, plain = OPS[meaning], name.rstrip("_")
        writes = op.memory is Memory.WRITES
        FUNCTIONS[getattr(operator, name)] = Spelling(op, in_place=writes)
        METHODS[f"__{plain}__"] = Spelling(op, in_place=writes)
        if hasattr(operator, f"i{plain}") and not writes:
            FUNCTIONS[getattr(operator, f"i{plain}")] = Spelling(op, in_place=True)
            METHODS[f"__i{plain}__"] = Spelling(op, in_place=True)
    for name in ("add", "mul"):  # these two commute: the reflected method is the same operator
        METHODS[f"__r{name}__"] = Spelling(OPS[name])


for _op in TABLE:
    for _name in _op.names.split():
        _enter_name(_op, _name)
FUNCTIONS[assume] = FUNCTIONS[torch._assert]

_enter_operators()
