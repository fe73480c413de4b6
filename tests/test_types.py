"""What a type checker sees of the library: calls as users write them pass, wrong ones don't."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TYPES = ROOT / "tests" / "types"


@pytest.mark.slow
def test_right_calls_pass_and_wrong_ones_are_found(tmp_path):
    pytest.importorskip("mypy", reason="types are checked with mypy: pip install -e .[test]")
    options = ["--follow-imports=silent", "--cache-dir", str(tmp_path), "--no-error-summary"]
    files = [str(TYPES / f"{name}.py") for name in ("right", "wrong")]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, *files], cwd=ROOT, capture_output=True, text=True
    )
    assert not done.stderr
    found = re.findall(r"^.*?(\w+)\.py:(\d+): error", done.stdout, re.MULTILINE)
    wrong = (TYPES / "wrong.py").read_text(encoding="utf-8").splitlines()
    planted = {("wrong", n) for n, line in enumerate(wrong, 1) if line.endswith("# wrong")}
    assert {(name, int(line)) for name, line in found} == planted, done.stdout
