"""The README's code runs as it stands, block after block in one session."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "pilimit_lib" / "lab" / "README.md"


def test_the_readme_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip(
        "tensorboard",
        reason="the quick start writes scalars for TensorBoard: pip install 'pilimit[lab]'",
    )
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.S)
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    session = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), session)
    printed = capsys.readouterr().out
    assert (
        "Neuron 00000:  train:" in printed
        and "prune neurons [0, 2] of '0'" in printed
        and "prediction_age" in printed
    )
    for written in (
        "report.html",
        "ledger.csv",
        "root_experiment/x0/checkpoints/00000.pt",
        "runs/own/checkpoints/00000.pt",
    ):
        assert (tmp_path / written).is_file(), written
