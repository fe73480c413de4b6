"""A few tries of each format and case of damage; the whole table is experiments/bench/FUZZ.md."""

from collections import Counter

import pytest
import torch

from experiments.bench import fuzz_files
from experiments.bench.fuzz_files import FORMATS, failures, main, tried


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_damaged_files_are_refused_by_name_or_read_as_they_were(form):
    for case, counts in tried(form, 8, seed=1):
        assert counts.total() == 8 and not failures(form, counts), (case, counts)


def test_what_must_not_happen_is_seen(tmp_path, monkeypatch, capsys):
    """A reader that checks nothing."""
    form = fuzz_files.Format(
        "raw",
        lambda folder: (folder / "raw").write_bytes(bytes(100)) and folder / "raw",
        lambda path: [torch.tensor(list(path.read_bytes()))],
    )
    monkeypatch.setattr(fuzz_files, "FORMATS", (form,))
    assert main(["--tries", "6", "--out", str(tmp_path / "table.md")]) == 1
    assert "READ AS SOMETHING ELSE" in (tmp_path / "table.md").read_text()
    assert "| raw | flipped bit | 6 | 0 | 0 | 6 | 0 | 0 |" in capsys.readouterr().out
    assert failures(form, Counter({fuzz_files.CHANGED: 1})) == 1
