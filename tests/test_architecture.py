"""Which part of fxrep may import which: the folders are floors, and no arrow goes up."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "fxrep"

# A folder may import what stands on a line above its own, and itself.
FLOORS = (
    {"errors", "refusal", "words"},
    {"algebra", "ops", "report"},
    {"capture"},
    {"analysis"},
    {"reading"},
    {"planning"},
    {"passes", "rewriting", "registry"},
    {"pipeline"},
    {"torch_compile", "cli"},
)
FLOOR = {part: floor for floor, parts in enumerate(FLOORS) for part in parts}
# And of the floors below, these only.
ONLY = {
    "algebra": {"refusal"},
    "ops": {"words"},
    "capture": {"errors", "report", "words", "ops"},
    "passes": {"algebra", "analysis", "reading", "planning", "refusal", "ops", "words"},
}
# They name what is public, and what old pickles look for.
EXEMPT = {"__init__", "__main__", "module", "signature"}


def imports(source: str) -> Iterator[str]:
    """The parts of fxrep that code imports when it runs: not for the type checker alone."""
    tree = ast.parse(source)
    checked = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in checked:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "fxrep":
            _, _, rest = str(node.module).partition(".")
            yield from [rest.partition(".")[0]] if rest else (alias.name for alias in node.names)
        if isinstance(node, ast.Import):
            for alias in node.names:
                top, _, rest = alias.name.partition(".")
                if top == "fxrep" and rest:
                    yield rest.partition(".")[0]


def violations(part: str, source: str) -> list[str]:
    """The imports of a file of this part that go up, sideways, or where the part must not look."""
    return [
        other
        for other in imports(source)
        if other != part
        and (
            FLOOR[other] >= FLOOR[part]
            or (part in ONLY and other not in ONLY[part])
            or (part == "passes" and other == "passes")
        )
    ]


FILES = [
    path
    for path in sorted({*ROOT.rglob("*.py"), *(ROOT / "passes").glob("*.py")})
    if path.stem not in EXEMPT
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_import_goes_up(path: Path) -> None:
    part = path.relative_to(ROOT).with_suffix("").parts[0]
    assert part in FLOOR, f"{part} has no floor"
    assert not violations(part, path.read_text())


def test_passes_do_not_import_each_other() -> None:
    for path in (ROOT / "passes").glob("*.py"):
        if path.stem != "__init__":
            assert "fxrep.passes" not in path.read_text()


@pytest.mark.parametrize(
    "part, source",
    [
        ("algebra", "from fxrep.reading.view import View"),
        ("algebra", "from fxrep.errors import FxrepError"),
        ("ops", "import fxrep.reading.view"),
        ("capture", "from fxrep.algebra.maps import Map"),
        ("planning", "def f():\n    from fxrep.rewriting.editor import Editor"),
        ("passes", "from fxrep.pipeline import optimize"),
        ("rewriting", "from fxrep import pipeline"),
        ("pipeline", "from fxrep.torch_compile.backend import compile_graph"),
    ],
)
def test_a_planted_violation_is_found(part: str, source: str) -> None:
    assert violations(part, source)
