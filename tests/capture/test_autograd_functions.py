"""Functions with a gradient of their own are called, not replaced by the operators they call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxrep
from support.check import randomize
from support.models import Body


class Straight(torch.autograd.Function):
    """Rounds; its gradient passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0]


class Reversed(torch.autograd.Function):
    """The identity; its gradient is reversed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float = 1.0) -> Tensor:
        ctx.factor = factor
        return x

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return -gradients[0] * ctx.factor, None


class Swish(torch.autograd.Function):
    """Saves its operand only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (x,) = ctx.saved_tensors
        return gradients[0] * x.sigmoid() * (1 + x * (1 - x.sigmoid()))


class SetUp(torch.autograd.Function):
    """The other way to write one."""

    @staticmethod
    def forward(x: Tensor, factor: float = 3.0) -> Tensor:
        return x.clamp(-1, 1) * factor

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0] * 7, None


class Rounding(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return Straight.apply(x)


class Activation(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return Swish.apply(x)


straight = Straight.apply

FORWARDS: dict[str, Callable[[Any, Tensor], Any]] = {
    "called": lambda m, x: m.b(m.a(Straight.apply(x))),
    "by another name": lambda m, x: m.b(m.a(straight(x))),
    "from an attribute": lambda m, x: m.b(m.a(m.functions[0](x))),
    "of nothing but a gradient": lambda m, x: m.b(m.a(Reversed.apply(x, 2.0))),
    "after a layer": lambda m, x: m.b(m.a(Swish.apply(m.d(x)))),
    "with a context set up": lambda m, x: m.b(m.a(SetUp.apply(x))),
    "in a module": lambda m, x: m.e(m.b(m.a(m.rounding(x)))),
    "in an activation": lambda m, x: m.e(m.swish(m.b(m.a(x)))),
    "of a weight": lambda m, x: F.conv2d(m.b(m.a(x)), Straight.apply(m.e.weight)),
    "in a checkpoint": lambda m, x: checkpoint(lambda t: m.b(m.a(t)), x, use_reentrant=True),
}


@pytest.mark.parametrize("examples", [False, True], ids=["", "example inputs"])
@pytest.mark.parametrize("name", FORWARDS)
def test_gradients_stay(name: str, examples: bool) -> None:
    parts = {"a": nn.Conv2d(3, 4, 1), "b": nn.BatchNorm2d(4), "d": nn.Conv2d(3, 3, 1)}
    model = Body(FORWARDS[name], **parts, e=nn.Conv2d(4, 2, 1), rounding=Rounding(),
                 swish=Activation(), functions=[Straight.apply])  # fmt: skip
    model = randomize(model.eval())
    x = 1.3 * torch.randn(2, 3, 5, 5)
    optimized = fxrep.optimize(model, x if examples else None)
    results, gradients = [], []
    for each in (model, optimized):
        given = x.clone().requires_grad_()
        results.append(each(given))
        results[-1].sum().backward()
        gradients.append(given.grad)
    torch.testing.assert_close(*reversed(results), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(*reversed(gradients), rtol=1e-4, atol=1e-4)


def test_the_layers_around_it_fold() -> None:
    layers = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), Activation(), nn.Conv2d(4, 4, 1)
    optimized = fxrep.optimize(nn.Sequential(*layers, nn.BatchNorm2d(4), Rounding()).eval())
    assert len(fxrep.report(optimized).rewrites) == 2
