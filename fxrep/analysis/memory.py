"""Which tensors share memory with tensors that code may write.

Two tensors share memory if the addresses of their storages overlap: tied parameters, views, buffers
that are slices of one another, arrays of NumPy that were wrapped twice.
"""

from __future__ import annotations

import contextlib
import functools
import types
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from fxrep.capture.mentions import Mentions
from fxrep.ops.owner import foreign_hooks

# How deep the containers and objects in the attributes of a module are searched for tensors.
_DEEPEST = 4


@dataclass(frozen=True)
class Write:
    """A tensor that code may write.

    Attributes:
        tensor: the tensor.
        by: the code, for a reason.
    """

    tensor: Tensor
    by: str


_Range = tuple[int, int, str]  # two addresses, and the code that writes


def _further(a: _Range, b: _Range) -> _Range:
    """The range that reaches further."""
    return a if a[1] >= b[1] else b


class WrittenMemory:
    """The memory of tensors that code may write.

    Args:
        writes: the tensors.
    """

    def __init__(self, writes: Iterable[Write] = ()) -> None:
        ranges: list[_Range] = sorted((*addresses(write.tensor), write.by) for write in writes)
        self._starts = [start for start, _, _ in ranges]
        self._furthest = list(accumulate(ranges, _further))

    def by(self, tensor: Tensor) -> str | None:
        """The code that may write the memory of a tensor; None if no code does."""
        if not self._starts:
            return None
        start, stop = addresses(tensor)
        earlier = bisect_left(self._starts, stop)
        if not earlier:
            return None
        # If any of the earlier ranges overlaps, the furthest does.
        _, reaches, by = self._furthest[earlier - 1]
        return by if reaches > start else None


def addresses(tensor: Tensor) -> tuple[int, int]:
    """The first address of a tensor's storage, and the address after the last."""
    try:
        storage = tensor.untyped_storage()
        start = storage.data_ptr()
        identity = int(storage._cdata)
    except (RuntimeError, NotImplementedError):  # no storage: the tensor shares with itself alone
        start, identity = 0, id(tensor)
    # Negative numbers stand for tensors without an address.
    return (start, start + storage.nbytes()) if start else (-identity, 1 - identity)


def held(module: nn.Module, seen: set[int] | None = None) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a module and the modules below it hold, by path.

    Args:
        module: the module.
        seen: ids of objects whose tensors were found already.
    """
    seen = set() if seen is None else seen
    for path, each in module.named_modules():
        for name, tensor in owned(each, seen):
            yield f"{path}.{name}" if path else name, tensor


def owned(module: nn.Module, seen: set[int] | None = None) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a module holds itself.

    They are its parameters and buffers, and the tensors in its other attributes: in containers, in
    plain objects, and in modules that are not registered.

    Args:
        module: the module.
        seen: ids of objects whose tensors were found already.
    """
    seen = set() if seen is None else seen
    for tensors in (module._parameters, module._buffers):
        for name, tensor in tensors.items():
            if tensor is not None:
                yield name, tensor
    for name, value in vars(module).items():
        if name not in _EVERY_MODULE:
            for tensor in _inside(value, seen, 0):
                yield name, tensor


def reached_by_hooks(module: nn.Module) -> Iterator[Tensor]:
    """The tensors that hooks of a module, or of modules below it, may write.

    A hook carries objects: a method its module, a function its closure. Of a module that it carries
    only the module's own tensors count, unless the hook's code names weights.
    """
    for each in module.modules():
        hooks = foreign_hooks(each)
        seen: set[int] = set()
        whole = bool(hooks and Mentions.of_hooks(hooks).weights(None))
        for hook in hooks:
            yield from _inside(hook, seen, 0, whole=whole)


# Attributes that every module has: its tensors and children, and its hooks.
_EVERY_MODULE = vars(nn.Module()).keys()


def _inside(value: Any, seen: set[int], depth: int, *, whole: bool = True) -> Iterator[Tensor]:
    """The tensors in a value.

    Args:
        value: any object.
        seen: ids of objects whose tensors were found already.
        depth: how many objects lead to the value.
        whole: of a module also the tensors of the modules below it.
    """
    if isinstance(value, Tensor):
        yield value
        return
    if depth > _DEEPEST or isinstance(value, _ATOMS) or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, nn.Module):
        found = held(value, seen) if whole else owned(value, seen)
        yield from (tensor for _, tensor in found)
        return
    for item in _items(value):
        yield from _inside(item, seen, depth + 1, whole=whole)


def _items(value: Any) -> Iterator[Any]:
    """The values in a container, in the attributes of an object, or that a function carries."""
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list | tuple | set | frozenset):
        yield from value
    elif isinstance(value, types.MethodType):
        yield value.__self__
    elif isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, types.FunctionType):
        for cell in value.__closure__ or ():
            with contextlib.suppress(ValueError):  # not assigned yet
                yield cell.cell_contents
    # Without running code of the object.
    with contextlib.suppress(AttributeError):
        yield from dict(object.__getattribute__(value, "__dict__")).values()
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            with contextlib.suppress(AttributeError):
                yield object.__getattribute__(value, name)


_ATOMS = (
    type,
    types.ModuleType,
    str,
    bytes,
    int,
    float,
    complex,
    torch.dtype,
    torch.device,
    torch.Size,
)
