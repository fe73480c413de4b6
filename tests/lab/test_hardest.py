"""The script behind the README's table of flipped labels."""

import pandas as pd
import pytest
import torch

pytest.importorskip(
    "torch_pruning", reason="the lab plans edits with torch-pruning: pip install 'pilimit[lab]'"
)

from experiments.lab.hardest import flip, main, ways  # noqa: E402


def test_exactly_the_flipped_labels_are_wrong_and_the_seed_says_which():
    labels = torch.arange(200) % 10
    wrong, chosen = flip(labels, 40, 3)
    assert chosen == set((wrong != labels).nonzero().flatten().tolist()) and len(chosen) == 40
    assert wrong.min() >= 0 and wrong.max() <= 9 and torch.equal(labels, torch.arange(200) % 10)
    assert torch.equal(flip(labels, 40, 3)[0], wrong) and flip(labels, 40, 4)[1] != chosen


def test_each_way_ranks_the_worst_first():
    frame = pd.DataFrame(
        {
            "prediction_loss": [0.1, 3.0, 2.0],
            "correctness": [1.0, 0.5, 0.0],
            "forgotten": [2, 0, 1],
        }
    )
    found = ways(frame, frame.iloc[[2, 1]], 2)
    assert {way: list(index) for way, index in found.items()} == {
        "hardest": [2, 1],
        "last loss": [1, 2],
        "correctness": [2, 1],
        "forgotten": [0, 2],
    }


def test_it_runs_and_writes_a_row_per_seed_and_way(tmp_path, capsys):
    sizes = ["--samples", "300", "--flipped", "9", "--epochs", "2"]
    table = main(["--seeds", "1", "2", *sizes, "--out", str(tmp_path)])
    rows = pd.read_csv(tmp_path / "hits.csv")
    assert len(rows) == 8 and rows["found"].between(0, 9).all()
    assert table.loc["hardest", 1] == rows.query("way == 'hardest' and seed == 1")["found"].item()
    assert "of 9 flipped labels" in capsys.readouterr().out
