"""What a run of a copy of a model can write outside of the copy, and how it is put back.

Given: a model whose forward counts in a class attribute, and writes a NumPy array that the copy
shares with it.

Result: after a run of the copy both are what they were.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from fxrep.capture.reach import Reach
from fxrep.capture.sharing import Reached, of_tree, outside
from fxrep.capture.snapshot import Snapshot


class Surroundings:
    """The state and the memory that copies of a model share with it, as they are now.

    Args:
        model: the model.
        reached: the tensors that it reaches, if they are known.
        strays: what code reaches that ran in a trace, and to which no name leads; may grow.

    Attributes:
        unrunnable: why not even a copy may be run: its effects could not be put back. None if so.
    """

    def __init__(
        self,
        model: nn.Module,
        reached: Sequence[Reached] | None = None,
        strays: Mapping[Any, Reach] | None = None,
    ) -> None:
        self._strays = {} if strays is None else strays
        self._known = 0
        self._memory = outside(of_tree(model) if reached is None else reached)
        self._state = Snapshot(model)
        self.unrunnable = self._state.unrunnable

    def prepare(self) -> None:
        """Keep the state of code that was found since the last run."""
        self._state.keep(list(self._strays.values())[self._known :])
        self._known = len(self._strays)

    def run(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The result of a call; what the call sets in its context is gone with it."""
        self.prepare()
        return contextvars.copy_context().run(forward, *args, **kwargs)

    def restore(self, whole: bool = True) -> None:
        """Put back what runs have written. A second call changes nothing.

        Args:
            whole: as for `Snapshot.restore`.
        """
        self._memory.restore()
        self._state.restore(whole)
