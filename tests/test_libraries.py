"""The benchmark of other libraries: its arithmetic, what it says of failures, one real row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import libraries
import pytest
import torch
from _captured import captured
from _comparison import steady_reference
from _libraries import LIBRARIES
from _libraries.case import Case, Library
from torch import nn

import fxrep


class Asks(nn.Module):
    """A forward that stays Python, above a block that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x) if x.sum() > -1e9 else x


def _small() -> Case:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    return Case(model, (torch.randn(1, 3, 8, 8),), (torch.randn(2, 3, 9, 9),))


def _fails() -> Case:
    raise RuntimeError("it cannot")


@pytest.fixture
def pytest_as_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that is installed wherever tests run, and one that is nowhere."""
    known = {
        "pytest": Library("pytest", {"small": _small, "fails": _fails}),
        "no-such-library": Library("no-such-library", {"small": _small}),
    }
    monkeypatch.setattr(libraries, "LIBRARIES", known)
    # A process of its own would know nothing of these.
    monkeypatch.setattr(libraries, "_in_own_process", lambda *name: libraries.measure(*name[:2]))


def test_there_are_many_models_of_many_libraries() -> None:
    assert len(LIBRARIES) >= 10
    assert sum(len(library.cases) for library in LIBRARIES.values()) >= 60
    for name in libraries.QUICK:
        library, case = name.split(":")
        assert case in LIBRARIES[library].cases


def test_a_row(pytest_as_library: None) -> None:
    row = libraries.measure("pytest", "small")
    assert row["before"]["batch_norms"] == row["before"]["directly_after_conv"] == 1
    for way in libraries.WAYS:
        result = row[way]
        assert result["after"]["batch_norms"] == result["other_batch_norms"] == 0
        assert result["captured"] == "whole graph"
        assert result["error"] < 1e-6 and result["error64"] < 1e-14
    assert not libraries._faulty(row)
    json.dumps(row)


def test_a_run(
    pytest_as_library: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    tmp_path: Any,
) -> None:  # fmt: skip
    output = tmp_path / "libraries.json"
    monkeypatch.setattr("sys.argv", ["libraries.py", "--output", str(output)])
    assert libraries.main() == 0
    said = capsys.readouterr().out
    assert "no-such-library is not installed: python -m pip install no-such-library" in said
    assert "pytest:fails: not measured, build: RuntimeError: it cannot" in said
    found = json.loads(output.read_text())
    assert found["libraries"] == {"pytest": pytest.__version__}
    assert found["totals"]["all"]["batch_norms"] == "1 -> 0 / 0"
    assert found["totals"]["all"]["do not run here"] == 1


@pytest.mark.parametrize("raises", [True, False])
def test_wrong_values_and_exceptions_are_faults(
    raises: bool, pytest_as_library: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def optimize(model: nn.Module, example: object = None) -> nn.Module:
        if raises:
            raise ValueError("no")
        result = real(model)
        return result if example is None else nn.Sequential(result, nn.Softplus())

    real = fxrep.optimize
    monkeypatch.setattr(fxrep, "optimize", optimize)
    monkeypatch.setattr(fxrep, "report", lambda _: fxrep.Report((), ()))
    row = libraries.measure("pytest", "small")
    assert libraries._faulty(row)
    assert ("optimize: ValueError: no" if raises else "WRONG") in libraries.text([row])


def test_a_process_that_dies_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "false")
    row = libraries._in_own_process("monai", "UNet", None)
    assert row["failed"].startswith("the process ended with 1")


def test_how_a_model_was_captured() -> None:
    asks = fxrep.optimize(Asks().eval())
    assert captured(asks) == "1 island"
    assert captured(fxrep.optimize(nn.Sequential(nn.Conv2d(3, 4, 1)).eval())) == "whole graph"
    assert captured(fxrep.optimize(nn.Sequential(Asks(), Asks()).eval())) == "graph around 2"
    assert captured(Asks()) == "nothing"


def test_a_result_without_tensors_is_refused() -> None:
    class Nothing(nn.Module):
        def forward(self, x: torch.Tensor) -> str:
            return "no tensor"

    with pytest.raises(ValueError, match="no tensor to compare"):
        steady_reference(Nothing(), lambda m, x: m(x), (torch.ones(1),), {})


def test_the_readme_says_what_was_measured() -> None:
    home = Path(libraries.__file__).parent
    found = json.loads((home / "results" / "libraries.json").read_text())
    readme = (home.parent / "README.md").read_text()
    table = readme.partition("<!-- library totals -->")[2].partition("\n\nWhat stays")[0]
    rows = [[cell.strip() for cell in line.split("|")] for line in table.splitlines()[5:]]
    by_name = {row[1].split()[0].rstrip(","): row[2:5] for row in rows}
    totals = found["totals"] | {"segmentation_models_pytorch": None}
    totals["segmentation_models_pytorch"] = totals.pop("segmentation-models-pytorch")
    for name, cells in by_name.items():
        if name == "efficientnet-pytorch":
            continue  # a row of three libraries
        total = totals[name]
        norms = total["batch_norms"].replace(" ->", "", 1).split()
        norms = [f"{int(each):,}" if each.isdigit() else each for each in norms]
        assert cells == [
            str(total["models"]),
            f"{norms[0]} -> {' '.join(norms[1:])}",
            f"{total['all folded']} of {total['models with BatchNorms']}",
        ]
    assert found["totals"]["all"]["faulty"] == 0
    assert f"{len(found['rows'])} models of {len(found['libraries'])} libraries" in table
