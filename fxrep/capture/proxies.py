"""Traced values (fx proxies): in-place operators, types and lengths as the model's code sees them.

Given: `b = a; b += x; use(a)`. torch.fx's Proxy has no `__iadd__`, so Python rebinds b to a sum
and the trace uses the old a.
Result: `operator.iadd(a, x)` is a node, and a is written as the model writes it.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.fx.proxy import Attribute

from fxrep.ops.values import is_size, item_count, value_type
from fxrep.words import words

if TYPE_CHECKING:
    from fxrep.capture.tracer import Tracer


# One or the other asks, by the version of torch.
_FUNCTION_CODE = (torch.autograd.function.__file__, torch._functorch.utils.__file__)


class Unfaithful(fx.proxy.TraceError):
    """The graph would not do what the forward does."""


class ParameterWrite(Unfaithful):
    """The forward replaces parameters."""


class _TracedMixin:
    """In-place operators and known lengths, which a Proxy lacks; writes of attributes refused."""

    tracer: Tracer
    node: fx.Node

    @property
    def __class__(self) -> type:
        """Its class, as `isinstance` asks for it.

        `torch.autograd.Function.apply` asks it of each argument before it runs the forward of the
        function, whose gradient is another than that of the operators it calls.
        """
        if sys._getframe(1).f_code.co_filename in _FUNCTION_CODE:
            raise self.tracer.refuse(Unfaithful("forward calls an autograd.Function"))
        return type(self)

    @__class__.setter
    def __class__(self, kind: type) -> None:
        raise self.tracer.refuse(Unfaithful("forward sets the class of a traced value"))

    def __setattr__(self, name: str, value: object) -> None:
        if name in ("tracer", "node", "root", "attr", "_node"):
            object.__setattr__(self, name, value)
            return
        node = self.node
        raise self.tracer.refuse(
            ParameterWrite(f"forward assigns .{name} of parameter '{node.target}'")
            if node.op == "get_attr"
            else Unfaithful(f"forward assigns .{name} of a tensor")
        )

    def __setitem__(self, key: object, value: object) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

    def __delitem__(self, key: object) -> None:
        raise self.tracer.refuse(Unfaithful("forward deletes an item of a traced value"))

    def __len__(self) -> int:
        count = item_count(self.tracer.calls, self.node)
        if count is None:
            raise self.tracer.refuse(Unfaithful("forward takes len() of a traced value"))
        return count


def _in_place(name: str) -> Callable[[Any, object], Any]:
    changed = getattr(operator, name)
    fresh = getattr(operator, name[1:], None) or getattr(operator, name[1:] + "_")

    def record(self: Any, other: object) -> Any:
        # `n = x.shape[2]; n += 1` rebinds n: an int has no in-place operators.
        target = fresh if is_size(self.tracer.calls, self.node) else changed
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    return record


for _name in words("iadd isub imul itruediv ifloordiv imod ipow iand ior ixor ilshift irshift"):
    setattr(_TracedMixin, f"__{_name}__", _in_place(_name))


class TracedAttribute(_TracedMixin, Attribute):  # type: ignore[misc]
    """`x.shape`, `x.data`: an attribute of a traced value."""

    def __getattr__(self, name: str) -> TracedAttribute:
        return TracedAttribute(self, name)


class TracedValue(_TracedMixin, fx.Proxy):  # type: ignore[misc]
    """A traced value."""

    def __getattr__(self, name: str) -> TracedAttribute:
        return TracedAttribute(self, name)


def is_instance(value: Any, kinds: Any) -> bool:
    """`isinstance` as the model's code sees it: a traced tensor is a tensor.

    It replaces the builtin by name, in the Python modules that the model is written in. (If the
    proxy's `__class__` were Tensor, torch's C++ argument parser would see it too, and crash.)
    """
    if not isinstance(value, _TracedMixin) or isinstance(value, kinds):
        return isinstance(value, kinds)
    kind = value_type(value.tracer.calls, value.node)
    if kind is None:
        raise value.tracer.refuse(Unfaithful("forward asks for the type of a traced value"))
    if value.node.op == "placeholder":
        value.tracer.tensor_arguments.add(str(value.node.target))
    return issubclass(kind, kinds)


def is_tensor(value: Any) -> bool:
    """`torch.is_tensor`, for which a traced tensor is a tensor."""
    return is_instance(value, torch.Tensor)
