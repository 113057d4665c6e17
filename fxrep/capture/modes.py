"""What torch's modes notice while a forward is traced. They belong to the thread that traces.

Gradients, inference, autocast: a graph has no place for such a context, so a forward that enters
one is not traced. Real tensors: a forward may draw random numbers, which a graph would bake in,
and write what belongs to the model, which is the user's; both are stopped before they happen.
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
    """What surrounds an operation now, but for gradients; equal for equal surroundings."""
    # The count of nested autocasts: one that changes nothing now may do so at another call. It can
    # only be read by changing it, there and back in one instruction: nothing comes in between.
    _, nested = tuple(map(operator.call, _THERE_AND_BACK))
    return torch.is_inference_mode_enabled(), nested


_THERE_AND_BACK = (torch.autocast_increment_nesting, torch.autocast_decrement_nesting)


class _Gradients(TorchFunctionMode):
    """Refuses to have gradients switched on or off."""

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


class _Writes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses operations on real tensors that draw random numbers or write the model's."""

    def __init__(self, tracer: Tracer, tensors: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tracer = tracer
        self.memory = {place for tensor in tensors if (place := _memory(tensor)) is not None}

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
                if isinstance(value, Tensor) and _memory(value) in self.memory:
                    return True
        return False


def _memory(tensor: Tensor) -> int | None:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):  # no storage of its own
        return None


class Watch:
    """The modes of one trace."""

    def __init__(self, tracer: Tracer, tensors: Iterable[Tensor]) -> None:
        self.gradients, self.writes = _Gradients(tracer), _Writes(tracer, tensors)
        self.depths = _depths()

    def begin(self) -> None:
        """Start to notice."""
        # Not by `with`: that sets flags of the process, which other threads' torch.compile reads.
        torch._C._push_on_torch_function_stack(self.gradients)
        torch._C._push_on_torch_dispatch_stack(self.writes)

    def end(self) -> None:
        """Stop to notice. Calling it again changes nothing."""
        functions, dispatches = self.depths
        while torch._C._len_torch_function_stack() > functions:
            torch._C._pop_torch_function_stack()
        while torch._C._len_torch_dispatch_stack() > dispatches:
            torch._C._pop_torch_dispatch_stack(None)


def _depths() -> tuple[int, int]:
    return torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()
