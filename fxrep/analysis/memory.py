"""Which tensors of a model code may write, and which others share their memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from fxrep.capture.sharing import Seen, of_module, reached
from fxrep.capture.uses import changes_layers
from fxrep.ops.memory import Memory
from fxrep.ops.owner import foreign_hooks


@dataclass(frozen=True)
class Write:
    """A tensor that code may write.

    Attributes:
        tensor: the tensor.
        by: the code, for a reason.
    """

    tensor: Tensor
    by: str


class WrittenMemory:
    """The memory of tensors that code may write.

    Args:
        writes: the tensors.
    """

    def __init__(self, writes: Iterable[Write] = ()) -> None:
        self._writes = list(writes)
        self._memory = Memory(write.tensor for write in self._writes)

    def by(self, tensor: Tensor) -> str | None:
        """The code that may write the memory of a tensor; None if no code does."""
        found = self._memory.sharing(tensor)
        return None if found is None else self._writes[found].by


def held(module: nn.Module) -> Iterator[Tensor]:
    """The tensors that a module, the modules below it, and their code reach."""
    seen: Seen = {}
    for each in module.modules():
        yield from (found.tensor for found in of_module(each, seen))


def owned(module: nn.Module) -> Iterator[Tensor]:
    """The tensors that a module and its code reach, without those of its children."""
    yield from (found.tensor for found in of_module(module, {}))


def reached_by_hooks(module: nn.Module) -> Iterator[Tensor]:
    """The tensors that hooks of a module, or of modules below it, may write.

    A hook carries objects: a method its module, a function its closure. Of a module that it carries
    only the module's own tensors count, unless the hook's code may change layers.
    """
    for each in module.modules():
        hooks = foreign_hooks(each)
        if hooks:
            found = reached(hooks, whole=changes_layers(hooks, module))
            yield from (each.tensor for each in found)
