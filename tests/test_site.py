"""The documentation site holds every page: each Markdown file has its place on it, and the menu
names nothing that is not there. (`.ci/docs` builds it, where a warning is an error.)"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NO_PAGES = {"experiments/imagenet/data/README.md"}  # where to put which files


def taken_in() -> dict[str, str]:
    """The pages beside the code, and where they are on the site: PAGES of the site's hook."""
    for node in ast.parse((ROOT / "docs" / "_pages.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "PAGES":
            return ast.literal_eval(node.value)
    raise AssertionError("docs/_pages.py has no PAGES")


def menu(entries: list) -> list[str]:
    """The pages that a menu names, in their order."""
    found = []
    for entry in entries:
        for value in entry.values():
            found += menu(value) if isinstance(value, list) else [value]
    return found


def test_every_page_is_in_the_menu_once():
    yaml = pytest.importorskip("yaml")
    named = menu(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    own = {str(p.relative_to(ROOT / "docs")) for p in (ROOT / "docs").rglob("*.md")}
    assert sorted(named) == sorted(own | set(taken_in().values()))


def test_every_markdown_file_has_a_place():
    folders = ("experiments", "pilimit_lib", "pilimit_orig")
    found = {str(p.relative_to(ROOT)) for f in folders for p in (ROOT / f).rglob("*.md")}
    found |= {path.name for path in ROOT.glob("*.md")}
    assert found - NO_PAGES == set(taken_in())
