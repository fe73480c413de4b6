"""Figures from the files of runs: what they read is what the runs wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.meta.settings import Settings as MetaSettings
from experiments.meta.stores import write_tables
from experiments.plots import AGAINST, figure_of, main, read_run, read_runs


def meta_run(
    folder: Path, accuracies: list[float], tested: float | None = None, **settings
) -> Path:
    """The files of a meta-learning run with these accuracies."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MetaSettings(**settings).as_dict()))
    write_tables(
        folder, {"val": [{"epoch": e, "acc": a, "loss": 1.0} for e, a in enumerate(accuracies, 1)]}
    )
    if tested is not None:
        write_tables(folder, {"test": [{"acc": tested, "loss": 1.0}]})
    return folder


def cifar_run(folder: Path, accuracies: list[float], **settings) -> Path:
    from dataclasses import asdict

    from experiments.cifar10.settings import Settings

    folder.mkdir()
    (folder / "settings.json").write_text(json.dumps(asdict(Settings(**settings))))
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps({"epoch": e, "test_acc": a}) + "\n" for e, a in enumerate(accuracies, 1))
    )
    return folder


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    return [
        meta_run(tmp_path / "a", [0.2, 0.5], hidden_size=-1, seed=1),
        meta_run(tmp_path / "b", [0.3, 0.6], hidden_size=-1, seed=2),
        meta_run(tmp_path / "c", [0.3, 0.4], 0.45, hidden_size=128, mu_init=True),
        meta_run(tmp_path / "d", [0.3], gp=True),
        meta_run(tmp_path / "e", [0.7], hidden_size=-1, memory="moments"),
    ]


@pytest.fixture
def image_runs(tmp_path) -> list[Path]:
    return [
        cifar_run(tmp_path / "i", [0.7, 0.9], width=512, r=30),
        cifar_run(tmp_path / "j", [0.8, 0.91], memory="moments"),
    ]


def test_every_run_is_read_as_what_it_was(runs, image_runs):
    found = [read_run(run, per_epoch=False) for run in [*runs, *image_runs]]
    assert [list(kinds) for kinds in found] == [["validation"]] * 2 + [
        ["test", "validation"],
        *[["validation"]] * 2,
        *[["test"]] * 2,
    ]
    last = [next(iter(kinds.values())) for kinds in found]
    assert [len(records) for records in last] == [1] * 7
    assert [records[0]["network"] for records in last] == [
        "infinite π",
        "infinite π",
        "finite μ",
        "NNGP",
        "infinite π, moments",
        "finite π",
        "infinite π, moments",
    ]
    assert [round(records[0]["accuracy"], 6) for records in last] == [50, 60, 45, 30, 70, 90, 91]
    assert [record["accuracy"] for record in read_run(runs[2], per_epoch=True)["validation"]] == [
        30,
        40,
    ]
    assert last[5][0] == {
        "network": "finite π",
        "width": 512,
        "r": 30,
        "seed": 1,
        "epoch": 2,
        "accuracy": 90.0,
        "run": "i",
    }


def test_a_kernel_has_neither_width_nor_rank(tmp_path, capsys):
    runs = [
        meta_run(tmp_path / "a", [0.3], gp=True),
        meta_run(tmp_path / "b", [0.4], hidden_size=64),
    ]
    _, frame = read_runs(runs, False)
    assert frame.width.tolist() == [float("inf"), 64] and frame.r.isna().tolist() == [True, False]
    labels = [line.get_label() for line in figure_of(frame, "width").axes[0].lines]
    assert "NNGP" in labels
    with pytest.raises(SystemExit):
        main([str(runs[0]), "--against", "r", "--out", str(tmp_path / "r.png")])
    assert "kernels have no rank" in capsys.readouterr().err


def test_only_tests_of_the_run_as_it_was_trained_count(tmp_path):
    run = meta_run(tmp_path / "a", [0.5], num_steps=2)
    plain = {"split": "test", "num_steps": 2, "nilmax": False}
    others = [
        {**plain, "split": "val", "acc": 0.1},
        {**plain, "nilmax": True, "num_steps": 0, "acc": 0.2},
        {**plain, "num_steps": 5, "acc": 0.3},
    ]
    write_tables(run, {"test": others})
    assert list(read_run(run, False)) == ["validation"]
    write_tables(run, {"test": [{**plain, "acc": 0.6}, *others]})
    assert [record["accuracy"] for record in read_run(run, False)["test"]] == [60]


def test_a_figure_shows_one_kind_of_accuracy(runs, image_runs, tmp_path, capsys):
    kind, frame = read_runs(runs, False)
    # c was tested, the others were not
    assert kind == "validation" and frame.accuracy.round(6).tolist() == [50, 60, 40, 30, 70]
    kind, frame = read_runs([runs[2], image_runs[0]], False)
    assert kind == "test" and frame.accuracy.tolist() == [45, 90]
    assert figure_of(frame, "seed", kind=kind).axes[0].get_ylabel() == "test accuracy, %"
    with pytest.raises(SystemExit):
        main([str(runs[0]), str(image_runs[0])])
    message = capsys.readouterr().err
    assert "no kind of accuracy in common" in message and "a: validation; " in message


def test_transfer_runs_are_drawn_by_what_they_transfer(tmp_path):
    run = cifar_run(tmp_path / "a", [0.2, 0.3], memory="moments")
    lines = [
        {"what": "features", "epoch": epoch, "reg": reg, "test_acc": accuracy}
        for epoch, reg, accuracy in ((0, 0.1, 0.3), (0, 1.0, 0.35), (2, 0.1, 0.5), (2, 1.0, 0.4))
    ]
    lines += [
        {"what": "NNGP", "reg": 0.1, "test_acc": 0.45},
        {"what": "NNGP", "reg": 1.0, "failed": "singular"},
    ]
    (run / "transfers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    kind, frame = read_runs([run], True)
    assert kind == "transfer"
    assert [(r.network, r.epoch, round(r.accuracy)) for r in frame.itertuples()] == [
        ("infinite π, moments", 0, 35),
        ("NNGP", 0, 45),
        ("infinite π, moments", 2, 50),
        ("NNGP", 2, 45),
    ]
    main([str(run), "--out", str(tmp_path / "figure.png")])


@pytest.mark.parametrize("against", AGAINST)
def test_a_figure_is_drawn_and_the_numbers_behind_it_returned(runs, tmp_path, capsys, against):
    frame = main(
        [*map(str, runs), "--against", against, "--out", str(tmp_path / "new" / "figure.png")]
    )
    assert (tmp_path / "new" / "figure.png").stat().st_size > 5000
    assert len(frame) == (8 if against == "epoch" else 5)
    assert "infinite π: 55.00 ± 7.07 (s.d.) % over 2 run(s)" in capsys.readouterr().out


def test_a_folder_without_results_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert "holds no results of a run" in capsys.readouterr().err


def test_runs_of_one_kind_of_network_get_lines_of_their_own_on_request(runs):
    frame = read_runs(runs[:2], True)[1]
    labels = {
        by: [
            text.get_text()
            for text in figure_of(frame, "epoch", by).axes[0].get_legend().get_texts()
        ]
        for by in ("network", "run")
    }
    assert labels == {"network": ["infinite π"], "run": ["a", "b"]}
