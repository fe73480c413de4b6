"""What the pages print works: their Python blocks run as they stand, the files they link to exist,
and so do their commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from experiments.console import MEANINGS

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md"]  # whose block has a test that looks at what it prints
PAGES += sorted(
    str(path.relative_to(ROOT))
    for folder in ("docs", "experiments", "pilimit_lib", "pilimit_orig", "notebooks")
    for path in (ROOT / folder).glob("**/*.md")
)
PAGES += ["CHANGELOG.md", "CONTRIBUTING.md"]
# pages whose blocks a test of their own runs, and looks at what comes of them
OWN_TESTS = {f"pilimit_lib/{room}/README.md" for room in ("dendrites", "lab", "sigprop")}
BLOCK = re.compile(r"(?:<!-- not run: (?P<why>[^>]+) -->\n)?```python\n(?P<code>.*?)```", re.DOTALL)
WORDS = 700  # of the README: three minutes


def blocks(page: str) -> list[str]:
    """The Python of a page that is to run; what is not says why in a comment before it."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = list(BLOCK.finditer(text))
    assert len(found) == text.count("```python\n"), f"{page} has a block that does not end"
    return [match["code"] for match in found if match["why"] is None]


@pytest.mark.parametrize("page", [page for page in PAGES[1:] if blocks(page)])
def test_python_blocks_run(page, tmp_path, monkeypatch):
    """Block after block in one session, as a reader would."""
    if page in OWN_TESTS:
        test = ROOT / "tests" / Path(page).parent.name / "test_readme.py"
        assert "exec(" in test.read_text(encoding="utf-8")
        return
    monkeypatch.chdir(tmp_path)
    session: dict = {"__name__": "readme"}
    for block in blocks(page):
        try:
            exec(compile(block, page, "exec"), session)
        except ModuleNotFoundError as error:
            if error.name in ("safetensors", "huggingface_hub", "gpytorch"):
                pytest.skip(f"{page} needs {error.name}")
            raise


def test_the_readme_says_what_its_block_prints(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (block,) = blocks("README.md")
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    assert "[850, 850, 850]" in capsys.readouterr().out


def test_the_readme_is_read_in_three_minutes():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) < WORDS


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text()):
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), (
                f"{page} links to {target}, which is not there"
            )


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for module in re.findall(
        r"python -m ((?:experiments|tests|pilimit_orig|pilimit_lib)[\w.]*\w)", text
    ):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
    for path in re.findall(r"python (\w[\w/]*\.py)", text):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"^\s*pilimit ([a-z-]+)", text, re.MULTILINE):
        assert name in MEANINGS, f"{page} says pilimit {name}"
