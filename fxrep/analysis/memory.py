"""Which tensors share memory with tensors that code may write.

Two tensors share memory if the addresses of their storages overlap: tied parameters, views, buffers
that are slices of one another, arrays of NumPy that were wrapped twice.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

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


def held(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a module and the modules below it hold, by path."""
    for path, each in module.named_modules():
        for name, tensor in owned(each):
            yield f"{path}.{name}" if path else name, tensor


def owned(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a module holds itself.

    They are its parameters and buffers, and the tensors in its other attributes: in containers, in
    plain objects, and in modules that are not registered.
    """
    for tensors in (module._parameters, module._buffers):
        for name, tensor in tensors.items():
            if tensor is not None:
                yield name, tensor
    seen: set[int] = set()
    for name, value in vars(module).items():
        if name not in _EVERY_MODULE:
            for tensor in _inside(value, seen, 0):
                yield name, tensor


# Attributes that every module has: its tensors and children, and its hooks.
_EVERY_MODULE = vars(nn.Module()).keys()


def _inside(value: Any, seen: set[int], depth: int) -> Iterator[Tensor]:
    """The tensors in a value."""
    if isinstance(value, Tensor):
        yield value
        return
    if depth > _DEEPEST or isinstance(value, _ATOMS) or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, nn.Module):
        yield from (tensor for _, tensor in held(value))
        return
    items: list[Any] = []
    if isinstance(value, dict):
        items += value.values()
    elif isinstance(value, list | tuple | set | frozenset):
        items += value
    items += getattr(value, "__dict__", {}).values()
    items += (getattr(value, name, None) for name in getattr(type(value), "__slots__", ()))
    items += _bound(value)
    for item in items:
        yield from _inside(item, seen, depth + 1)


def _bound(value: Any) -> list[Any]:
    """The values that a function, a method or a partial carries."""
    found = [getattr(value, name, None) for name in ("__self__", "func", "args", "keywords")]
    for cell in getattr(value, "__closure__", None) or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:  # not assigned yet
            continue
    return [each for each in found if each is not None]


_ATOMS = (type, type(torch), str, bytes, int, float, complex, torch.dtype, torch.device, torch.Size)
