"""What a package imports of itself: `python tests/support/imports.py [PATH]` prints the picture.

PATH is the folder of a package, by default that of fxrep. A file stands one floor above the highest
file that it imports; files that import each other in a circle share a floor. A part is a folder of
the package, or a file beside the folders. Imports that only the type checker sees do not count.
"""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "fxrep"

# What each module, or each part, imports.
Arrows = dict[str, set[str]]


def modules(package: Path) -> dict[str, Path]:
    """The files of a package, by the names of their modules without that of the package."""
    found = {}
    for folder, _, names in os.walk(package, followlinks=True):  # fxrep/passes is a link
        for path in (Path(folder, name) for name in names if name.endswith(".py")):
            *above, name = path.relative_to(package).with_suffix("").parts
            found[".".join(above if above and name == "__init__" else [*above, name])] = path
    return dict(sorted(found.items()))


def imported(source: str, package: str = "fxrep") -> Iterator[str]:
    """The names below a package that code imports, be they modules or something in a module."""
    tree = ast.parse(source)
    guards = [n for n in ast.walk(tree) if isinstance(n, ast.If)]
    skipped = {n for g in guards if ast.unparse(g.test) == "TYPE_CHECKING" for n in ast.walk(g)}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for top, _, rest in (name.partition(".") for name in names):
            if top == package and node not in skipped:
                yield rest or "__init__"


def part(module: str) -> str:
    """The folder that a module lies in, or the module itself if it lies beside the folders."""
    return module.partition(".")[0]


def between_modules(package: Path) -> Arrows:
    """What each module of a package imports, by its own statements, wherever they stand."""
    files, arrows = modules(package), Arrows()
    for module, path in files.items():
        arrows[module] = set()
        for target in imported(path.read_text(), package.name):
            while target not in files:  # a name in a module, or in the package itself
                target = target.rpartition(".")[0] or "__init__"
            arrows[module] |= {target} - {module}
    return arrows


def between_parts(arrows: Arrows) -> Arrows:
    """The same of the parts of a package."""
    parts: Arrows = {part(module): set() for module in arrows}
    for module, targets in arrows.items():
        parts[part(module)] |= {part(target) for target in targets} - {part(module)}
    return parts


def floors(arrows: Arrows) -> dict[frozenset[str], int]:
    """The floor of each circle and of each module or part outside every circle; 1 is the lowest."""
    group = {name: frozenset([name]) for name in arrows}
    while True:
        below = {g: {group[t] for name in g for t in arrows[name]} - {g} for g in group.values()}
        try:
            order = list(TopologicalSorter(below).static_order())
            break
        except CycleError as error:
            circle = frozenset[str]().union(*error.args[1])
            group |= dict.fromkeys(circle, circle)
    result: dict[frozenset[str], int] = {}
    for each in order:
        result[each] = 1 + max((result[g] for g in below[each]), default=0)
    return result


def picture(package: Path) -> str:
    """Floors, arrows, circles and lines: what there is to compare of two versions of a package."""
    lines = {name: len(path.read_text().splitlines()) for name, path in modules(package).items()}
    files = between_modules(package)
    parts = between_parts(files)
    text = [f"{package.name}: {len(lines)} files, {sum(lines.values())} lines"]
    for kind, arrows in (("files", files), ("parts", parts)):
        standing = floors(arrows)
        circles = [", ".join(sorted(group)) for group in standing if len(group) > 1]
        count = sum(map(len, arrows.values()))
        text += [f"{kind}: {max(standing.values())} floors, {count} arrows, {len(circles)} circles"]
        text += [f"  circle: {circle}" for circle in circles]
    text += ["floor files  lines  part <- what it imports"]
    for floor, name in sorted((f, name) for group, f in floors(parts).items() for name in group):
        sizes = [lines[module] for module in lines if part(module) == name]
        below = " ".join(sorted(parts[name]))
        text += [f"{floor:5} {len(sizes):5} {sum(sizes):6}  {name} <- {below}"]
    return "\n".join(text)


if __name__ == "__main__":
    print(picture(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else PACKAGE))
