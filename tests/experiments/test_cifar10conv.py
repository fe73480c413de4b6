"""The command that trains ConvNets: what it writes, that it goes on bit for bit, its parts, and its
errors. On real digits."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experiments.cifar10 import conv_results
from experiments.cifar10.cifar10conv import Trainer, beside, cutout, evaluate, main, train
from experiments.cifar10.conv_networks import BASE_WIDTH, ReLUConvNet, build, groups
from experiments.cifar10.conv_settings import Settings
from experiments.training.images import load_images
from pilimit_lib.core import load
from pilimit_lib.inf import FinPiConvNetSample, InfPiConvNet

ROOT = Path(__file__).resolve().parents[2]
QUICK = Settings(
    dataset="digits",
    ranks="4,5,5",
    pools="2,1",
    flips=False,
    train_subset_size=192,
    test_subset_size=64,
    epochs=2,
    batch_size=32,
    lr=0.03,
)
FLAGS = [
    "--dataset",
    "digits",
    "--ranks",
    "4,5",
    "--pools",
    "2",
    "--no-flips",
    "--train-subset-size",
    "96",
    "--test-subset-size",
    "32",
    "--batch-size",
    "32",
]


@pytest.mark.slow
def test_it_learns_digits_and_writes_what_it_promises(tmp_path):
    settings = replace(QUICK, train_subset_size=None, test_subset_size=None, epochs=3)
    records = train(settings, tmp_path / "run", quiet=True, save_model=True)
    assert records[-1]["test_acc"] > 0.5 and records[-1]["train_loss"] < records[0]["train_loss"]
    folder = tmp_path / "run"
    assert [
        json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()
    ] == records
    assert json.loads((folder / "settings.json").read_text())["ranks"] == "4,5,5"
    assert (folder / "curves.png").stat().st_size > 5000
    again = InfPiConvNet.from_state_dict(load(folder / "model.th"))
    data = load_images("digits")
    assert evaluate(again, data.test_x, data.test_y, 100)[1] == records[-1]["test_acc"]


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"ema": 0.9, "cutout": 3, "shift": 1, "label_smoothing": 0.1},
        {"optimizer": "sgd", "scheduler": "cosine", "lr": 0.2, "wd": 1e-4},
    ],
)
def test_a_run_stopped_in_the_middle_of_an_epoch_goes_on_bit_for_bit(change):
    settings, data = replace(QUICK, **change), load_images("digits", train_size=192, test_size=64)

    def run(trainer, steps):
        for _ in range(steps):
            ids, x, y = next(iter(trainer.batches))
            trainer.step(ids, x, y)
        return trainer

    whole = run(Trainer(settings, data, torch.device("cpu")), 5)
    first = run(Trainer(settings, data, torch.device("cpu")), 3)
    second = Trainer(settings, data, torch.device("cpu"))
    second.load_state(first.state())
    run(second, 2)
    for a, b in zip(whole.net.parameters(), second.net.parameters()):
        assert torch.equal(a, b)
    if whole.ema is not None:
        assert all(
            torch.equal(a, b) for a, b in zip(whole.ema.parameters(), second.ema.parameters())
        )
        assert not torch.equal(next(whole.ema.parameters()), next(whole.net.parameters()))
    assert whole.optimizer.param_groups[0]["lr"] == second.optimizer.param_groups[0]["lr"]


@pytest.mark.slow
def test_an_interrupted_command_says_how_to_go_on_and_does(tmp_path):
    command = [
        sys.executable,
        "-m",
        "experiments.cifar10.cifar10conv",
        *FLAGS,
        "--batch-size",
        "1",
        "--epochs",
        "40",
        "--quiet",
        "--save-dir",
        str(tmp_path / "run"),
    ]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not (tmp_path / "run" / "metrics.jsonl").is_file() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "cifar10conv --resume --save-dir" in output, errors
    state = load(tmp_path / "run" / "checkpoint.pt")
    assert 1 <= state["extras"]["epoch"] < 40


def test_several_networks_in_one_command(tmp_path, capsys):
    flags = [
        *FLAGS,
        "--epochs",
        "1",
        "--beside",
        "batchnorm:4,mup:8,twin:16",
        "--save-dir",
        str(tmp_path / "run"),
    ]
    records = main(flags)
    assert [record["network"] for record in records] == [
        "infinite, ranks 4,5",
        "batchnorm, 4 channels",
        "mup, 8 channels",
        "twin, 16 channels",
    ]
    assert (tmp_path / "run" / "compare.png").is_file() and (
        tmp_path / "run" / "mup8" / "metrics.jsonl"
    ).is_file()
    assert "infinite, ranks 4,5" in capsys.readouterr().out
    assert main([*flags, "--resume"]) == records
    conv_results.main([str(tmp_path / "run"), "--out", str(tmp_path / "results")])
    lines = (tmp_path / "results" / "table.md").read_text().splitlines()
    assert len(lines) == 2 + 4
    assert lines[2].startswith(
        f"| infinite, ranks 4,5, adam | {records[0]['parameters']:,} | 1 | 1 of 1 |"
    )
    with pytest.raises(SystemExit):
        conv_results.main([str(tmp_path / "nothing"), "--out", str(tmp_path / "results")])
    assert "metrics.jsonl is missing" in capsys.readouterr().err


def test_networks_are_of_the_same_shape():
    data = load_images("digits", train_size=8, test_size=8)
    settings = replace(QUICK, ranks="4,5,5", pools="2,1", shortcuts="1-2")
    infinite = build(settings, data)
    twin = build(replace(settings, network="twin", width=12), data)
    assert isinstance(twin, FinPiConvNetSample) and twin.layers[0].weight.shape == (12, 1, 3, 3)
    for kind in ("batchnorm", "mup"):
        net = build(replace(settings, network=kind, width=12), data)
        assert isinstance(net, ReLUConvNet) and len(net.convs) == len(infinite.layers) - 1
        assert net(data.train_x).shape == infinite(data.train_x).shape
    wide = build(replace(settings, network="mup", width=4 * BASE_WIDTH), data)
    # input, hidden, readout, its bias
    for kind, factors in (("adam", [1, 1 / 4, 1 / 4, 1]), ("sgd", [4, 1, 1 / 4, 1])):
        assert [group["lr"] for group in groups(wide, replace(settings, optimizer=kind))] == [
            settings.lr * f for f in factors
        ]


@pytest.mark.parametrize("kind, lr", [("sgd", 0.5), ("adam", 0.003)])
def test_features_of_a_mu_network_move_alike_at_every_width(kind, lr):
    """The definition of μP: a few steps change pre-activations by as much in a wide network as in a
    narrow one."""
    data = load_images("digits", train_size=32, test_size=8)
    moved = []
    for width in (32, 256):
        settings = replace(
            QUICK, network="mup", width=width, optimizer=kind, lr=lr, ranks="4,4", pools="1"
        )
        torch.manual_seed(0)
        net = build(settings, data)
        optimizer = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[kind](
            groups(net, settings), lr
        )
        seen = []
        for _ in range(5):
            with torch.no_grad():
                seen.append(net.convs[1](torch.relu(net.convs[0](data.train_x))))
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(data.train_x), data.train_y).backward()
            optimizer.step()
        moved.append(((seen[-1] - seen[0]).norm() / seen[0].norm()).item())
    assert moved[0] > 0.01 and 0.5 < moved[1] / moved[0] < 2


def test_images_are_mirrored_by_default_only_where_that_is_the_same_class():
    assert Settings().flips is True and Settings(dataset="digits").flips is False
    assert Settings(dataset="digits", flips=True).flips is True


def test_a_few_images_do_not_change_the_number_of_classes(tmp_path):
    assert load_images("digits", train_size=1, test_size=8).classes == 10
    train(replace(QUICK, train_subset_size=2, epochs=1), tmp_path / "run", quiet=True)


def test_a_network_beside_that_never_got_to_a_checkpoint_is_begun_again(tmp_path):
    flags = [
        *FLAGS,
        "--epochs",
        "1",
        "--beside",
        "batchnorm:4",
        "--quiet",
        "--save-dir",
        str(tmp_path / "run"),
    ]
    records = main(flags)
    for name in ("checkpoint.pt", "metrics.jsonl"):  # as after a crash in its first epoch
        (tmp_path / "run" / "batchnorm4" / name).unlink()
    again = main([*flags, "--resume"])
    assert [record["test_acc"] for record in again] == [record["test_acc"] for record in records]


def test_cutout_covers_a_square_at_most():
    x = cutout(torch.ones(200, 2, 8, 9), 4, torch.Generator().manual_seed(0))
    holes = (x == 0).sum((2, 3))
    assert (
        torch.equal(holes[:, 0], holes[:, 1]) and int(holes.max()) == 16 and int(holes.min()) >= 4
    )
    assert len(torch.unique(x.flatten(1), dim=0)) > 30


def test_errors_say_what_to_change(tmp_path, capsys):
    for flags, message in (
        (["--pools", "2,2"], "one entry less"),
        (["--ranks", "4,x"], "numbers separated by commas"),
        (["--network", "mup"], "a finite network has a width"),
        (["--width", "8"], "one has none"),
        (["--beside", "relu:4"], "'relu:4' is not one of twin, mup, batchnorm"),
        (["--ema", "1"], "--ema 1.0"),
        (["--epochs", "0"], "--epochs must be at least 1"),
        (["--resume"], "--resume needs the --save-dir"),
    ):
        with pytest.raises(SystemExit):
            main(
                [
                    *FLAGS,
                    "--quiet",
                    *([] if "--resume" in flags else ["--save-dir", str(tmp_path / "none")]),
                    *flags,
                ]
            )
        assert message in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    train(replace(QUICK, epochs=1), tmp_path / "run", quiet=True)
    with pytest.raises(FileExistsError, match="already holds a run"):
        train(replace(QUICK, epochs=1), tmp_path / "run", quiet=True)
    with pytest.raises(ValueError, match="schedule of 6 steps, which can't be continued"):
        train(replace(QUICK, epochs=2), tmp_path / "run", quiet=True, resume=True)
    with pytest.raises(FloatingPointError, match="the loss of step"):
        train(replace(QUICK, lr=1e30, gclip=0, epochs=3), tmp_path / "wild", quiet=True)
    assert (
        len(beside("mup:4,twin:8", QUICK, 0.5, 7)) == 2
        and beside("mup:4", QUICK, 0.5, 7)[0].epochs == 7
    )
