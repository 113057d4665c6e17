"""``python -m fxrep``: the main job, by name, by factory, and what it says when it cannot."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fxrep import __main__ as cli
from fxrep.cli.demo import RepVGG, randomize_batchnorm
from fxrep.cli.models import load

FACTORY = """
import torch
from torch import nn

def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

def with_inputs():
    return nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4)), (torch.randn(2, 2, 9),)

def nonsense():
    return 7
"""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "ROUNDS", 2)
    monkeypatch.setattr(cli, "SECONDS_PER_ROUND", 0.01)


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "their_model.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(tmp_path)
    return "their_model"


def _json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert cli.main([*arguments, "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_the_main_job_merges_every_block(capsys: pytest.CaptureFixture[str]) -> None:
    result = _json(capsys, "--size", "64")
    # 22 blocks; the identity branch of 17 of them is a BatchNorm too.
    removed = result["report"]["totals"]["removed"]
    assert removed["conv2d"] == 22 and removed["batch_norm"] == 61
    assert result["report"]["error"] < 1e-5
    assert result["speedup"] > 0


def test_the_main_job_prints_error_and_speed_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--size", "32", "--batch", "2"]) == 0
    text = capsys.readouterr().out
    assert "2x3x32x32" in text
    assert "largest error against float64" in text
    assert "speed-up" in text
    assert "stages.0.0" in text


def test_a_factory_of_the_user(capsys: pytest.CaptureFixture[str], factory: str) -> None:
    result = _json(capsys, f"{factory}:net", "--size", "16")
    assert result["report"]["totals"]["removed"] == {"batch_norm": 1}
    assert result["inputs"] == "1x3x16x16"


def test_a_factory_may_bring_its_inputs(capsys: pytest.CaptureFixture[str], factory: str) -> None:
    result = _json(capsys, f"{factory}:with_inputs")
    assert result["inputs"] == "2x2x9"


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "library"),
    [("timm:resnet10t", "timm"), ("torchvision:resnet18", "torchvision")],
)
def test_models_by_name(capsys: pytest.CaptureFixture[str], name: str, library: str) -> None:
    pytest.importorskip(library)
    result = _json(capsys, name, "--size", "64")
    assert result["report"]["totals"]["removed"]["batch_norm"] > 0
    assert result["report"]["error"] < 1e-5


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet50", "timm:NAME, torchvision:NAME or package.module:factory"),
        ("timm:", "is no model name"),
        ("no_such_package_:make", "cannot be imported"),
        ("torch.nn:NoSuchThing", "cannot be imported"),
        ("their_model:nonsense", "returned int, which is no module"),
    ],
)
@pytest.mark.usefixtures("factory")
def test_bad_names(capsys: pytest.CaptureFixture[str], name: str, words: str) -> None:
    assert cli.main([name]) == 1
    assert words in capsys.readouterr().err


@pytest.mark.real
@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_a_model_the_library_lacks(capsys: pytest.CaptureFixture[str], library: str) -> None:
    pytest.importorskip(library)
    assert cli.main([f"{library}:mobileone_s99"]) == 1
    assert "has no such model" in capsys.readouterr().err


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_a_library_that_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    assert cli.main([f"{library}:resnet18"]) == 1
    assert f"python -m pip install {library}" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--size", "--batch", "--threads"])
def test_numbers_must_be_positive(option: str) -> None:
    with pytest.raises(SystemExit):
        cli.main([option, "0"])


def test_it_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fxrep", "--help"], capture_output=True, text=True, check=True
    )
    assert "python -m fxrep" in done.stdout


def test_the_built_in_network_is_repvgg_a0() -> None:
    model = RepVGG()
    assert sum(p.numel() for p in model.parameters()) == 9_108_968  # 9.11 M when trained
    assert sum(isinstance(m, nn.Conv2d) for m in model.modules()) == 44
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == 61


def test_randomized_batchnorms_are_not_trivial() -> None:
    model = load().model
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        assert norm.running_var is not None and norm.running_mean is not None
        assert norm.running_var.min() >= 0.5 and norm.running_var.max() <= 1.5
        assert norm.running_mean.std() > 0.05
        assert norm.weight.std() > 0.05 and norm.bias.std() > 0.05


def test_randomizing_repeats() -> None:
    first, second = nn.BatchNorm1d(5), nn.BatchNorm1d(5)
    randomize_batchnorm(first)
    randomize_batchnorm(second)
    assert torch.equal(first.weight, second.weight)
