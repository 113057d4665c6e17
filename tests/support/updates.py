"""Every way to change weights, and who sees it: the table of the README, as `test_updates` runs it.

"fresh" is the output of the new weights, "stale" anything else, and "raises" is said by the change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fxrep
from support.check import randomize
from support.compiling import Block, OwnNorm


def _dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def _other(model: nn.Module) -> dict[str, Any]:
    return randomize(Block()).to(_dtype(model)).state_dict()


def load(model: Any) -> None:
    model.load_state_dict(_other(model))


def load_assigning(model: Any) -> None:
    model.load_state_dict(_other(model), assign=True)


def load_swapping(model: Any) -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.load_state_dict(_other(model))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


class WritesData(torch.optim.Optimizer):
    """Steps as optimizers did before torch 1.5, and many outside torch do."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(parameter.grad.data, alpha=-group["lr"])


def step(kind: Callable[..., torch.optim.Optimizer], **options: Any) -> Callable[[Any], None]:
    def update(model: Any) -> None:
        optimizer = kind(model.parameters(), lr=0.5, **options)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        optimizer.zero_grad()

    return update


def in_place(model: Any) -> None:
    with torch.no_grad():
        model.wide.weight.mul_(2)


def compiled(model: Any) -> None:
    def update() -> None:
        for parameter in model.parameters():
            parameter.mul_(1.5)

    with torch.no_grad():
        torch.compile(update, backend="aot_eager")()


def copy_(model: Any) -> None:
    with torch.no_grad():
        model.narrow.weight.copy_(torch.randn_like(model.narrow.weight))


def assign_data(model: Any) -> None:
    model.wide.weight.data = torch.randn_like(model.wide.weight)


def assign_data_twice(model: Any) -> None:
    weight = model.wide.weight
    address, alive = weight.data_ptr(), list[Tensor]()
    weight.data = torch.randn_like(weight)
    for _ in range(100):  # the allocator hands freed memory out again
        alive.append(torch.randn_like(weight))
        if alive[-1].data_ptr() == address:
            break
    weight.data = alive[-1].detach()


def new_parameter(model: Any) -> None:
    model.wide.weight = nn.Parameter(torch.randn_like(model.wide.weight))


def swap_module(model: Any) -> None:
    model.wide = nn.Conv2d(4, 4, 3, padding=1, bias=False).to(_dtype(model))


def recalibrate(model: Any) -> None:
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(2, 4, 6, 6, dtype=_dtype(model)) * 3 + 1)
    model.eval()


def multiply_data(model: Any) -> None:
    model.wide.weight.data.mul_(2)


def numpy(model: Any) -> None:
    array = model.wide.weight.detach().numpy()
    array *= 2


def refreshed(model: Any) -> None:
    multiply_data(model)
    fxrep.refresh(model)


class Way(NamedTuple):
    """A way to change weights."""

    name: str
    update: Callable[[Any], None]
    fxrep: str
    freezing: str
    inductor: str  # with its own freezing
    model: Callable[[], nn.Module] = Block


def _own() -> nn.Module:
    return OwnNorm("views")


F, S = "fresh", "**stale**"
R = "raises"
TABLE = (
    Way("`load_state_dict`", load, F, F, S),
    Way("`load_state_dict(assign=True)`", load_assigning, F, F, F),
    Way("`load_state_dict`, swapping (`torch.__future__`)", load_swapping, F, F, R),
    Way("an optimizer", step(torch.optim.SGD), F, F, S),
    Way("an optimizer, `foreach=True`", step(torch.optim.SGD, foreach=True), F, F, S),
    Way("an optimizer, `fused=True`", step(torch.optim.AdamW, fused=True), F, F, S),
    Way("an optimizer that writes `p.data`", step(WritesData), F, F, S),
    Way("`p.mul_()` under `no_grad`", in_place, F, F, S),
    Way("the same in a compiled function", compiled, F, F, S),
    Way("`p.copy_()`", copy_, F, F, S),
    Way("`p.data = t`", assign_data, F, F, S),
    Way("`p.data = t`, twice", assign_data_twice, F, F, S),
    Way("a new Parameter", new_parameter, F, F, F),
    Way("a module swapped for another", swap_module, F, F, F),
    Way("BatchNorm statistics, in training mode", recalibrate, F, F, S),
    Way("the same by `F.batch_norm` of one's own", recalibrate, F, F, S, _own),
    Way("`p.data.mul_()`", multiply_data, S, S, S),
    Way("NumPy, or a kernel, writing its memory", numpy, S, S, S),
    Way("`p.data.mul_()`, then `fxrep.refresh(model)`", refreshed, F, F, S),
)
