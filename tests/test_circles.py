"""No circle of imports, between files or between folders: at module level, inside functions, for
typing, or by name at run time."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("pilimit_lib", "pilimit_orig", "experiments")
# The lines that may reach a module by its name: the module of settings is its own namespace
# (`GPA.pc.set_...` assigns attributes of the module, as the seed prints); the console command loads
# what was typed, so that its help is there without torch.
BY_NAME = {"pilimit_lib.dendrites.compat.GPA": 1, "experiments.console": 2}


def module_of(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str, module: str, is_package: bool, known: set[str]) -> set[str]:
    """The modules among `known` that a file imports, wherever in it the import stands."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                found.add(full if full in known else base)
    return {name for name in found if name in known and name != module}


def hidden(source: str) -> list[int]:
    """Lines that reach a module by its name, which a walk over imports can't see through."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if (node.value.id, node.attr) in {("importlib", "import_module"), ("sys", "modules")}:
                found.append(node.lineno)
        elif isinstance(node, ast.Name) and node.id == "__import__":
            found.append(node.lineno)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = {alias.name for alias in node.names}
            if (node.module, *(names & {"import_module", "modules"})) in {
                ("importlib", "import_module"),
                ("sys", "modules"),
            }:
                found.append(node.lineno)
    return found


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected parts of more than one node, each sorted: within one, every node
    imports every other in the end (Tarjan, 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(graph[node]):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            part = [stack.pop()]
            while part[-1] != node:
                part.append(stack.pop())
            if len(part) > 1:
                found.append(sorted(part))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return sorted(found)


def rooms(graph: dict[str, set[str]], folder: str) -> dict[str, set[str]]:
    """The graph between what lies directly in `folder`: files, and folders as one node each."""

    def room(name: str) -> str | None:
        return name[len(folder) + 1 :].split(".")[0] if name.startswith(folder + ".") else None

    found: dict[str, set[str]] = {}
    for node, targets in graph.items():
        here = room(node)
        if here is not None:
            there = {room(target) for target in targets} - {None, here}
            found.setdefault(here, set()).update(name for name in there if name is not None)
    return found


def graph_of(root: Path) -> dict[str, set[str]]:
    """Who imports whom. An `__init__` re-exports and is no node: importing a package stands for
    importing the modules that its face takes names from."""
    paths = {
        module_of(path, root): path
        for package in PACKAGES
        for path in sorted((root / package).rglob("*.py"))
    }
    faces = {name for name, path in paths.items() if path.name == "__init__.py"}
    known = set(paths)
    direct = {
        name: imports(path.read_text(encoding="utf-8"), name, name in faces, known)
        for name, path in paths.items()
    }

    def behind(name: str, seen: frozenset[str] = frozenset()) -> set[str]:
        if name not in faces:
            return {name}
        if name in seen:
            return set()
        return {m for target in direct[name] for m in behind(target, seen | {name})}

    return {
        name: {module for target in direct[name] for module in behind(target)} - {name}
        for name in known - faces
    }


def circles_in(root: Path) -> dict[str, list[list[str]]]:
    """Every circle: of files, and for each folder of what lies in it."""
    graph = graph_of(root)
    folders = {
        name.rsplit(".", count)[0] for name in graph for count in range(1, name.count(".") + 1)
    }
    found = {"files": circles(graph)}
    found |= {folder: circles(rooms(graph, folder)) for folder in sorted(folders)}
    return {where: parts for where, parts in found.items() if parts}


def test_there_is_no_circle():
    assert circles_in(ROOT) == {}


@pytest.mark.parametrize(
    "path",
    [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))],
    ids=lambda path: module_of(path, ROOT),
)
def test_no_module_is_reached_by_its_name(path):
    lines = hidden(path.read_text(encoding="utf-8"))
    assert len(lines) <= BY_NAME.get(module_of(path, ROOT), 0), lines


@pytest.mark.parametrize(
    "path",
    [path for package in PACKAGES for path in sorted((ROOT / package).rglob("__init__.py"))],
    ids=lambda path: module_of(path, ROOT),
)
def test_the_face_of_a_package_re_exports_and_defines_nothing(path):
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        names = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        assert text or names or isinstance(node, (ast.Import, ast.ImportFrom)), node.lineno


PLANTED = {
    "at module level": {"a.py": "from . import b", "b.py": "from .a import x"},
    "inside a function": {"a.py": "from . import b", "b.py": "def f():\n    from .a import x"},
    "for typing": {
        "a.py": "from .b import y",
        "b.py": "if TYPE_CHECKING:\n    from pilimit_lib.a import x",
    },
    "of three": {"a.py": "from . import b", "b.py": "from . import c", "c.py": "from . import a"},
    "through a face": {
        "a.py": "from .p import y",
        "p/__init__.py": "from .b import y",
        "p/b.py": "from ..a import x",
    },
}


def planted(root: Path, files: dict[str, str]) -> Path:
    for package in PACKAGES:
        (root / package).mkdir()
        (root / package / "__init__.py").write_text("")
    for name, source in files.items():
        path = root / "pilimit_lib" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(source)
    return root


@pytest.mark.parametrize("files", PLANTED.values(), ids=PLANTED)
def test_a_planted_circle_of_files_is_found(files, tmp_path):
    assert circles_in(planted(tmp_path, files))["files"]


def test_a_planted_circle_of_folders_is_found(tmp_path):
    """No file imports itself in the end here, but each folder needs the other."""
    files = {
        "p/__init__.py": "",
        "q/__init__.py": "",
        "p/a.py": "from ..q.b import x",
        "p/c.py": "",
        "q/b.py": "",
        "q/d.py": "from ..p import c",
    }
    assert circles_in(planted(tmp_path, files)) == {"pilimit_lib": [["p", "q"]]}


def test_what_has_no_circle_has_none(tmp_path):
    files = {"a.py": "from .p import y", "p/__init__.py": "from .b import y", "p/b.py": "import os"}
    assert circles_in(planted(tmp_path, files)) == {}


@pytest.mark.parametrize(
    "source",
    [
        "import importlib\nimportlib.import_module('pilimit_lib.' + name)",
        "import sys\nsys.modules[__name__].x",
        "from sys import modules",
        "from importlib import import_module",
        "def f():\n    return __import__('pilimit_lib')",
    ],
)
def test_a_module_reached_by_its_name_is_found(source):
    assert hidden(source)
