"""Which part of fxrep may import which: the folders are floors, and no arrow goes up."""

from __future__ import annotations

import pytest

from support.imports import PACKAGE, between_modules, floors, imported, modules, part

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
TOP = len(FLOORS)
# And of the floors below, these only.
ONLY = {
    "algebra": {"refusal"},
    "ops": {"errors", "words"},
    "capture": {"errors", "report", "words", "ops"},
    "passes": {"algebra", "analysis", "reading", "planning", "refusal", "ops", "words"},
}
# They name what is public, and what old pickles look for.
EXEMPT = {"__init__", "__main__", "module", "signature"}


def violations(importer: str, source: str) -> list[str]:
    """The imports of a file of this part that go up, sideways, or where the part must not look."""
    return [
        other
        for other in map(part, imported(source))
        if other != importer
        and (FLOOR.get(other, TOP) >= FLOOR[importer] or other not in ONLY.get(importer, FLOOR))
    ]


FILES = {name: path for name, path in modules(PACKAGE).items() if name not in EXEMPT}


@pytest.mark.parametrize("module", FILES)
def test_no_import_goes_up(module: str) -> None:
    assert part(module) in FLOOR, f"{part(module)} has no floor"
    assert not violations(part(module), FILES[module].read_text())


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert all(len(group) == 1 for group in floors(between_modules(PACKAGE)))


def test_a_circle_is_found_and_has_a_floor() -> None:
    found = floors({"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"a", "d"}})
    assert found == {frozenset("d"): 1, frozenset("abc"): 2, frozenset("e"): 3}


def test_passes_do_not_import_each_other() -> None:
    for path in (PACKAGE / "passes").glob("*.py"):
        if path.stem != "__init__":
            assert "fxrep.passes" not in path.read_text()


@pytest.mark.parametrize(
    "importer, source",
    [
        ("algebra", "from fxrep.reading.view import View"),
        ("algebra", "from fxrep.errors import FxrepError"),
        ("ops", "import fxrep.reading.view"),
        ("capture", "from fxrep.algebra.maps import Map"),
        ("planning", "def f():\n    from fxrep.rewriting.editor import Editor"),
        ("passes", "from fxrep.pipeline import optimize"),
        ("rewriting", "from fxrep import pipeline"),
        ("rewriting", "import fxrep"),
        ("pipeline", "from fxrep.torch_compile.backend import compile_graph"),
    ],
)
def test_a_planted_violation_is_found(importer: str, source: str) -> None:
    assert violations(importer, source)
