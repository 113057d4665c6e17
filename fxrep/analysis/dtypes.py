"""The dtype of each value, where it is certain, without running the model.

Given::

    x > 0 -> * 2.0 -> conv ;  x.half() -> * scale (1, C, 1, 1) in float32 -> conv

Result: the comparison is of dtype bool and ``x.half()`` of float16: the products have another dtype
than their operands, and a convolution that took the product into its weight would raise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fxrep.ops.calls import Called, Calls, ModuleTensor, is_function_of, is_item, is_torch
from fxrep.ops.op import Dtype, Memory
from fxrep.ops.values import is_size

# Methods that have the dtype of the result in their names.
_NAMED = {
    "float": torch.float32, "double": torch.float64, "half": torch.float16,
    "bfloat16": torch.bfloat16, "int": torch.int32, "long": torch.int64, "short": torch.int16,
    "char": torch.int8, "byte": torch.uint8, "bool": torch.bool,
}  # fmt: skip

# Conversions: their arguments alone say whether they convert.
_CONVERSIONS = ("to", "type", "type_as")


class Dtypes:
    """The dtypes of the values of one graph.

    Where the exact dtype is not known but certainly is no floating point, it counts as int64.

    Args:
        graph: as traced.
        calls: the calls of the graph.
        known: certain dtypes, and those seen when the model ran on an example.
    """

    def __init__(
        self, graph: fx.Graph, calls: Calls, known: Mapping[fx.Node, torch.dtype] | None = None
    ) -> None:
        self._calls = calls
        self._found: dict[fx.Node, torch.dtype | None] = dict(known or {})
        self._foreign: set[fx.Node] = set()
        for node in graph.nodes:  # operands first
            self.of(node)

    def of(self, node: fx.Node) -> torch.dtype | None:
        """The dtype of a value; None if it is not certain."""
        if node not in self._found:
            self._found[node] = self._of(node)
            if self._found[node] is None and self._may_be_foreign(node):
                self._foreign.add(node)
        return self._found[node]

    def is_foreign(self, node: fx.Node) -> bool:
        """Whether the dtype is not known because code that is not torch's chose it."""
        return self.of(node) is None and node in self._foreign

    def _may_be_foreign(self, node: fx.Node) -> bool:
        if self._calls.of(node) is None and node.op in ("call_module", "call_function"):
            module = node.op == "call_module"
            if module or not (is_torch(node.target) or is_function_of(node, "_operator", "math")):
                return True
        return any(self.is_foreign(source) for source in node.all_input_nodes)

    def is_integral(self, node: fx.Node) -> bool:
        """Whether a value certainly is of integers or truth values."""
        dtype = self.of(node)
        return dtype is not None and _is_integral(dtype)

    @property
    def floating(self) -> set[torch.dtype]:
        """The floating-point dtypes that certainly occur in the graph."""
        found = {dtype for dtype in self._found.values() if dtype is not None}
        return {dtype for dtype in found if dtype.is_floating_point}

    def replacing(self, new: fx.Node, old: fx.Node) -> None:
        """Note that `new` has the dtype of `old`."""
        if old in self._found:
            self._found[new] = self._found[old]

    def _of(self, node: fx.Node) -> torch.dtype | None:
        if node.op == "get_attr":
            value = self._calls.tensor(str(node.target))
            return value.dtype if isinstance(value, Tensor) else None
        called = self._calls.of(node)
        item = self._of_item(node)
        if item is not None:
            return item
        if called is None or node.kwargs.get("out") is not None:
            return None
        if called.in_place:
            return None if called.source is None else self.of(called.source)
        if called.op.name in _NAMED:
            return _NAMED[called.op.name]
        if called.module is None:
            named = [each for each in _leaves(node) if isinstance(each, torch.dtype)]
            if named:
                return named[0] if len(named) == 1 else None
            if called.op.name in _CONVERSIONS:
                return self._of_conversion(node)
            read = [each for each in _leaves(node) if self._reads_dtype(each)]
            if read:
                return self.of(read[0].args[0])
        return _RULES[_rule(called)](self, called)

    def _of_item(self, node: fx.Node) -> torch.dtype | None:
        """The dtype of one of several results: ``x.topk(3)[1]``, ``x.topk(3).indices``."""
        if not (is_item(node) or node.target is getattr):
            return None
        source, key = node.args
        called = self._calls.of(source) if isinstance(source, fx.Node) else None
        if called is None or called.op.dtype is not Dtype.INDICES:
            return None
        return torch.int64 if key in (1, "indices") else self._of_first(called)

    def _of_conversion(self, node: fx.Node) -> torch.dtype | None:
        """``x.to(y)``, ``x.to(y.dtype)``, ``x.to("cuda")``."""
        source, *others = node.args
        others += node.kwargs.values()
        for other in others:
            if isinstance(other, fx.Node) and self._reads_dtype(other):
                return self.of(other.args[0])  # type: ignore[arg-type]
            if isinstance(other, fx.Node) and other.target is not getattr:
                return self.of(other)
        by_device = bool(others) and all(
            isinstance(each, str | int) or _is_place(each) for each in others
        )
        plain = node.target == "to" and by_device and isinstance(source, fx.Node)
        return self.of(source) if plain else None  # type: ignore[arg-type]

    def _reads_dtype(self, value: Any) -> bool:
        return isinstance(value, fx.Node) and (
            value.target is getattr and value.args[1:] == ("dtype",)
        )

    # --- rules ------------------------------------------------------------------------------------

    def _of_first(self, called: Called) -> torch.dtype | None:
        dtype = None if called.source is None else self.of(called.source)
        return None if dtype is None or dtype.is_complex else dtype  # abs, real: a real number

    def _floating(self, called: Called) -> torch.dtype | None:
        dtype = self._promoted(called)
        return dtype if dtype is not None and dtype.is_floating_point else None

    def _of_weight(self, called: Called) -> torch.dtype | None:
        weight = called.get("weight")
        if isinstance(weight, ModuleTensor):
            weight = getattr(weight.module, weight.name)
            return weight.dtype if isinstance(weight, Tensor) else None
        return self.of(weight) if isinstance(weight, fx.Node) else None

    def _integral(self, called: Called) -> torch.dtype | None:
        return torch.int64

    def _promoted(self, called: Called) -> torch.dtype | None:
        """No floating point where no operand is; that of all tensors if they have the same."""
        operands = [each for each in _leaves(called.node) if not _is_place(each)]
        if called.op.name == "where":
            operands = operands[1:]
        if operands and all(map(self._has_no_fraction, operands)):
            return torch.int64
        tensors = [each for each in operands if isinstance(each, fx.Node)]
        tensors = [each for each in tensors if not is_size(self._calls, each)]
        dtypes = {self.of(each) for each in tensors}
        numbers = all(isinstance(each, fx.Node | int | float | str | None) for each in operands)
        (only,) = dtypes if len(dtypes) == 1 else (None,)
        return only if numbers and only is not None and only.is_floating_point else None

    def _has_no_fraction(self, operand: Any) -> bool:
        if isinstance(operand, fx.Node):
            return self.is_integral(operand) or is_size(self._calls, operand)
        return operand is None or isinstance(operand, int | str)

    def _unknown(self, called: Called) -> torch.dtype | None:
        return None


def _rule(called: Called) -> Dtype:
    dtype, memory = called.op.dtype, called.op.memory
    keeps = memory is Memory.VIEW or memory is Memory.DROPOUT
    return Dtype.KEEPS if dtype is Dtype.UNKNOWN and keeps else dtype


_RULES: dict[Dtype, Callable[[Dtypes, Called], torch.dtype | None]] = {
    Dtype.UNKNOWN: Dtypes._unknown,
    Dtype.KEEPS: Dtypes._of_first,
    Dtype.FLOATS: Dtypes._floating,
    Dtype.WEIGHT: Dtypes._of_weight,
    Dtype.PROMOTES: Dtypes._promoted,
    Dtype.INTEGRAL: Dtypes._integral,
    Dtype.INDICES: Dtypes._unknown,
}


def _leaves(node: fx.Node) -> Iterator[Any]:
    """All arguments of a call, those in lists and tuples one by one."""
    ahead: list[Any] = [node.args, list(node.kwargs.values())]
    while ahead:
        each = ahead.pop(0)
        if isinstance(each, tuple | list):
            ahead = [*each, *ahead]
        else:
            yield each


def _is_place(value: Any) -> bool:
    """Whether an argument says where a result is, and nothing of its dtype."""
    if isinstance(value, fx.Node):
        return value.target is getattr and value.args[1:] == ("device",)
    return isinstance(value, torch.device | torch.layout | torch.memory_format)


def _is_integral(dtype: torch.dtype) -> bool:
    return not dtype.is_floating_point and not dtype.is_complex
