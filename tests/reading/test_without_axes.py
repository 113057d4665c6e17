"""Values without axes, which a constant of one element grows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxrep
from support.models import Body

GROWN: dict[str, Callable[[Any, Any], Any]] = {
    "times": lambda x, p: x.mean() * p,
    "plus": lambda x, p: x.sum() + p,
    "divided": lambda x, p: x.mean() / p,
    "minus": lambda x, p: p - x.mean(),
    "of a maximum": lambda x, p: x.amax((0, 1, 2, 3)) * p,
    "of an element": lambda x, p: x[0, 0, 0, 0] * p,
    "of a function": lambda x, p: torch.relu(x.mean()) * p,
    "of a norm": lambda x, p: x.norm() * p,
    "twice": lambda x, p: (x.mean() * p) * p + p,
}
USES: dict[str, Callable[[Any], Any]] = {
    "shape": lambda y: y.shape,
    "dim": lambda y: (y.dim(), y.numel()),
    "value": lambda y: y,
    "stacked": lambda y: torch.stack([y, y * 2]),
    "a size": lambda y: torch.zeros((*y.shape, 2)),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (4,), (1, 1, 1, 1)])
@pytest.mark.parametrize("name", GROWN)
def test_a_constant_that_grows_it(name: str, shape: tuple[int, ...], use: str) -> None:
    constant = nn.Parameter(torch.full(shape, 2.0))
    model = Body(lambda m, x: USES[use](GROWN[name](x, m.p)), p=constant).eval()
    x = torch.rand(2, 3, 4, 4)
    expected, got = model(x), fxrep.optimize(model)(x)
    if isinstance(expected, Tensor):
        torch.testing.assert_close(got, expected)
    else:
        assert got == expected
