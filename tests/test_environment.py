"""The files for conda say the same as pyproject.toml; the version is told in one place; CI runs the
two commands of the README."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Where conda-forge calls a package otherwise.
CONDA_NAMES = {"torch": "pytorch", "tables": "pytables", "tensorboardX": "tensorboardx"}
ONLY_PIP = {"cox", "torch-pruning"}  # packages that conda users get from PyPI
TOOLS = ("test", "docs")  # extras of those who change the library: environment-dev.yml
# extras whose pins would hold everything else back: for an environment of their own
APART = {"kernels"}


def requirements(tools: bool) -> dict[str, str]:
    """Name to version bound: of the package and its extras for users, or of the tools' extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = [] if tools else list(project["dependencies"])
    for name, extra in project["optional-dependencies"].items():
        listed += [
            requirement
            for requirement in extra
            if name not in APART
            and (name in TOOLS) == tools
            and not requirement.startswith("pilimit[")
        ]
    found = {}
    for requirement in listed:
        name, bound = re.fullmatch(r"([A-Za-z0-9_.-]+?)((?:[<>=!~].*)?)", requirement).groups()
        assert found.setdefault(name, bound) == bound, (
            f"{name} is asked for as {found[name]} and as {bound}"
        )
    return found


def expected_lines(tools: bool) -> tuple[list[str], list[str]]:
    """(entries for conda, entries for pip below it)."""
    wanted = requirements(tools)
    lines = [
        f"{CONDA_NAMES.get(name, name)}{bound}"
        for name, bound in sorted(wanted.items())
        if name not in ONLY_PIP
    ]
    return lines, [f"{name}{bound}" for name, bound in sorted(wanted.items()) if name in ONLY_PIP]


def test_conda_users_get_the_same_packages():
    yaml = pytest.importorskip("yaml")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    conda, pip = expected_lines(tools=False)
    listed = [entry for entry in dependencies if isinstance(entry, str)]
    assert listed[0] == f"python{project['requires-python']}"
    assert sorted(listed[1:]) == sorted([*conda, "pip"])
    assert [entry for entry in dependencies if isinstance(entry, dict)] == [{"pip": pip}]


def test_tools_are_apart():
    yaml = pytest.importorskip("yaml")
    dependencies = yaml.safe_load((ROOT / "environment-dev.yml").read_text())["dependencies"]
    conda, pip = expected_lines(tools=True)
    assert sorted(dependencies) == sorted(conda) and not pip


def test_the_version_is_told_in_one_place():
    """CITATION.cff and the changelog repeat it for their readers; nothing else does."""
    import pilimit_lib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {
        "attr": "pilimit_lib.version.__version__"
    }
    said = re.search(r"^version: (.*)", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1]
    heading = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    assert said == heading == pilimit_lib.__version__


def test_the_description_of_the_package_shows_nothing_that_lies_in_the_source_only(monkeypatch):
    import setuptools

    monkeypatch.setattr(setuptools, "setup", lambda **said: None)
    found: dict = {}
    exec((ROOT / "setup.py").read_text(), found)
    text = found["outside"]("![a](b.png)\n\n[x](y/z.md), [w](https://w.org), [v](#v)")
    assert text == "x (`y/z.md`), [w](https://w.org), [v](#v)"
    assert "pilimit_experiments.cifar10" in found["packages"]()
    assert not any(name.split(".")[0] in ("experiments", "tests") for name in found["packages"]())


def test_the_readme_holds_the_two_commands_that_ci_runs():
    readme, script = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    setup = re.search(r"\.venv/bin/pip install [^&]*[^& ]", readme).group()
    tests = re.search(r"^\.venv/bin/python -m pytest.*", readme, re.MULTILINE).group()
    assert (
        setup == '.venv/bin/pip install -e ".[test]"' and tests == ".venv/bin/python -m pytest -n 2"
    )
    assert r"\.venv/bin/pip install" in script and r"\.venv/bin/python -m pytest" in script


def test_every_dependency_is_justified():
    for line in (ROOT / "pyproject.toml").read_text().splitlines():
        if re.match(r'    "[a-z]', line) and not line.strip().startswith('"E'):
            assert re.search(r"#\s*\S+ \S+ \S+", line), f"say why in one line: {line.strip()}"
