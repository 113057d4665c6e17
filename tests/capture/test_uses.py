"""What code does with a Sequential: call it, read its items, or what cannot be seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from fxrep.capture.uses import use_of

# How a forward uses `self.a`, by the answer.
FORWARDS: dict[str, list[Callable[..., Any]]] = {
    "whole": [lambda self, x: self.a(x), lambda self, x: self.a(input=x)],
    "items": [
        lambda self, x: [each(x) for each in self.a],
        lambda self, x: self.a[0](x),
        lambda self, x, i: self.a[i](x),
        lambda self, x: self.a[-1](self.a[:2](x)),
        lambda self, x: [each for each in self.a[1:]],
        lambda self, x: [each for _, each in enumerate(self.a)],
        lambda self, x: len(self.a),
        lambda self, x: self.a.children(),
    ],
    "both": [
        lambda self, x: self.a(self.a[0](x)),
        lambda self, x: self.a(self.run(self.a, x)),
    ],
    "unknown": [
        lambda self, *args: self.a(*args),
        lambda self, x, **options: self.a(x, **options),
        lambda self, x: self.run(self.a, x),
        lambda self, x: x,
    ],
}


@pytest.mark.parametrize(
    "use, forward", [(use, forward) for use, group in FORWARDS.items() for forward in group]
)
def test_use(use: str, forward: Callable[..., Any]) -> None:
    assert use_of(type("Using", (nn.Module,), {"forward": forward})(), "a") == use
