"""--help is answered before torch is imported, which takes seconds."""

import subprocess
import sys
from pathlib import Path

import pytest

from experiments.training import choices
from pilimit_lib.inf.conv.geometry import PADDING_MODES
from pilimit_lib.inf.dual import hermite

ASKED = """
import runpy, sys
sys.argv = ["command", "--help"]
try:
    runpy.run_module({module!r}, run_name="__main__", alter_sys=True)
finally:
    assert not {{"torch", "pandas", "numpy"}} & set(sys.modules)
"""
COMMANDS = ("cifar10.cifar10mlp", "cifar10.cifar10conv", "imagenet.transfer_imagenet", "meta.train")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_needs_no_torch(command):
    code = ASKED.format(module=f"experiments.{command}")
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert f"usage: python -m experiments.{command}" in done.stdout


def test_the_names_are_those_of_the_library():
    assert choices.ACTIVATIONS == tuple(hermite.ACTIVATIONS) and choices.FITS == hermite.FITS
    assert choices.PADDING_MODES == PADDING_MODES
