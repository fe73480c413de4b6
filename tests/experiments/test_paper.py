"""The paper's figures by one command: named runs, held-out images, logs, the page made of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from experiments.cifar10 import cifar10mlp, cifar10test
from experiments.meta import learner
from experiments.meta import train as meta_train
from experiments.paper import __main__ as command
from experiments.paper import ensemble
from experiments.paper.commands import COMMANDS, settings_of_run
from experiments.paper.cost import cost_of
from experiments.paper.logs import Log, collect, command_line_of, read_logs, write_log
from experiments.paper.runs import RUNS, Run
from experiments.paper.table import LOGS, PAGE, page, result_of, with_table
from experiments.training.images import ImageSet, load_images
from pilimit_lib.core import load
from pilimit_lib.inf import InfMLP

DIGITS = Run(
    "small-r6",
    "CIFAR-10",
    "a small network",
    "cifar10.cifar10mlp",
    "--r 6 --epochs 2 --held-out 40 --train-subset-size 120 --test-subset-size 40 --depth 1 "
    "--memory moments --lr .3 --quiet",
    "nowhere",
    50.0,
)
OF = {name: [r for r in RUNS.values() if r.command == name] for name in COMMANDS}


def named(runs):
    return pytest.mark.parametrize("run", runs, ids=lambda run: run.name)


def log(run, seed, epochs, **columns):
    epoch = {} if epochs is None else {"epoch": list(range(1, epochs + 1))}
    return Log(run, seed, command_line_of(run, seed), pd.DataFrame({**epoch, **columns}))


# ---- every named run begins to train


def test_the_paper_network_on_cifar10_has_one_hidden_layer_and_its_schedule():
    for run in OF["cifar10.cifar10mlp"]:
        settings = settings_of_run(run)
        assert (settings.depth, settings.batch_size, settings.epochs) == (1, 8, 50)
        assert settings.held_out == 5000 and settings.no_apply_lr_mult_to_wd
        assert settings.lr_drop_ratio == settings.gclip_drop_ratio
        assert settings.lr_drop_milestones == settings.gclip_drop_milestones == "40"
        assert not settings.note_on_depth()


@named(OF["cifar10.cifar10mlp"])
def test_runs_of_perceptrons_train(run):
    few = dict(dataset="digits", train_subset_size=60, test_subset_size=20, held_out=20, r=6)
    full = settings_of_run(run)
    small = replace(full, **few, width=16 if full.width else 0)
    trainer = cifar10mlp.Trainer(
        small, cifar10mlp.images_of(small).hold_out(small.held_out), torch.device("cpu")
    )
    assert trainer.run_epoch([])
    assert {"held_out_acc", "test_acc"} <= set(trainer.records[0])


@named(OF["cifar10.cifar10test"])
def test_runs_of_kernels_solve(run, tmp_path):
    settings = settings_of_run(run)
    few = replace(settings, dataset="digits", train_subset_size=150, test_subset_size=40)
    records = cifar10test.run(
        replace(few, held_out=30 if settings.held_out else 0), tmp_path, quiet=True
    )
    assert max(record.get("test_acc", 0) for record in records) > 0.5
    assert any("held_out_acc" in record for record in records) == run.name.endswith("choice")


@named(OF["meta.train"])
def test_runs_of_maml_train(run, monkeypatch):
    drawings = np.random.default_rng(0).integers(0, 256, (6, 20, 28, 28)).astype(np.uint8)
    monkeypatch.setattr(learner, "load_omniglot", lambda folder, split, quiet: drawings)
    settings = settings_of_run(run)
    small = replace(settings, infnet_r=6, num_batches=1, num_test_batches=1)
    if settings.hidden_size > 0:
        small = replace(small, hidden_size=12)
    trainer = meta_train.Trainer(small, torch.device("cpu"), quiet=True)
    assert trainer.run_epoch([])
    assert settings.unrotated_test and settings.sum_tasks


@named(OF["imagenet.transfer_imagenet"])
def test_runs_of_transfer_train(run):
    settings = settings_of_run(run)
    assert settings.imagenet_classes == "paper" and settings.late == []
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(32, 3, 4, 4, generator=generator), torch.arange(32) % 250
    small = replace(settings, r=6, width=16 if settings.width else 0)
    data = ImageSet("imagenet32", x, y, x, y, 250)
    assert cifar10mlp.Trainer(small, data, torch.device("cpu")).run_epoch([])


# ---- held-out images


def test_held_out_images_are_disjoint_and_stable_and_of_all_classes():
    data = load_images("digits")
    kept = data.hold_out(143)
    rows = {tuple(image.flatten().tolist()) for image in kept.train_x}
    assert len(kept.train_y) == len(data.train_y) - 143 and len(kept.held_out_y) == 143
    assert all(tuple(image.flatten().tolist()) not in rows for image in kept.held_out_x)
    sizes, of_all = kept.held_out_y.bincount(), data.train_y.bincount()
    assert (sizes - 143 * of_all / len(data.train_y)).abs().max() <= 1
    torch.manual_seed(5)
    assert torch.equal(data.hold_out(143).held_out_x, kept.held_out_x)
    assert torch.equal(data.hold_out(143).train_x, kept.train_x)
    # it must not change between versions: logs were made with it
    assert "".join(map(str, kept.held_out_y[:12].tolist())) == "785371281813"
    assert data.hold_out(0) is data
    with pytest.raises(ValueError, match="some must be left to train on"):
        data.hold_out(len(data.train_y))


# ---- logs and the page


def test_the_page_says_what_the_logs_say():
    text = PAGE.read_text(encoding="utf-8")
    assert with_table(text, page(read_logs())) == text


def test_logs_in_the_repository_are_small():
    assert all(path.stat().st_size < 20_000 for path in LOGS.glob("*.csv"))


def test_the_epoch_is_chosen_by_held_out_images():
    found = result_of(
        log(DIGITS, 0, 3, held_out_acc=[0.3, 0.5, 0.4], test_acc=[0.2, 0.45, 0.6], seconds=1.0)
    )
    assert (found.last, found.chosen, found.best) == pytest.approx((60, 45, 60))


def test_the_average_is_chosen_among_its_own_epochs():
    nan = float("nan")
    frame = log(
        DIGITS,
        0,
        3,
        held_out_acc=[0.9, 0.5, 0.4],
        test_acc=[0.9, 0.4, 0.3],
        average_held_out_acc=[nan, 0.5, 0.6],
        average_test_acc=[nan, 0.7, 0.65],
    )
    found = result_of(frame)
    assert (found.last, found.chosen, found.best) == pytest.approx((65, 65, 70))


def test_the_page_names_every_run_and_what_is_unfinished(monkeypatch):
    monkeypatch.setitem(RUNS, DIGITS.name, DIGITS)
    columns = dict(seconds=1800.0)
    done = [
        log(DIGITS, seed, 2, held_out_acc=[0.4, 0.5], test_acc=[0.5, acc], **columns)
        for seed, acc in ((0, 0.52), (1, 0.54))
    ]
    half = log(DIGITS, 2, 1, held_out_acc=[0.3], test_acc=[0.31], **columns)
    text = page([*done, half])
    assert all(f"| `{name}` |" in text for name, r in RUNS.items() if r.section != "Ridges")
    rows = [line for line in text.splitlines() if line.startswith("| `small-r6` |")]
    mean = "53.00 ± 1.41"
    assert rows[0].split(" | ")[2:] == [
        "50.00",
        mean,
        mean,
        "+3.00",
        mean,
        "2 (0, 1)",
        "1.0 ± 0.0 |",
    ]
    assert "31.00 (epoch 1 of 2, unfinished)" in rows[1] and "seed 2" in rows[1]
    assert "| `cifar10-pi-r400` | infinite π, moments, r = 400 | 61.50 | not run |" in page([])


def test_a_log_is_read_as_it_was_written_and_refused_with_other_settings(tmp_path):
    runs = {DIGITS.name: DIGITS}
    made = log(DIGITS, 3, 1, test_acc=[0.25], held_out_acc=[0.125], seconds=[12.5])
    path = write_log(made, tmp_path)
    assert path.name == "small-r6-3.csv"
    head = path.read_text().splitlines()[:2]
    assert head == [f"# {command_line_of(DIGITS, 3)}", "# epoch 1 of 2, unfinished"]
    (again,) = read_logs(tmp_path, runs)
    pd.testing.assert_frame_equal(again.frame, made.frame)
    changed = replace(DIGITS, flags=DIGITS.flags.replace("--lr .3", "--lr .4"))
    with pytest.raises(ValueError, match="of other settings than small-r6 has now"):
        read_logs(tmp_path, {DIGITS.name: changed})
    with pytest.raises(ValueError, match="the log of no named run"):
        read_logs(tmp_path, {})


def test_a_page_without_a_place_for_the_table_is_refused():
    with pytest.raises(ValueError, match="between which the table goes"):
        with_table("# A page\n", "| table |")


# ---- the command


def test_a_named_run_is_made_resumed_collected_and_averaged(tmp_path, monkeypatch, capsys):
    where = ["--output", str(tmp_path / "out"), "--logs", str(tmp_path / "logs")]
    half = replace(DIGITS, flags=DIGITS.flags.replace("--epochs 2", "--epochs 1"))
    monkeypatch.setitem(RUNS, DIGITS.name, half)
    command.main([DIGITS.name, *where])
    capsys.readouterr()
    monkeypatch.setitem(RUNS, DIGITS.name, DIGITS)
    for seed in ("0", "1"):
        command.main([DIGITS.name, "--seed", seed, *where])
    said = capsys.readouterr().out
    assert "small-r6: CIFAR-10, a small network; settings from nowhere" in said
    assert said.index(command_line_of(DIGITS, 0)) < said.index("cost: ")
    assert "at the speed of a few steps just now" in said
    checkpoint = tmp_path / "out" / "small-r6-0" / "checkpoint.pt"
    before = checkpoint.read_bytes()
    command.main([DIGITS.name, *where])
    assert "holds it: epoch 2 of 2, finished" in capsys.readouterr().out
    assert checkpoint.read_bytes() == before
    assert len(collect(tmp_path / "out", tmp_path / "logs")) == 2
    logs = read_logs(tmp_path / "logs")
    assert [found.state for found in logs] == ["epoch 2 of 2, finished"] * 2

    settings = ensemble.Settings(DIGITS.name, "0,1")
    *single, mean = ensemble.average(settings, tmp_path / "out", "./dataset")
    for record, found in zip(single, logs):
        assert record["test_acc"] == pytest.approx(found.frame.test_acc.iloc[-1])
        assert record["held_out_acc"] == pytest.approx(found.frame.held_out_acc.iloc[-1])
    states = [load(tmp_path / "out" / f"small-r6-{seed}/checkpoint.pt") for seed in (0, 1)]
    nets = [InfMLP.from_state_dict(state["model"]) for state in states]
    data = load_images("digits", train_size=120, test_size=40)
    with torch.no_grad():
        outputs = sum(net(data.test_x.flatten(1)) for net in nets)
    assert mean["test_acc"] == pytest.approx(
        (outputs.argmax(1) == data.test_y).double().mean().item()
    )
    with pytest.raises(FileNotFoundError, match="train these seeds first"):
        ensemble.average(replace(settings, seeds="0,7"), tmp_path / "out", "./dataset")


def test_unknown_runs_are_refused_and_known_ones_listed(capsys):
    with pytest.raises(SystemExit):
        command.main(["cifar10-pi-r3"])
    assert "`list` names them" in capsys.readouterr().err
    command.main(["list"])
    assert "cifar10-pi-r400" in capsys.readouterr().out


def test_the_cost_of_rows_grows_with_the_epochs():
    flags = DIGITS.flags.replace("--memory moments", "--memory rows")
    rows, longer = (
        replace(DIGITS, flags=flags.replace("--epochs 2", f"--epochs {epochs}"))
        for epochs in (2, 20)
    )
    few, many = (cost_of(run, 0, "./dataset") for run in (rows, longer))
    # the readout's rows and the hidden layer's: r + 10 and r + r numbers of 4 bytes each
    assert few.bytes == 4 * (6 + 2 * 80) * (16 + 12)
    assert many.bytes == 4 * (6 + 20 * 80) * (16 + 12)


@pytest.mark.parametrize("seeds", ["0", "0,0", "0,x"])
def test_ensembles_are_of_several_seeds(seeds):
    with pytest.raises(ValueError, match="two or more different seeds"):
        ensemble.Settings("cifar10-pi-r200", seeds).check()
