"""Concatenations: of one source, of several, of chunks; and what is no concatenation of maps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from check import check
from hypothesis import given
from hypothesis import strategies as st
from test_dead import Body
from torch import Tensor, nn

SHAPES = ((2, 8, 9, 9), (1, 8, 4, 7), (1, 8, 2, 1))


def conv(outputs: int = 8, kernel: int = 3, **how: Any) -> nn.Conv2d:
    how = {"padding": kernel // 2, **how}
    return nn.Conv2d(8, outputs, kernel, **how)


def _one_source(m: Any, x: Tensor) -> Tensor:
    return torch.cat([m.a(x), m.b(x)], 1)


def _with_identity(m: Any, x: Tensor) -> Tensor:
    y = m.b(x.relu())
    return m.norm(torch.concat([m.a(x), y], dim=-3))


def _run_in_a_wider_one(m: Any, x: Tensor) -> Tensor:
    return torch.concatenate([x.sigmoid(), m.a(x), m.b(x), x.tanh()], dim=1)


def _other_source_between(m: Any, x: Tensor) -> Tensor:
    return torch.cat([m.a(x), m.c(x.tanh()), m.b(x)], 1)


def _halves(m: Any, x: Tensor) -> Tensor:
    first, second = m.start(x).relu().chunk(2, 1)
    return torch.cat([m.a(first), m.b(second)], 1)


def _halves_out_of_order(m: Any, x: Tensor) -> Tensor:
    first, second = m.start(x).relu().chunk(2, 1)
    return torch.cat([m.b(second), m.a(first)], 1)


def _halved(outputs: int) -> dict[str, nn.Module]:
    return {
        "start": conv(8),
        "a": nn.Conv2d(4, 6, 3, padding=1),
        "b": nn.Conv2d(4, outputs, 3, padding=1),
    }


CASES: dict[str, tuple[Callable[..., Any], dict[str, nn.Module], int]] = {
    "one source": (_one_source, {"a": conv(4), "b": conv(6)}, 1),
    "kernels of two sizes": (_one_source, {"a": conv(4), "b": conv(12, 1)}, 2),
    "two sources, BatchNorm over both": (
        _with_identity, {"a": conv(4), "b": conv(6), "norm": nn.BatchNorm2d(10)}, 2,
    ),
    "a run in a wider one": (_run_in_a_wider_one, {"a": conv(4), "b": conv(4)}, 1),
    "one source around another": (
        _other_source_between, {"a": conv(4), "b": conv(6), "c": conv(4)}, 3,
    ),
    "equal halves": (_halves, _halved(6), 2),
    "unequal halves": (_halves, _halved(2), 3),
    "halves out of order": (_halves_out_of_order, _halved(6), 3),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_layers_that_are_left(name: str) -> None:
    forward, parts, layers = CASES[name]
    check(Body(forward, **parts).eval(), SHAPES, layers=layers)


@pytest.mark.parametrize("name", CASES)
def test_the_answer_does_not_hang_on_cost_or_validation(name: str) -> None:
    forward, parts, _ = CASES[name]
    check(
        Body(forward, **parts).eval(), SHAPES, batchnorms=None, cost="always", more_work=True,
        validate=False,
    )  # fmt: skip


def test_split_and_put_together_again_is_nothing() -> None:
    model = Body(
        lambda m, x: m.a(torch.cat([*m.a(x).relu().chunk(4, 1)], 1)).relu(), a=conv()
    ).eval()
    optimized = check(model, SHAPES, layers=2, operations=4)
    assert not any(n.target is torch.cat for n in optimized.graph.nodes)  # type: ignore[union-attr]


def test_a_copy_that_is_written_stays_a_copy() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        y = m.a(x).relu()
        z = torch.cat([*y.chunk(2, 1)], 1)
        z += 1
        return z.sigmoid(), y.sigmoid()

    check(Body(forward, a=conv()).eval(), SHAPES, layers=1)


@given(
    widths=st.lists(st.sampled_from([1, 3, 4, 8]), min_size=2, max_size=4),
    kernels=st.lists(st.sampled_from([1, 1, 3, 3, 5]), min_size=4, max_size=4),
    stride=st.integers(1, 2),
    groups=st.sampled_from([1, 1, 2]),
    norm=st.booleans(),
    sources=st.lists(st.sampled_from([0, 0, 1]), min_size=4, max_size=4),
    cost=st.sampled_from(["macs", "always"]),
)
def test_any_concatenation(
    widths: list[int], kernels: list[int], stride: int, groups: int, norm: bool,
    sources: list[int], cost: str,
) -> None:  # fmt: skip
    layers = nn.ModuleList(
        conv(w * groups, k, stride=stride, groups=groups)
        for w, k in zip(widths, kernels, strict=False)
    )

    def forward(m: Any, x: Tensor) -> Tensor:
        values = [x, x.tanh()]
        parts = [layer(values[s]) for layer, s in zip(m.layers, sources, strict=False)]
        return m.norm(torch.cat(parts, 1))

    last = nn.BatchNorm2d(sum(widths) * groups) if norm else nn.Identity()
    model = Body(forward, layers=layers, norm=last).eval()
    check(model, SHAPES, cost=cost, more_work=cost == "always")
