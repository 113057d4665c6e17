"""Hooks that change results: of one module, of all modules, of another type."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as of_torch

import fxrep
from support.check import randomize
from support.models import Body

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


LEAVES: dict[str, Callable[[], nn.Module]] = {
    "pooling": lambda: nn.MaxPool2d(2),
    "activation": nn.ReLU,
    "in place": lambda: nn.ReLU(inplace=True),
    "identity": nn.Identity,
    "dropout": nn.Dropout,
    "convolution": lambda: nn.Conv2d(3, 3, 1),
    "BatchNorm": lambda: nn.BatchNorm2d(3),
    "upsampling": lambda: nn.Upsample(scale_factor=2),
    "flatten": lambda: nn.Flatten(2, 3),
    "a container": lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)),
}
CHANGES: dict[str, Callable[[Any, Any, Any], Any]] = {
    "a tuple": lambda module, args, out: (out, out + 1),
    "a list": lambda module, args, out: [out * 2],
    "a dict": lambda module, args, out: {"a": out - 1},
}


@pytest.mark.parametrize("examples", [False, True], ids=["", "example inputs"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("leaf", LEAVES)
def test_a_hook_that_returns_another_type(leaf: str, change: str, examples: bool) -> None:
    part = randomize(LEAVES[leaf]())
    part.register_forward_hook(CHANGES[change])
    key: Any = "a" if change == "a dict" else 0

    def forward(m: Any, x: Tensor) -> Any:
        y = m.part(m.before(x.clone()))[key]
        return m.bn(m.after(y if y.dim() == 4 else y.unsqueeze(-1)))

    def plain(m: Any, x: Tensor) -> Any:
        return m.bn(m.after(m.part(m.before(x.clone()))[key].reshape(2, 3, -1, 1)))

    for body in (forward, plain):
        bn = randomize(nn.BatchNorm2d(4))
        model = Body(body, before=nn.Conv2d(3, 3, 1), part=part, after=nn.Conv2d(3, 4, 1), bn=bn)
        model = model.eval()
        optimized = fxrep.optimize(model, X if examples else None)
        torch.testing.assert_close(optimized(X), model(X), rtol=1e-4, atol=1e-4)


def only_batchnorms(change: Callable[[Any], Any]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, *out: Any) -> Any:
        return change(out[0] if out else args) if isinstance(module, nn.BatchNorm2d) else None

    return hook


def in_a_tuple(module: nn.Module, args: Any, out: Any) -> Any:
    return (out,) if isinstance(module, nn.Identity) else None


def halved(module: nn.Module, given: Any, *received: Any) -> Any:
    return tuple(None if each is None else each / 2 for each in given)


GLOBAL: dict[str, Callable[[], Any]] = {
    "forward": lambda: of_torch.register_module_forward_hook(only_batchnorms(lambda y: y * 2)),
    "forward, a tuple": lambda: of_torch.register_module_forward_hook(in_a_tuple),
    "forward pre": lambda: of_torch.register_module_forward_pre_hook(
        only_batchnorms(lambda args: (args[0] * 2,))
    ),
    "always called": lambda: of_torch.register_module_forward_hook(
        only_batchnorms(lambda y: y + 1), always_call=True
    ),
    "full backward": lambda: of_torch.register_module_full_backward_hook(halved),
    "full backward pre": lambda: of_torch.register_module_full_backward_pre_hook(halved),
}


@pytest.fixture(params=GLOBAL)
def hooked(request: pytest.FixtureRequest) -> Iterator[str]:
    """A hook for all modules, for one test."""
    handle = GLOBAL[request.param]()
    yield request.param
    handle.remove()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("examples", [False, True], ids=["", "example inputs"])
def test_hooks_of_all_modules(hooked: str, examples: bool) -> None:
    model = randomize(
        nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.Conv2d(4, 4, 1)),
            nn.BatchNorm2d(4),
        ).eval()
    )  # fmt: skip
    optimized = fxrep.optimize(model, X if examples else None)
    gradients = []
    for each in (model, optimized):
        given = X.clone().requires_grad_()
        each(given).sum().backward()
        gradients.append(given.grad)
    torch.testing.assert_close(optimized(X), model(X), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-4)
