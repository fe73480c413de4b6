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
from experiments.cifar10.conv_networks import BASE_WIDTH, ReLUConvNet, build, groups, megaflops
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


RECIPES = {
    "whiten": True,
    "norm": "scalar",
    "start_degree": 1,
    "high_degree_lr": 0.3,
    "noise_width": 64,
    "betas": "0.8,0.9",
    "scheduler": "multistep",
    "lr_drop_milestones": "1",
    "strides": "1,2",
    "kernels": "3,1,3",
    "padding_mode": "reflect",
    "shortcuts": "0-1",
    "ranks": "4,4,5",
    "pools": "1,1",
}


def test_recipes_reach_the_network_and_go_on_bit_for_bit():
    settings, data = replace(QUICK, **RECIPES), load_images("digits", train_size=96, test_size=64)
    settings.check()

    def run(trainer, steps):
        while steps:
            for item in trainer.batches:
                trainer.step(*item)
                steps -= 1
                if not steps:
                    break
        return trainer

    whole = run(Trainer(settings, data, torch.device("cpu")), 5)
    assert whole.optimizer.param_groups[0]["lr"] == pytest.approx(settings.lr * 0.1)
    assert whole.optimizer.param_groups[0]["betas"] == (0.8, 0.9)
    net = whole.net
    assert net.norm == "scalar" and net.noise_width == 64 and net.padding_mode == "reflect"
    assert net.strides == (1, 2) and net.kernels == (3, 1, 3) and net.start_degree == 1
    start = net.layers[1].features.starts[2]
    assert 0 < net.layers[1].V[start:].abs().max() < 0.5 * net.layers[1].V[:start].abs().max()
    # taken before the second is made, which seeds the generator that noise comes from
    state = run(Trainer(settings, data, torch.device("cpu")), 2).state()
    second = Trainer(settings, data, torch.device("cpu"))
    second.load_state(state)
    run(second, 3)
    for a, b in zip(net.state_dict().values(), second.net.state_dict().values()):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind, width", [("infinite", 0), ("twin", 512), ("plain", 64)])
def test_every_kind_of_network_can_start_whitened(kind, width):
    data = load_images("digits", train_size=64, test_size=8)
    shape = {"strides": "1,2", "kernels": "3,1,3", "padding_mode": "replicate"}
    settings = replace(QUICK, network=kind, width=width, **shape)
    spread, nets = [], []
    for whiten in (False, True):
        torch.manual_seed(0)
        net = build(replace(settings, whiten=whiten), data)
        first = net.convs[0] if kind == "plain" else net.layers[0]
        inside = first(data.train_x)[:, :, 1:-1, 1:-1]  # patches that no border is part of
        h = inside.transpose(0, 1).flatten(1).double().detach()
        values = torch.linalg.eigvalsh(h @ h.T).flip(0)
        spread.append(float(values[0] / values[3]))
        nets.append({n: v for n, v in net.state_dict().items() if not n.endswith("s.0.weight")})
        assert net(data.train_x[:2]).shape == (2, 10)
    assert spread[1] < 2 and spread[1] < 0.75 * spread[0]
    for name, value in nets[0].items():  # the rest starts as it did
        assert torch.equal(value, nets[1][name])


def test_maps_stored_by_position_change_no_result():
    data = load_images("digits", train_size=64, test_size=8)
    settings = replace(QUICK, network="batchnorm", width=8)
    outputs = []
    for channels_last in (False, True):
        torch.manual_seed(0)
        net = build(replace(settings, channels_last=channels_last), data)
        assert net.convs[1].weight.is_contiguous(memory_format=torch.channels_last) == channels_last
        outputs.append(net(data.train_x))
    torch.testing.assert_close(*outputs)


def test_peers_at_several_rates_and_images_held_out(tmp_path, capsys):
    flags = [*FLAGS, "--epochs", "1", "--held-out", "16", "--quiet"]
    flags += ["--beside", "plain:4:.01,plain:4:.03,batchnorm:4", "--save-dir", str(tmp_path)]
    records = main(flags)
    assert [record["network"].split(",")[0] for record in records[1:]] == [
        "plain",
        "plain",
        "batchnorm",
    ]
    assert all(0 <= record["held_out_acc"] <= 1 for record in records)
    folders = {"plain4-lr0.01", "plain4-lr0.03", "batchnorm4"}
    assert {path.parent.name for path in tmp_path.glob("*/settings.json")} == folders
    assert main([*flags, "--resume"]) == records
    rows = conv_results.table(conv_results.collect([tmp_path])).splitlines()
    assert {row.split("|")[-2].strip() for row in rows[2:]} == {"0.01", "0.03"}
    for wrong, message in (
        (["--betas", ".9"], "--betas '.9' must be two numbers"),
        (["--scheduler", "multistep"], "belong together"),
        (["--kernels", "3,2"], "an odd number was expected"),
        (["--strides", "x"], "numbers separated by commas"),
        (["--beside", "plain:4:x"], "'plain:4:x' is not one of"),
    ):
        with pytest.raises(SystemExit):
            main([*FLAGS, "--quiet", "--save-dir", str(tmp_path / "none"), *wrong])
        assert message in capsys.readouterr().err


def test_flops_are_those_of_the_products():
    data = load_images("digits", train_size=8, test_size=8)
    settings = replace(QUICK, ranks="4,5", pools="2")
    P = build(settings, data).layers[1].P
    # 8x8 pixels to 4 ranks, a 4x4 pooled map by 9 offsets to 5 ranks, 16 positions to 10 classes
    first, middle = 64 * 9 * 4, 16 * 9 * P * 5
    readout = 16 * build(settings, data).layers[2].P * 10
    assert megaflops(build(settings, data), data.test_x) == 2e-6 * (first + middle + readout)
    plain = build(replace(settings, network="plain", width=6), data)
    expected = 64 * 9 * 6 + 16 * 9 * 36 + 60
    assert megaflops(plain, data.test_x) == 2e-6 * expected and plain.training
