"""Which tensors share memory: tied parameters, views, buffers that are slices of one another.

Two tensors share memory if the addresses of their storages overlap, even if these are two storages:
those of a NumPy array that was wrapped twice.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from itertools import accumulate

from torch import Tensor

_Range = tuple[int, int, int]  # two addresses, and the position of the tensor


def _further(a: _Range, b: _Range) -> _Range:
    """The range that reaches further."""
    return a if a[1] >= b[1] else b


class Memory:
    """The memory of tensors.

    Args:
        tensors: the tensors.
    """

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        ranges = sorted((*addresses(tensor), i) for i, tensor in enumerate(tensors))
        self._starts = [start for start, _, _ in ranges]
        self._furthest = list(accumulate(ranges, _further))

    def sharing(self, tensor: Tensor) -> int | None:
        """The position of one of the tensors that shares memory with a tensor, if any does."""
        if not self._starts:
            return None
        start, stop = addresses(tensor)
        earlier = bisect_left(self._starts, stop)
        if not earlier:
            return None
        # If any of the earlier ranges overlaps, the furthest does.
        _, reaches, position = self._furthest[earlier - 1]
        return position if reaches > start else None

    def __contains__(self, tensor: Tensor) -> bool:
        return self.sharing(tensor) is not None


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
