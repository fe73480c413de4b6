"""Moments and bounded rows through the CIFAR-10 command and the scripts that compare them, on a few
digits."""

import json

import pytest
import torch

from experiments.bench import moments_cost, moments_fidelity
from experiments.cifar10 import cifar10mlp
from experiments.cifar10.cifar10mlp import Settings, main, train
from pilimit_lib.core import load
from pilimit_lib.inf import hermite_series

SMALL = {"train_subset_size": 80, "test_subset_size": 40, "r": 10, "epochs": 2, "lr": 0.5}
OPTIONS = [
    {"memory": "moments"},
    {"memory": "moments", "degree": 3, "fit": "minimax", "activation": "gelu"},
    {"memory": "moments", "row_budget": 30},
    {"memory": "moments", "optimizer": "adam", "lr": 0.01},
    {"memory": "moments", "optimizer": "adamw", "lr": 0.01, "data_augment": True},
    {"memory": "moments", "momentum": 0.9, "lr": 0.1},
    {"merge": 0.9},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_every_kind_of_memory_trains_and_resumes_bit_for_bit(options, tmp_path):
    settings = Settings(**SMALL | options)
    records = train(settings, tmp_path / "whole", quiet=True)
    assert records[1]["train_loss"] < records[0]["train_loss"]
    if options.get("memory") == "moments":
        assert records[0]["bytes"] == records[1]["bytes"]
    train(Settings(**SMALL | options | {"epochs": 1}), tmp_path / "part", quiet=True)
    resumed = train(settings, tmp_path / "part", quiet=True, resume=True)
    for name in ("train_loss", "test_loss", "rows"):
        assert [record[name] for record in resumed] == [record[name] for record in records]
    states = [load(tmp_path / name / "checkpoint.pt")["model"] for name in ("whole", "part")]
    assert all(
        torch.equal(value, states[1][name])
        for name, value in states[0].items()
        if isinstance(value, torch.Tensor)
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--optimizer", "adam"], "needs --memory moments"),
        (
            ["--optimizer", "adam", "--memory", "moments", "--row-budget", "10"],
            "without --row-budget",
        ),
        (["--optimizer", "adamw", "--memory", "moments", "--momentum", ".9"], "has its own"),
        (["--activation", "gelu"], "exact for ReLU only"),
    ],
)
def test_contradicting_flags_are_refused(arguments, message, capsys, tmp_path):
    with pytest.raises(SystemExit):
        main([*arguments, "--save-dir", str(tmp_path / "x")])
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "x").exists()


def test_command_line_of_the_documentation(tmp_path):
    records = main(
        [
            "--memory",
            "moments",
            "--degree",
            "2",
            "--row-budget",
            "20",
            "--train-subset-size",
            "40",
            "--epochs",
            "1",
            "--r",
            "8",
            "--save-dir",
            str(tmp_path / "x"),
            "--quiet",
        ]
    )
    assert (
        len(records) == 1
        and json.loads((tmp_path / "x/settings.json").read_text())["row_budget"] == 20
    )


def test_comparison_of_accuracies_is_resumed_and_tabulated(tmp_path, monkeypatch, capsys):
    kinds = ["rows", "degree 2, hermite"]
    monkeypatch.setitem(moments_fidelity.PLANS, "digits", (SMALL | {"dataset": "digits"}, kinds, 2))
    moments_fidelity.main(["--plan", "digits", "--out", str(tmp_path), "--seeds", "1"])
    runs = []
    monkeypatch.setattr(
        moments_fidelity, "train", lambda *a, **k: (runs.append(a), cifar10mlp.train(*a, **k))[1]
    )
    moments_fidelity.main(["--plan", "digits", "--out", str(tmp_path), "--table"])
    assert len(runs) == 2  # only the second seed was missing
    table = (tmp_path / "table.md").read_text()
    assert table.count("| rows | 2 |") == table.count("| degree 2, hermite | 2 |") == 1
    assert (tmp_path / "curves.png").stat().st_size > 5000


def test_comparison_of_costs_is_resumed_and_tabulated(tmp_path, monkeypatch):
    arguments = [
        "--out",
        str(tmp_path),
        "--r",
        "8",
        "--b",
        "4",
        "--rows",
        "50",
        "100",
        "--repeats",
        "1",
        "--slope-to",
        "1000",
    ]
    moments_cost.main(arguments)
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == [
        "moments",
        "rows",
        "original-style",
        "rows",
        "original-style",
    ]
    assert lines[1]["MB"] == 4 * 50 * (3 * 8 + 10) / 1e6
    monkeypatch.setattr(moments_cost, "measure", None)
    moments_cost.main(arguments)  # everything is known: nothing is measured again
    assert (
        "1,000 (slope)" in (tmp_path / "table.md").read_text() and (tmp_path / "cost.png").is_file()
    )


def test_rows_of_the_cost_baseline_are_the_exact_layer():
    """The baseline computes what it is compared to: forward, backward and the step of exact
    rows."""
    from pilimit_lib.inf import InfPiLinearReLU, PiSGD

    baseline = moments_cost.CopyingRows(6, 4, 30)
    layer = InfPiLinearReLU(6, 4, bias_alpha=0)
    layer.set_rows(baseline.A, baseline.Amult, baseline.B)
    optimizer = PiSGD(layer.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(2):
        g, grad = torch.randn(5, 6, requires_grad=True), torch.randn(5, 4)
        layer(g).backward(grad)
        torch.testing.assert_close(
            baseline.forward(g.detach()), layer(g).detach(), rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(baseline.backward(grad), g.grad, rtol=1e-4, atol=1e-5)
        baseline.step(grad, 0.1, 0.5)
        optimizer.step()
        torch.testing.assert_close(layer.Amult.blocks.dense(), baseline.Amult)


@pytest.mark.parametrize("degree, fit", [(2, "hermite"), (4, "minimax")])
def test_rows_with_a_polynomial_kernel_train_as_its_moments_do(degree, fit, tmp_path):
    small = SMALL | {"lr": 1.5, "epochs": 4}
    exact = train(Settings(**small), tmp_path / "exact", quiet=True)
    with moments_fidelity.rows_with_kernel(hermite_series("relu", degree, fit)):
        rows = train(Settings(**small), tmp_path / "rows", quiet=True)
    moments = train(
        Settings(**small, memory="moments", degree=degree, fit=fit),
        tmp_path / "moments",
        quiet=True,
    )
    for mine, theirs in zip(rows, moments):
        assert mine["test_loss"] == pytest.approx(theirs["test_loss"], rel=1e-5)
        assert mine["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-5)
    assert exact[-1]["train_loss"] != pytest.approx(moments[-1]["train_loss"], rel=1e-4)
    assert (
        train(Settings(**small), tmp_path / "again", quiet=True)[-1]["train_loss"]
        == exact[-1]["train_loss"]
    )
