"""Torch's modes, which watch a forward while it is traced; they belong to the tracing thread.

Gradients, inference, autocast: a graph cannot express such a context, so a forward that enters a
context is refused. Real tensors: random numbers would be constants of the graph, and writes would
reach the tensors of the user's model; both are refused before they happen.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fxrep.capture.proxies import Unfaithful

if TYPE_CHECKING:
    from fxrep.capture.tracer import Tracer


def contexts() -> tuple[object, ...]:
    """Inference mode and autocast as they are now, to be compared."""
    # The depth of nested autocasts, not their values: an autocast that changes nothing now may do
    # so at another call. The depth can only be read by changing it; one instruction does so and
    # undoes it, so that no interrupt comes in between.
    _, depth = tuple(map(operator.call, _UP_AND_DOWN))
    return torch.is_inference_mode_enabled(), depth


_UP_AND_DOWN = (torch.autocast_increment_nesting, torch.autocast_decrement_nesting)


class _GradientGuard(TorchFunctionMode):
    """Refuses a forward that switches gradients on or off."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch._C._set_grad_enabled:
            name = "enable_grad" if args and args[0] else "no_grad"
            raise self.tracer.refuse(Unfaithful(f"forward uses 'with torch.{name}'"))
        return func(*args, **(kwargs or {}))


class _RealTensorGuard(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses operations on real tensors that draw random numbers or write tensors of the model."""

    def __init__(self, tracer: Tracer, tensors: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tracer = tracer
        self.memory = {place for tensor in tensors if (place := _storage_id(tensor)) is not None}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in getattr(func, "tags", ()):
            raise self.tracer.refuse(Unfaithful("forward draws random numbers"))
        if func._schema.is_mutable and self._writes(func._schema, args, kwargs):
            raise self.tracer.refuse(Unfaithful("forward writes into a tensor of the model"))
        return func(*args, **kwargs)

    def _writes(self, schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        for i, argument in enumerate(schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            given = args[i] if i < len(args) else kwargs.get(argument.name)
            for value in tree_leaves(given):
                if isinstance(value, Tensor) and _storage_id(value) in self.memory:
                    return True
        return False


def _storage_id(tensor: Tensor) -> int | None:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):  # no storage of its own
        return None


class Watch:
    """The modes of one trace.

    Args:
        tracer: is told of violations.
        tensors: the tensors of the model, which must not be written.
    """

    def __init__(self, tracer: Tracer, tensors: Iterable[Tensor]) -> None:
        self.gradients, self.writes = _GradientGuard(tracer), _RealTensorGuard(tracer, tensors)
        self.depths = _depths()

    def start(self) -> None:
        """Enter the modes."""
        # Not by `with`: that sets flags of the process, which torch.compile reads in other threads.
        torch._C._push_on_torch_function_stack(self.gradients)
        torch._C._push_on_torch_dispatch_stack(self.writes)

    def stop(self) -> None:
        """Leave the modes. A second call changes nothing."""
        functions, dispatches = self.depths
        while torch._C._len_torch_function_stack() > functions:
            torch._C._pop_torch_function_stack()
        while torch._C._len_torch_dispatch_stack() > dispatches:
            torch._C._pop_torch_dispatch_stack(None)


def _depths() -> tuple[int, int]:
    """How many function modes and dispatch modes are active."""
    return torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()
