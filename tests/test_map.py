"""The map in pilimit_lib/README.md shows the library as it stands: each file once, at its place."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] / "pilimit_lib"
LINE = re.compile(r"(?P<indent> *)(?P<name>[\w.]+/?)(?:  .*)?")
FILES_A_FOLDER = 15  # more than that is a drawer


def mapped(text: str) -> list[str]:
    """The paths in the first block of a map: folders end in "/", what lies in them is indented."""
    block = text.split("```")[1].split("\n", 1)[1]
    folders: list[tuple[int, str]] = []
    found = []
    for line in filter(str.strip, block.splitlines()):
        match = LINE.fullmatch(line)
        assert match, f"not a line of the map: {line!r}"
        indent, name = len(match["indent"]), match["name"]
        while folders and folders[-1][0] >= indent:
            folders.pop()
        path = "".join(folder for _, folder in folders) + name
        if name.endswith("/"):
            folders.append((indent, name))
        else:
            found.append(path)
    return found


def standing(root: Path) -> list[str]:
    """The files of the library. `__init__.py` re-exports and is not shown."""
    return sorted(
        str(path.relative_to(root))
        for path in root.rglob("*")
        if path.suffix in (".py", ".cpp") and path.name != "__init__.py"
    )


def test_the_map_is_the_tree():
    found = mapped((ROOT / "README.md").read_text(encoding="utf-8"))
    assert sorted(found) == standing(ROOT)


def test_no_folder_is_a_drawer():
    for folder in [ROOT, *(path for path in ROOT.rglob("*") if path.is_dir())]:
        files = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(files) <= FILES_A_FOLDER, folder


def test_a_file_that_is_not_on_the_map_would_be_found():
    lines = [
        "core/   what is shared",
        "  axis.py   a dimension",
        "inf/",
        "  rows/",
        "    a.py",
        "b.py",
    ]
    assert mapped("x\n```\n" + "\n".join(lines) + "\n```\n") == [
        "core/axis.py",
        "inf/rows/a.py",
        "b.py",
    ]
