"""What operators do to memory, as the table says and as torch does it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxrep.ops.calls import Calls
from fxrep.ops.effects import effect
from fxrep.ops.spellings import FUNCTIONS, METHODS, OPS

_ARGUMENTS: tuple[tuple[Any, ...], ...] = (
    (), (1,), (0,), (1.0,), (-1,), (0, 0), (1, 1), (1, 0), ([0, 0],), ((0, 0, 0, 0),),
    (torch.ones(1),), (torch.ones(1, 1, 1, 1),), (0, torch.zeros(1, dtype=torch.long)),
    (1, 1, 1, 1), (0.5, False), (torch.ones(2, 2), torch.ones(2, 2)), (1, 0, False),
    (torch.zeros(1), torch.ones(1)),
)  # fmt: skip

_LISTED = {*OPS, *METHODS, *(f.__name__ for f in FUNCTIONS if hasattr(f, "__name__"))}


def _surprises(home: Any, name: str) -> set[str]:
    """What a function does to the memory of its operand beside what the analysis expects."""
    found = set()
    for shape in ((1, 1, 1, 1), (1, 1, 1), (2,)):
        for extra in _ARGUMENTS:
            x, arguments = torch.full(shape, 1.5), copy.deepcopy(extra)
            graph = fx.Graph()
            operands = (graph.placeholder("x"), *extra)
            if home is Tensor:
                node = graph.call_method(name, operands)
            else:
                node = graph.call_function(getattr(home, name), operands)
            does = effect(Calls(nn.Module()), node)
            memory = x.data_ptr()
            try:
                result = getattr(home, name)(x, *arguments)
            except Exception:
                continue
            if not does.writes and (x.shape != shape or not bool((x == 1.5).all())):
                found.add(f"{name} writes")
            for value in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(value, Tensor) and value.numel() and not does.touched:
                    found.update({f"{name} aliases"} if value.data_ptr() == memory else ())
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("home", [torch, F, Tensor], ids=["torch", "functional", "method"])
def test_what_torch_does_to_memory(home: Any) -> None:
    """Called on what is most likely to come back as it is: ones, no padding, no scaling."""
    names = _LISTED
    if home is Tensor:
        names = {n for n in dir(Tensor) if n[0] != "_" and callable(getattr(Tensor, n))}
        names -= {"module_load", "backward"}  # no operations
    names = {name for name in names if callable(getattr(home, name, None))}
    assert not set().union(*(_surprises(home, name) for name in names))
