"""What the README prints works: its Python blocks run as they stand, and the files it links to
exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "pilimit_orig/README.md",
    "experiments/bench/RESULTS.md",
    "experiments/understanding/README.md",
    *(f"experiments/cifar10/{page}.md" for page in ("MOMENTS", "KERNELS")),
    *(f"pilimit_lib/{room}README.md" for room in ("", "inf/", "dendrites/", "lab/", "sigprop/")),
]


def test_python_blocks_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    assert "[850, 850, 850]" in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text()):
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), (
                f"{page} links to {target}, which is not there"
            )


def test_the_modules_that_the_readme_runs_exist():
    readme = (ROOT / "README.md").read_text()
    for module in re.findall(
        r"python -m ((?:experiments|tests|pilimit_orig|pilimit_lib)[\w.]*)", readme
    ):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
