"""Models that copy themselves, refuse to be changed, or give results of another dtype."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxrep
from support.check import randomize

X = torch.randn(2, 3, 5, 6, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Any:
        return self.norm(self.conv(x))


class CopiesItself(Block):
    def __deepcopy__(self, memo: Any) -> Any:
        made = type(self)()
        made.load_state_dict(self.state_dict())
        return made.train(self.training)


def made_anew(kind: type, state: Any) -> Any:
    made = kind()
    made.load_state_dict(state)
    return made.eval()


class Reduces(Block):
    def __reduce__(self) -> Any:
        return made_anew, (type(self), self.state_dict())


class Frozen(Block):
    def __setattr__(self, name: str, value: Any) -> None:
        if self.__dict__.get("_frozen"):
            raise AttributeError("frozen")
        super().__setattr__(name, value)


class Static(Block):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Block()

    @staticmethod
    def forward(x: Tensor) -> Any:
        return x * 2


class Bound:
    """A descriptor that binds a forward."""

    def __get__(self, instance: Any, kind: Any = None) -> Any:
        return self if instance is None else lambda x: Block.forward(instance, x) * 2


class Described(Block):
    forward = Bound()


class InFloat64(Block):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x.float()).double()


class Complex(Block):
    def forward(self, x: Tensor) -> Any:
        return torch.complex(super().forward(x.real), super().forward(x.imag))


class Deciding(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Any:
        return x if x.abs().sum() > 1e9 else self.block(x)


PLACES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "the model": lambda block: block,
    "a part": lambda block: nn.Sequential(block, nn.ReLU()),
    "an island": Deciding,
}
KINDS = [CopiesItself, Reduces, Frozen, Static, Described, InFloat64, Complex]


@pytest.mark.parametrize("examples", [False, True], ids=["", "example inputs"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_it_runs(kind: type[Block], place: str, examples: bool) -> None:
    model = PLACES[place](randomize(kind().eval())).eval()
    x = torch.complex(X, X + 1) if kind is Complex else X
    if kind is Complex and place == "a part":
        model = nn.Sequential(model[0]).eval()
    if kind is Frozen:
        next(m for m in model.modules() if isinstance(m, Frozen)).__dict__["_frozen"] = True
    state = torch.get_rng_state()
    optimized = fxrep.optimize(model, x if examples else None)
    assert torch.equal(torch.get_rng_state(), state)
    for each in (optimized, copy.deepcopy(optimized)):
        for gradients in (False, True):
            with torch.set_grad_enabled(gradients):
                torch.testing.assert_close(each(x), model(x), rtol=1e-4, atol=1e-4)
    if kind is not Static:
        assert fxrep.report(optimized).rewrites, fxrep.report(optimized)


def test_slots_of_a_module_are_refused_by_name() -> None:
    class Slotted(Block):
        __slots__ = ("factor",)

        def __init__(self) -> None:
            super().__init__()
            self.factor = 2.0

        def forward(self, x: Tensor) -> Any:
            return super().forward(x) * self.factor

    model = nn.Sequential(nn.ReLU(), Slotted()).eval()
    with pytest.raises(fxrep.ModelError, match=r"model\.1 \(Slotted\) keeps 'factor' in __slots__"):
        fxrep.optimize(model)


def test_a_wrong_complex_result_is_found() -> None:
    """The comparison looks at imaginary parts, too."""
    from fxrep.rewriting.validate import relative_error

    right = torch.complex(X, X)
    assert relative_error(right, right) == 0
    assert relative_error(torch.complex(X, 2 * X), right) > 0.1


WRITTEN = [torch.zeros(3)]


@pytest.mark.parametrize("examples", [False, True], ids=["", "example inputs"])
def test_the_count_of_writes_is_taken_back(examples: bool) -> None:
    class Writes(Block):
        def forward(self, x: Tensor) -> Any:
            WRITTEN[0].add_(1)
            return super().forward(x)

    before = WRITTEN[0]._version, WRITTEN[0].clone()
    fxrep.optimize(nn.Sequential(Writes(), nn.ReLU()).eval(), X if examples else None)
    assert WRITTEN[0]._version == before[0] and torch.equal(WRITTEN[0], before[1])


CODE = """
import os, sys, torch, fxrep
before = dict(os.environ)
model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).eval()
fxrep.optimize(model)
assert dict(os.environ) == before
assert "torch._dynamo" not in sys.modules
"""


def test_the_first_call_does_not_wait_for_torchs_compiler() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


READS = """
import os, torch, fxrep
from torch import nn

class Reads(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    def forward(self, x):
        y = self.conv(x) if x.shape[-1] > 2 else x
        return self.norm(y) * (2 if os.environ.get("OF_FXREP") else 3)

result = fxrep.optimize(Reads().eval(), torch.randn(1, 3, 8, 8))
assert fxrep.report(result).rewrites, fxrep.report(result)
"""


def test_what_torch_imports_is_no_write_of_the_forward() -> None:
    done = subprocess.run([sys.executable, "-c", READS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
