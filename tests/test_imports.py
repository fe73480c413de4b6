"""Who may import whom, checked in the syntax tree of every file, and in fresh processes."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("inf", "dendrites", "sigprop", "lab")
OWN = ("pilimit_lib", "pilimit_orig", "experiments", "tests")

# Of our own packages, what may a file of each place import? The first prefix that fits counts.
ALLOWED = {
    "pilimit_lib.core": ("pilimit_lib.core",),
    **{f"pilimit_lib.{room}": (f"pilimit_lib.{room}", "pilimit_lib.core") for room in ROOMS},
    "pilimit_lib": ("pilimit_lib.core", "pilimit_lib.version"),
    "pilimit_orig": ("pilimit_orig",),
    "experiments": ("experiments", "pilimit_lib", "pilimit_orig"),
    "tests": OWN,
}
# What may the innermost rooms import from outside, beyond the standard library?
OUTSIDE = {"pilimit_lib.core": {"torch"}, "pilimit_orig": {"torch", "numpy"}}


def imported(source: str, module: str, is_package: bool = False) -> list[tuple[int, str]]:
    """(line, full dotted name) of everything that a file imports, at the top or inside
    functions."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = getattr(node.func, "attr", getattr(node.func, "id", None))
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                found.append((node.lineno, node.args[0].value))
    return found


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    place = next((place for place in ALLOWED if within(module, place)), None)
    if place is None:
        return [f"{module} lies outside of the table"]
    found = []
    for line, name in imported(source, module, is_package):
        own = any(within(name, package) for package in OWN)
        if own and not any(within(name, prefix) for prefix in ALLOWED[place]):
            found.append(f"{module}:{line} imports {name}")
        outside = name.split(".")[0]
        if (
            not own
            and place in OUTSIDE
            and outside not in OUTSIDE[place] | set(sys.stdlib_module_names) | {"__future__"}
        ):
            found.append(f"{module}:{line} imports {name}")
    return found


def files() -> list[Path]:
    return sorted(path for package in OWN for path in (ROOT / package).rglob("*.py"))


def module_of(path: Path) -> tuple[str, bool]:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return (".".join(parts[:-1]), True) if parts[-1] == "__init__" else (".".join(parts), False)


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_what_it_may(path):
    assert not violations(path.read_text(encoding="utf-8"), *module_of(path))


def test_every_room_was_walked():
    walked = {module_of(path)[0] for path in files()}
    assert {
        "pilimit_lib.core.axis",
        "pilimit_lib.inf.layers",
        *(f"pilimit_lib.{room}" for room in ROOMS),
    } <= walked


PLANTED = [
    ("pilimit_lib.core.axis", "from pilimit_lib import inf"),
    ("pilimit_lib.core.axis", "from ..lab import Experiment"),
    ("pilimit_lib.core.axis", "import numpy"),
    ("pilimit_lib.core.axis", "def f():\n    from ..inf.layers import InfPiLinearReLU"),
    ("pilimit_lib.inf.layers", "from ..dendrites import GPA"),
    ("pilimit_lib.inf.layers", "from .. import sigprop"),
    ("pilimit_lib.inf.layers", "import pilimit_lib.lab.data.ledger as ledger"),
    ("pilimit_lib.inf.layers", "import experiments.training.process"),
    ("pilimit_lib.inf.layers", "from pilimit_orig.inf import pimlp"),
    ("pilimit_lib.lab.views", "import importlib\nimportlib.import_module('pilimit_lib.inf')"),
    (
        "pilimit_lib.sigprop.net",
        "if True:\n    try:\n        from tests import oracles\n    except ImportError:\n        "
        "pass",
    ),
    ("pilimit_lib", "from .inf import InfMLP"),
    ("pilimit_orig.inf.pimlp", "from pilimit_lib.core import Axis"),
    ("pilimit_orig.inf.pimlp", "import seaborn"),
    ("experiments.training.process", "from tests.oracles import relu_k"),
    ("elsewhere.thing", "import torch"),
]


@pytest.mark.parametrize("module, source", PLANTED)
def test_a_planted_import_is_found(module, source):
    assert violations(source, module, is_package=module == "pilimit_lib")


ACCEPTED = [
    (
        "pilimit_lib.core.axis",
        "import os\nimport torch.nn as nn\nfrom .blocks import Blocks\nfrom . import follow",
    ),
    (
        "pilimit_lib.inf.layers",
        "from ..core import Axis\nfrom .tensors import Rows\nimport numpy, triton",
    ),
    ("pilimit_lib.lab", "from pilimit_lib.core.batch import batch"),
    (
        "experiments.lab.run",
        "from pilimit_lib.inf import InfMLP\nfrom pilimit_lib import lab\nimport pilimit_orig.inf",
    ),
    (
        "tests.together.test_x",
        "from pilimit_lib import inf, dendrites\nfrom tests.oracles import relu_k",
    ),
]


@pytest.mark.parametrize("module, source", ACCEPTED)
def test_what_is_allowed_is_not_found(module, source):
    assert violations(source, module, is_package=module == "pilimit_lib.lab") == []


def loaded_by(statement: str) -> set[str]:
    """Names of our rooms, and of triton, in a fresh process after `statement`."""
    code = f"{statement}\nimport sys\nprint('\\n'.join(sys.modules))"
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    watched = [f"pilimit_lib.{room}" for room in ("core", *ROOMS)] + [
        "pilimit_orig",
        "experiments",
        "triton",
    ]
    return {name for name in watched if name in out}


@pytest.mark.parametrize("room", ROOMS)
def test_importing_a_room_loads_no_other_and_no_triton(room):
    assert loaded_by(f"import pilimit_lib.{room}") - {"pilimit_lib.core"} == {f"pilimit_lib.{room}"}


def test_importing_core_loads_no_room():
    assert loaded_by("import pilimit_lib.core") == {"pilimit_lib.core"}


def test_a_second_room_would_be_noticed():
    assert loaded_by("import pilimit_lib.inf, pilimit_lib.lab") >= {
        "pilimit_lib.inf",
        "pilimit_lib.lab",
    }


def test_triton_would_be_noticed():
    """A module of that name stands for the package, which a machine without a GPU need not have."""
    planted = "import sys, types; sys.modules['triton'] = types.ModuleType('triton')"
    assert "triton" in loaded_by(f"{planted}; import pilimit_lib.core")
