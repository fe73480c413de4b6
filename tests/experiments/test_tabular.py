"""The tabular benchmark and its neighbours: what they count, on little."""

from __future__ import annotations

import json

import numpy as np
import pytest

from experiments.tabular import benchmark, data
from experiments.tabular.calibration import classification, regression
from experiments.tabular.learners import KernelMachine, learners
from experiments.tabular.million import D, chunks
from experiments.tabular.report import report


@pytest.mark.parametrize("name", ["RBF", "NTK"])
@pytest.mark.parametrize("table", ["iris", "diabetes"])
def test_one_fold_of_one_learner(table, name):
    line = benchmark.score(data.load(table), name, fold=1)
    assert line["score"] > (0.9 if table == "iris" else 0.3)
    assert (line["n"], line["kind"]) == (150, "accuracy") if table == "iris" else (442, "R2")


def test_every_learner_has_four_settings():
    for classes in (False, True):
        assert {len(make(classes, 3, 0)) for make in learners().values()} == {4}


def test_kernel_ridge_is_the_plain_solution():
    X, y = np.random.randn(20, 3), np.random.randn(20)
    machine = KernelMachine(lambda a, b: a @ b.T + 1, 0.5, classes=False).fit(X, y)
    K = X @ X.T + 1
    weights = np.linalg.solve(K + 0.5 * K.diagonal().mean() * np.eye(20), y - y.mean())
    assert np.allclose(machine.predict(X), K @ weights + y.mean())


def test_sets_of_packages_that_are_missing_are_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(benchmark, "learners", lambda: {})
    benchmark.run(tmp_path, ["Hitters"])
    assert "Hitters left out: ISLP is not installed" in capsys.readouterr().out


def test_the_table_counts_complete_folds_only(tmp_path, capsys):
    common = {"source": "x", "n": 10, "d": 2, "kind": "R2", "setting": 0, "seconds": 1.0}
    lines = [
        common | {"data": "a", "learner": learner, "fold": fold, "score": score}
        for learner, scores in (("π", (0.5, 0.7)), ("MLP", (0.4, 0.5)))
        for fold, score in enumerate(scores)
    ]
    lines.append(common | {"data": "a", "learner": "π", "fold": 2, "score": 0.0})
    (tmp_path / "results.jsonl").write_text("\n".join(map(json.dumps, lines)))
    report(tmp_path)
    text = (tmp_path / "table.md").read_text()
    assert "| **60.0 ± 14.1** | 45.0 ± 7.1 |" in text and "| 1 of 1 | 0 of 1 |" in text
    assert (tmp_path / "tabular.png").stat().st_size and text in capsys.readouterr().out


def test_calibration_of_what_is_known():
    random = np.random.RandomState(0)
    y = random.randn(20000)
    right = regression(0 * y, 1 + 0 * y, y)
    assert right["nll"] == pytest.approx(1.419, abs=0.02) and right["ece"] < 1
    assert regression(0 * y, 0.5 + 0 * y, y)["ece"] > 15
    p = random.rand(20000)
    labels = (random.rand(20000) < p).astype(int)
    assert classification(np.c_[1 - p, p], labels)["ece"] < 1.5
    sure = classification(np.eye(2)[labels], 1 - labels)
    assert sure["ece"] == pytest.approx(100) and sure["score"] == 0


def test_chunks_are_the_samples_asked_for():
    parts = list(chunks(60_000, 1))
    assert [len(y) for _, y in parts] == [50_000, 10_000]
    assert parts[0][0].shape == (50_000, D) and parts[0][0].dtype == np.float32
