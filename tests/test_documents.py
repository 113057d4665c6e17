"""The architecture page does what it says."""

from __future__ import annotations

import doctest
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_architecture_page_runs() -> None:
    options = doctest.ELLIPSIS
    found = doctest.testfile(str(ROOT / "ARCHITECTURE.md"), False, optionflags=options)
    assert found.attempted > 15 and not found.failed


def test_every_folder_is_on_the_page() -> None:
    page = (ROOT / "ARCHITECTURE.md").read_text()
    folders = [path.parent.name for path in (ROOT / "fxrep").glob("*/__init__.py")]
    assert folders and all(f"`{name}/`" in page for name in folders)
