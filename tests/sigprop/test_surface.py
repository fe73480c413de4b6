"""The public surface: documented names are there, nothing else leaks, the package ships whole."""

import ast
import importlib
from pathlib import Path

import pytest
import torch
from torch import nn

from pilimit_lib import sigprop

ROOT = Path(sigprop.__file__).parent
NAMES = {
    "signals": [
        "Signal",
        "Formatter",
        "Generator",
        "LabelNumberToOnehot",
        "DistinctBatchLabelsOnehot",
        "DistinctBatchLabels",
        "LabelVectorToNumber",
        "ProjectionContext",
        "ProjectionContextInput",
        "FixedDrawContext",
    ],
    "propagators": ["Propagator", "Learn", "Loss", "Identity", "Fixed", "Forward", "signals"],
    "propagators.signals": ["Learn", "Loss", "Fixed"],
    "propagators.functional": ["identity", "fixed", "forward"],
    "utils": ["shape_numel"],
    "models": ["Model", "Forward", "LoopBack", "ForwardLoopBack"],
    "managers": ["Manager", "Prepared", "Preset"],
    "monitors": ["Group", "loss", "Memory", "Time"],
    "monitors.loss": ["LabelMetrics"],
    "functional": ["signals", "propagators", "similarity", "partners", "contrast"],
    "functional.signals": [
        "label_number_to_onehot",
        "distinct_batch_labels_onehot",
        "distinct_batch_labels",
        "label_vector_to_number",
    ],
    "functional.propagators": ["identity", "fixed", "forward"],
    "loss": [
        "Loss",
        "v1_input_label_direct",
        "v9_input_target_max_all",
        "v14_input_target_max_rand",
        "v15_input_target_topk",
    ],
}


@pytest.mark.parametrize("module", NAMES)
def test_documented_names(module):
    found = importlib.import_module(f"pilimit_lib.sigprop.{module}")
    for name in NAMES[module]:
        assert hasattr(found, name), name
    documented_files = [
        "signals/generators.py",
        "signals/formatter.py",
        "propagators/learn.py",
        "propagators/other.py",
        "models/model.py",
    ]
    assert all((ROOT / path).is_file() for path in documented_files)


@pytest.mark.parametrize(
    "module",
    ["", ".signals", ".propagators", ".models", ".managers", ".monitors", ".functional", ".loss"],
)
def test_star_imports_bring_only_what_is_meant(module):
    names = {}
    exec(f"from pilimit_lib.sigprop{module} import *", names)
    names.pop("__builtins__")
    package = importlib.import_module(f"pilimit_lib.sigprop{module}")
    assert set(names) == set(package.__all__) and not {"torch", "nn", "F", "optim"} & set(names)


def test_every_folder_is_a_package_and_nothing_needs_distutils():
    folders = {path.parent for path in ROOT.rglob("*.py")}
    assert (
        all((folder / "__init__.py").is_file() for folder in folders)
        and ROOT / "managers" in folders
    )
    for path in ROOT.rglob("*.py"):
        imported = {
            alias.name
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        } | {
            node.module
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom)
        }
        assert not {"distutils", "setuptools"} & imported


def test_parameters_follow_the_protocol_of_modules(make):
    net = make()
    for propagator in net.model:
        assert len(list(propagator.parameters(recurse=True))) == 2 and not list(
            propagator.parameters(recurse=False)
        )
    assert len(list(net.parameters(recurse=True))) == 2 and not list(net.parameters(recurse=False))
    tied = nn.Linear(8, 8)
    twice = sigprop.wrap(
        [tied, tied, nn.Linear(8, 3)],
        signal=sigprop.signals.project_labels(3, (8,)),
        output=-2,
        optimizer=lambda m: torch.optim.SGD(m.parameters(), 0.1),
    )
    assert len(list(twice.parameters())) == 2, (
        "a block that learns locally is not trained globally as well"
    )


def test_numel_of_a_shape():
    assert sigprop.utils.shape_numel((3, 4, 5)) == 60 == torch.Size((3, 4, 5)).numel()
    assert sigprop.utils.shape_numel(()) == 1
    # the line of the documented quick start
    assert nn.LayerNorm(sigprop.utils.shape_numel((2, 3))).normalized_shape == (6,)
