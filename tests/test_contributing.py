"""The example pass in CONTRIBUTING.md works as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxrep
from support.check import check

FILES = (folder / "CONTRIBUTING.md" for folder in Path(__file__).parents)
TEXT = next(file for file in FILES if file.exists()).read_text()


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    """The names that the example defines."""
    section = TEXT.partition("## Add a pass")[2].partition("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    return names


def test_the_example_rewrites_its_model(example: dict[str, Any]) -> None:
    report = fxrep.report(example["optimized"])
    assert [(r.pass_name, r.where) for r in report.rewrites] == [("relus", "2")]


@pytest.mark.parametrize("second", [nn.ReLU(), nn.Tanh(), nn.ReLU(inplace=True)])
def test_the_example_is_right(example: dict[str, Any], second: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), second, nn.Conv2d(8, 8, 1)).eval()
    optimized = check(model, ((2, 3, 6, 5), (1, 3, 5, 7)), passes=[example["RELUS"]])
    assert len(fxrep.report(optimized).rewrites) == isinstance(second, nn.ReLU)


class WrittenBetween(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.a(x))
        y[:, :2].sub_(1)
        return self.b(torch.relu(y))


class Gaps(WrittenBetween):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.relu(self.a(x)[:, :2], inplace=True)
        return torch.relu(y).view(-1).tanh()


class Named(WrittenBetween):
    def forward(self, relu: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.a(relu)) * 2


@pytest.mark.parametrize("model", [WrittenBetween(), Gaps(), Named()])
def test_the_driver_keeps_the_example_from_harm(example: dict[str, Any], model: nn.Module) -> None:
    check(model.eval(), ((2, 3, 6, 5), (1, 3, 5, 7)), passes=[example["RELUS"]], rewrites=0)


def test_the_example_uses_every_spelling(example: dict[str, Any]) -> None:
    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(nn.functional.relu((x * 2).relu()))

    check(Model().eval(), ((2, 3), (3, 3)), passes=[example["RELUS"]], rewrites=2, operations=2)


@pytest.mark.parametrize("answer", ["Plan", "Fold", "Joint", "Drop", "Same", "Refusal"])
def test_the_table_names_every_answer(answer: str) -> None:
    assert f"\n| `{answer}" in TEXT and hasattr(fxrep, answer)
