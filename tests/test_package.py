"""The package as it is installed: one top-level name, its parts, its version, its link."""

from __future__ import annotations

import configparser
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import fxrep

ROOT = Path(__file__).parent.parent
PUBLIC = {
    "optimize", "report", "refresh", "Report", "Rewrite", "Skip", "default_passes", "FxrepError",
    "Pass", "Plan", "Fold", "Joint", "Drop", "Same", "Refusal", "CostModel", "Work", "PassError",
}  # fmt: skip


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The names inside a wheel built from a copy, so that the clone stays free of build folders."""
    clone = tmp_path_factory.mktemp("clone")
    for name in ("fxrep", "passes"):
        shutil.copytree(
            ROOT / name, clone / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", str(clone / "dist"), str(clone)], check=True)
    (built,) = (clone / "dist").glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        return archive.namelist()


def test_wheel_has_one_top_level_package(wheel: list[str]) -> None:
    top = {name.partition("/")[0] for name in wheel}
    assert {name for name in top if not name.endswith(".dist-info")} == {"fxrep"}


def test_wheel_holds_every_module_once(wheel: list[str]) -> None:
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fxrep").rglob("*.py")}
    expected |= {f"fxrep/passes/{path.name}" for path in (ROOT / "passes").glob("*.py")}
    expected.add("fxrep/py.typed")
    found = [name for name in wheel if ".dist-info/" not in name]
    assert sorted(found) == sorted(expected)


def test_wheel_carries_the_licence(wheel: list[str]) -> None:
    assert any(name.endswith("/LICENSE") for name in wheel)


def test_passes_is_a_link_for_uninstalled_clones() -> None:
    link = ROOT / "fxrep" / "passes"
    assert link.is_symlink()
    assert link.readlink() == Path("../passes")


def test_a_bare_clone_imports(tmp_path: Path) -> None:
    code = "import sys, fxrep, fxrep.passes as p; print(p.__name__, 'passes' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["fxrep.passes", "False"]


def test_import_needs_torch_and_tabulate_only() -> None:
    code = (
        "import sys, fxrep; print([m for m in ('timm', 'torchvision', 'numpy.testing', 'pytest')"
        " if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_version_has_one_source(wheel: list[str]) -> None:
    assert f"fxrep-{fxrep.__version__}.dist-info/METADATA" in wheel
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" not in project


def test_setup_cfg_only_says_where_the_code_is() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert set(config.sections()) == {"options", "options.package_data"}
    assert set(config["options"]) == {"packages", "package_dir"}


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_names(name: str) -> None:
    assert hasattr(fxrep, name)


def test_errors_are_one_family() -> None:
    errors = [getattr(fxrep, name) for name in dir(fxrep) if name.endswith("Error")]
    assert len(errors) >= 7
    assert all(issubclass(error, fxrep.FxrepError) for error in errors)
