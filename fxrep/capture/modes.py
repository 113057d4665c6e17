"""Torch's modes, which watch a forward while it is traced; they belong to the tracing thread.

Gradients, inference, autocast: a graph cannot express such a context, so a forward that enters a
context is refused. Real tensors: random numbers would be constants of the graph, and writes would
reach the tensors of the user's model; both are refused before they happen.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fxrep.capture.askers import asks_for_users
from fxrep.capture.proxies import Unfaithful
from fxrep.words import words

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


# Ways to the memory, gradient or flags of a tensor that no operator takes. Most give the memory to
# somebody else, whose writes nothing sees.
_ACCESSES = frozenset(
    getattr(Tensor, name)
    for name in words(
        "numpy __array__ __dlpack__ data_ptr untyped_storage storage _typed_storage apply_ map_ "
        "map2_ requires_grad_ retain_grad register_hook share_memory_"
    )
) | frozenset(getattr(Tensor, name).__set__ for name in words("data grad requires_grad"))

_BACKWARD = (Tensor.backward, torch.autograd.backward)


# Tensors that must not be written, in words, by the id of their memory.
Memory = dict[int | None, str]


class _FunctionGuard(TorchFunctionMode):
    """Refuses a forward that switches gradients, or takes the memory of a tensor of the model."""

    def __init__(self, tracer: Tracer, memory: Memory) -> None:
        super().__init__()
        self.tracer = tracer
        self.memory = memory

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch._C._set_grad_enabled:
            name = "enable_grad" if args and args[0] else "no_grad"
            raise self.tracer.refuse(Unfaithful(f"forward uses 'with torch.{name}'"))
        if func in _BACKWARD:
            raise self.tracer.refuse(Unfaithful("forward computes gradients"))
        if func in _ACCESSES and args and _is_in(args[0], self.memory):
            attribute = getattr(getattr(func, "__self__", None), "__name__", func.__name__)
            raise self.tracer.refuse(
                Unfaithful(f"forward uses .{attribute} of {self.memory[_storage_id(args[0])]}")
            )
        if func in _OF_DEFAULTS and asks_for_users(sys._getframe(1)):
            self._refuse_default(func, args[0])
        return func(*args, **(kwargs or {}))

    def _refuse_default(self, func: Callable[..., Any], tensor: Tensor) -> None:
        """Refuse to ask a tensor that the forward makes itself for what the process decides."""
        if _is_in(tensor, self.memory) or isinstance(tensor, torch.nn.Parameter):
            return
        if func is Tensor.is_inference or tensor.dtype.is_floating_point:
            raise self.tracer.refuse(
                Unfaithful("forward asks a tensor that it makes for a default of the process")
            )


# Answers that depend on the default dtype and on the mode of the process.
_OF_DEFAULTS = (Tensor.dtype.__get__, Tensor.is_inference)  # type: ignore[attr-defined]


class _RealTensorGuard(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses operations on real tensors that draw random numbers or write tensors of the model."""

    def __init__(self, tracer: Tracer, memory: Memory) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tracer = tracer
        self.memory = memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in getattr(func, "tags", ()):
            raise self.tracer.refuse(Unfaithful("forward draws random numbers"))
        may_write = func._schema.is_mutable or _trains(func, args, kwargs)
        written = self._written(func._schema, args, kwargs) if may_write else None
        if written is not None:
            raise self.tracer.refuse(Unfaithful(f"forward writes into {written}"))
        return func(*args, **kwargs)

    def _written(self, schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """The tensor of the model that an operator writes, in words."""
        for i, argument in enumerate(schema.arguments):
            declared = argument.alias_info is not None and argument.alias_info.is_write
            if not declared and argument.name not in _WRITTEN_IN_TRAINING:
                continue
            given = args[i] if i < len(args) else kwargs.get(argument.name)
            for value in tree_leaves(given):
                if _is_in(value, self.memory):
                    self.tracer.state.refused.add(id(value))
                    return self.memory[_storage_id(value)]
        return None


# Operators whose schema does not say that they write the running statistics.
_NORMS = frozenset(words("native_batch_norm cudnn_batch_norm miopen_batch_norm"))
_WRITTEN_IN_TRAINING = ("running_mean", "running_var")


def _trains(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a batch normalization takes the statistics of the batch, and writes them."""
    name = func.__name__.partition(".")[0]
    if name == "batch_norm_update_stats":
        return True
    if name not in _NORMS:
        return False
    names = [argument.name for argument in func._schema.arguments]
    return bool({**dict(zip(names, args, strict=False)), **kwargs}.get("training"))


def _is_in(value: Any, memory: Memory) -> bool:
    return isinstance(value, Tensor) and _storage_id(value) in memory


def _storage_id(tensor: Tensor) -> int | None:
    try:
        with torch._C.DisableTorchFunction():
            return int(tensor.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):  # no storage of its own
        return None


class Watch:
    """The modes of one trace.

    Args:
        tracer: is told of violations.
        tensors: those that must not be written.
        names: the names of some of them, by id.
    """

    def __init__(self, tracer: Tracer, tensors: Iterable[Tensor], names: Mapping[int, str]) -> None:
        memory = {
            _storage_id(tensor): f"the tensor attribute '{names[id(tensor)]}'"
            if id(tensor) in names
            else "a tensor of the model"
            for tensor in tensors
        }
        memory.pop(None, None)
        self.functions, self.writes = (
            _FunctionGuard(tracer, memory),
            _RealTensorGuard(tracer, memory),
        )
        self.depths = _depths()

    def start(self) -> None:
        """Enter the modes."""
        # Not by `with`: that sets flags of the process, which torch.compile reads in other threads.
        torch._C._push_on_torch_function_stack(self.functions)
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
