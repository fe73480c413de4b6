"""Figures from the files of runs: what they read is what the runs wrote."""
from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from experiments.meta.settings import Settings as MetaSettings
from experiments.meta.stores import write_tables
from experiments.plots import AGAINST, figure_of, main, read_run


def meta_run(folder: Path, accuracies: list[float], tested: float | None = None, **settings) -> Path:
    """The files of a meta-learning run with these accuracies."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MetaSettings(**settings).as_dict()))
    write_tables(folder, {"val": [{"epoch": e, "acc": a, "loss": 1.0} for e, a in enumerate(accuracies, 1)]})
    if tested is not None:
        write_tables(folder, {"test": [{"acc": tested, "loss": 1.0}]})
    return folder


def cifar_run(folder: Path, accuracies: list[float], **settings) -> Path:
    from dataclasses import asdict

    from experiments.cifar10.settings import Settings
    folder.mkdir()
    (folder / "settings.json").write_text(json.dumps(asdict(Settings(**settings))))
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"epoch": e, "test_acc": a}) + "\n"
                                                  for e, a in enumerate(accuracies, 1)))
    return folder


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    return [meta_run(tmp_path / "a", [.2, .5], hidden_size=-1, seed=1),
            meta_run(tmp_path / "b", [.3, .6], hidden_size=-1, seed=2),
            meta_run(tmp_path / "c", [.3, .4], .45, hidden_size=128, mu_init=True),
            meta_run(tmp_path / "d", [.3], gp=True), cifar_run(tmp_path / "e", [.7, .9], width=512, r=30),
            cifar_run(tmp_path / "f", [.8, .91], memory="moments")]


def test_every_run_is_read_as_what_it_was(runs):
    found = [read_run(run, per_epoch=False) for run in runs]
    assert [len(records) for records in found] == [1] * 6
    assert [records[0]["network"] for records in found] == ["infinite π", "infinite π", "finite μ", "NNGP", "finite π",
                                                            "infinite π, moments"]
    assert [round(records[0]["accuracy"], 6) for records in found] == [50, 60, 45, 30, 90, 91]  # a test counts before validation
    assert [record["accuracy"] for record in read_run(runs[2], per_epoch=True)] == [30, 40]
    assert read_run(runs[4], False)[0] == {"network": "finite π", "width": 512, "r": 30, "seed": 1, "epoch": 2,
                                               "accuracy": 90.0, "run": "e"}


@pytest.mark.parametrize("against", AGAINST)
def test_a_figure_is_drawn_and_the_numbers_behind_it_returned(runs, tmp_path, capsys, against):
    frame = main([*map(str, runs), "--against", against, "--out", str(tmp_path / "new" / "figure.png")])
    assert (tmp_path / "new" / "figure.png").stat().st_size > 5000
    assert len(frame) == (11 if against == "epoch" else 6)
    assert "infinite π: 55.00 ± 7.07 (s.d.) % over 2 run(s)" in capsys.readouterr().out


def test_a_folder_without_results_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert "holds no results of a run" in capsys.readouterr().err


def test_runs_of_one_kind_of_network_get_lines_of_their_own_on_request(runs):
    frame = pd.DataFrame([record for run in runs[:2] for record in read_run(run, True)])
    labels = {by: [text.get_text() for text in figure_of(frame, "epoch", by).axes[0].get_legend().get_texts()]
              for by in ("network", "run")}
    assert labels == {"network": ["infinite π"], "run": ["a", "b"]}
