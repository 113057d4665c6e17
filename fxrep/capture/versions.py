"""Whether tensors are where they were, and were not written since."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_version = torch._C.TensorBase._version.__get__  # type: ignore[attr-defined]


class Versions:
    """The versions and addresses of tensors, recorded once; those of copies in a copy.

    Args:
        tensors: the tensors.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.tensors = list({id(tensor): tensor for tensor in tensors}.values())
        self._versioned = [tensor for tensor in self.tensors if not tensor.is_inference()]
        self._versions = list(map(_version, self._versioned))
        self._placed = list(filter(_has_address, self.tensors))
        self._addresses = list(map(Tensor.data_ptr, self._placed))

    def same(self) -> bool:
        """Whether no tensor was written, in a way that counts, or moved."""
        return (
            list(map(_version, self._versioned)) == self._versions
            and list(map(Tensor.data_ptr, self._placed)) == self._addresses
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Versions:
        return Versions(copy.deepcopy(self.tensors, memo))

    def __reduce__(self) -> Any:
        return Versions, (self.tensors,)


def _has_address(tensor: Tensor) -> bool:
    try:
        tensor.data_ptr()
    except RuntimeError:  # a tensor without a storage of its own
        return False
    return True
