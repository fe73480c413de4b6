"""The CIFAR-10 command as a user runs it: flags, files, interruption and resumption, errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiments.cifar10 import cifar10mlp
from experiments.cifar10.cifar10mlp import Settings, Trainer, loss_of, main, parser, train
from experiments.imagenet.settings import Settings as TransferSettings
from experiments.training.flags import milestones
from experiments.training.images import Batches, load_images
from experiments.training.process import human_bytes
from experiments.training.run_folder import RunFolder
from pilimit_lib.core import load
from pilimit_lib.inf import FinPiMLPSample, InfMLP

ROOT = Path(__file__).resolve().parents[2]
CIFAR = ROOT.parent / "shared" / "data"
SMALL = [
    "--train-subset-size",
    "120",
    "--test-subset-size",
    "60",
    "--r",
    "12",
    "--epochs",
    "2",
    "--quiet",
]


def run(tmp_path, *flags):
    return main([*SMALL, "--save-dir", str(tmp_path / "run"), *flags])


def test_a_run_leaves_settings_metrics_curves_and_a_checkpoint(tmp_path):
    records = run(tmp_path, "--save-model", "--lr", "0.5")
    folder = tmp_path / "run"
    assert json.loads((folder / "settings.json").read_text())["lr"] == 0.5
    assert [
        json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()
    ] == records
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert records[-1]["rows"] == 3 * (12 + 2 * 120)
    assert records[-1]["train_loss"] < records[0]["train_loss"]
    net = InfMLP.from_state_dict(load(folder / "model.th"))
    assert net.rows == [252] * 3 and net.r == 12
    # Rows know the sample that made them: each of the two epochs showed every image once.
    assert torch.bincount(net.layers[1].origin[12:]).tolist() == [2] * 120


@pytest.mark.parametrize(
    "flags, kind, project",
    [
        (["--width", "32"], FinPiMLPSample, True),
        (["--width", "32", "--gaussian-init"], FinPiMLPSample, False),
        (
            ["--layernorm", "--loss", "mse", "--scheduler", "cosine", "--momentum", "0.5"],
            InfMLP,
            None,
        ),
        (
            [
                "--accum-steps",
                "3",
                "--data-augment",
                "--gclip",
                "0",
                "--depth",
                "0",
                "--bias-alpha",
                "0",
            ],
            InfMLP,
            None,
        ),
        (
            [
                "--scheduler",
                "multistep",
                "--lr-drop-milestones",
                "1",
                "--gclip-drop-milestones",
                "1",
            ],
            InfMLP,
            None,
        ),
    ],
)
def test_every_kind_of_network_trains(tmp_path, monkeypatch, flags, kind, project):
    built = []
    monkeypatch.setattr(cifar10mlp, "Trainer", lambda *a: built.append(Trainer(*a)) or built[0])
    records = run(tmp_path, *flags)
    assert len(records) == 2 and all(0 < record["test_loss"] < 5 for record in records)
    assert isinstance(built[0].net, kind)
    if project is not None:
        assert built[0].net.layers[0].project is project


def test_schedules_lower_rate_and_clip_at_their_milestones():
    settings = Settings(
        train_subset_size=16,
        test_subset_size=8,
        r=4,
        epochs=3,
        lr=1.0,
        scheduler="multistep",
        lr_drop_milestones="1,2",
        lr_drop_ratio=0.1,
        gclip=0.4,
        gclip_drop_milestones="2",
        gclip_drop_ratio=0.5,
    )
    trainer = Trainer(
        settings, load_images("digits", train_size=16, test_size=8), torch.device("cpu")
    )
    rates, clips = [], []
    for _ in range(3):
        rates.append(trainer.optimizer.param_groups[1]["lr"])
        clips.append(trainer.clip)
        trainer.run_epoch([], quiet=True)
    assert rates == pytest.approx([1.0, 0.1, 0.01]) and clips == [0.4, 0.4, 0.2]


def test_accumulating_equals_one_larger_batch():
    """Four batches of 4 accumulated are one batch of 16: the same losses, rows and parameters."""
    data = load_images("digits", train_size=48, test_size=8)
    nets = []
    for size, steps in ((16, 1), (4, 4)):
        trainer = Trainer(
            Settings(r=6, batch_size=size, accum_steps=steps, lr=0.3), data, torch.device("cpu")
        )
        trainer.net.double()
        trainer.batches.x = trainer.batches.x.double()
        for ids, x, y in trainer.batches:
            trainer.step(ids, x, y)
        nets.append(trainer.net)
    x = data.test_x.flatten(1).double()
    assert nets[0].rows == nets[1].rows == [54] * 3
    torch.testing.assert_close(nets[0](x), nets[1](x), rtol=1e-10, atol=1e-12)


def test_resuming_a_finished_epoch_equals_never_having_stopped(tmp_path):
    flags = ["--momentum", "0.9", "--lr", "0.1", "--data-augment", "--scheduler", "cosine"]
    flags += ["--implementation", "plain"]  # as a trainer on its own sums
    whole = main([*SMALL, "--save-dir", str(tmp_path / "whole"), *flags])
    trainer = Trainer(
        _settings([*SMALL, *flags]),
        load_images("digits", train_size=120, test_size=60),
        torch.device("cpu"),
    )
    trainer.run_epoch([], quiet=True)
    with RunFolder(tmp_path / "parts", cifar10mlp.asdict(trainer.settings)) as folder:
        folder.save(trainer.state())
    parts = main([*SMALL, "--save-dir", str(tmp_path / "parts"), *flags, "--resume"])
    _same_state(
        load(tmp_path / "whole" / "checkpoint.pt"), load(tmp_path / "parts" / "checkpoint.pt")
    )
    assert _without_times(whole) == _without_times(parts)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--cycarr"], "had no effect in the original"),
        (["--bogus"], "unknown arguments: --bogus"),
        (["--gaussian-init"], "give its --width"),
        (["--resume"], "needs the --save-dir"),
        (["--test"], "needs a --model-path"),
        (["--scheduler", "multistep"], "belong together"),
        (["--lr-drop-milestones", "3"], "belong together"),
        (["--gclip", "0", "--gclip-drop-milestones", "3"], "no clipping"),
        (["--teacher-temp", "2"], "need a --teacher-path"),
        (["--epochs", "0"], "at least 1"),
        (["--held-out", "-1"], "must not be negative"),
        (["--label-smoothing", "1"], "at least 0 and below 1"),
        (["--label-smoothing", ".1", "--loss", "mse"], "belongs to --loss xent"),
        (["--average-from", "9", "--memory", "moments"], "from 1 to --epochs 8"),
        (["--average-from", "2"], "parameters that keep their sizes"),
        (["--lr-drop-milestones", "x"], "separated by commas"),
        (["--dataset", "mnist"], "invalid choice"),
        (["--wd", "-1"], "must not be negative"),
        (["--augment-shift", "2"], "which it needs"),
    ],
)
def test_bad_command_lines_say_what_to_do(capsys, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(flags)
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_cuda_without_a_gpu_is_an_error(capsys, tmp_path):
    with pytest.raises(SystemExit):
        run(tmp_path, "--cuda")
    assert (
        "torch finds no CUDA device" in capsys.readouterr().err and not (tmp_path / "run").exists()
    )


def test_a_run_is_not_overwritten_or_resumed_with_other_settings(capsys, tmp_path):
    run(tmp_path)
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    for flags, message in (
        (["--lr", "0.3"], "already holds a run"),
        (["--lr", "0.3", "--resume"], "lr: 1.0 then, 0.3 now"),
    ):
        with pytest.raises(SystemExit):
            run(tmp_path, *flags)
        assert message in capsys.readouterr().err
        assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    run(tmp_path, "--lr", "0.3", "--overwrite")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() != before


def test_a_cosine_schedule_is_not_continued_beyond_its_end(capsys, tmp_path):
    flags = [*SMALL, "--scheduler", "cosine", "--save-dir", str(tmp_path)]
    main([*flags, "--epochs", "1"])
    with pytest.raises(SystemExit):
        main([*flags, "--epochs", "2", "--resume"])
    assert "schedule of 1 steps" in capsys.readouterr().err


def test_a_file_in_the_place_of_the_folder_is_left_alone(capsys, tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(SystemExit):
        run(tmp_path)
    assert "is a file" in capsys.readouterr().err and (tmp_path / "run").read_text() == "mine"


def test_a_missing_data_set_names_the_folder(capsys, tmp_path, monkeypatch):
    pytest.importorskip("torchvision")
    from torchvision import datasets

    monkeypatch.setattr(
        datasets.CIFAR10, "download", lambda self: (_ for _ in ()).throw(OSError("no network"))
    )
    with pytest.raises(SystemExit):
        main(
            [
                "--dataset",
                "cifar10",
                "--data",
                str(tmp_path / "nowhere"),
                "--save-dir",
                str(tmp_path / "run"),
            ]
        )
    assert (
        "pass the folder that holds it with --data" in capsys.readouterr().err
        and not (tmp_path / "run").exists()
    )


def test_saved_networks_are_tested_and_taught_from(tmp_path, capsys):
    records = run(tmp_path, "--save-model")
    model = str(tmp_path / "run" / "model.th")
    loss, accuracy = main([*SMALL, "--test", "--model-path", model])
    assert (loss, accuracy) == pytest.approx((records[-1]["test_loss"], records[-1]["test_acc"]))
    taught = main(
        [
            *SMALL,
            "--teacher-path",
            model,
            "--teacher-temp",
            "2",
            "--save-dir",
            str(tmp_path / "taught"),
        ]
    )
    assert len(taught) == 2
    with pytest.raises(SystemExit):
        main([*SMALL, "--r", "13", "--test", "--model-path", model])
    assert "does not fit this InfMLP" in capsys.readouterr().err


def test_losses_are_what_they_are_called():
    output, y, teacher = (
        torch.randn(5, 4).double(),
        torch.tensor([0, 1, 2, 3, 3]),
        torch.randn(5, 4).double(),
    )
    centred = torch.eye(4).double()[y] - 0.25
    torch.testing.assert_close(
        loss_of(Settings(loss="mse"), output, y), (output - centred).square().mean()
    )
    p, q = (teacher / 2).softmax(1), (output / 2).softmax(1)
    soft = (p * (p / q).log()).sum(1).mean() * 4
    hard = -output.log_softmax(1)[torch.arange(5), y].mean()
    settings = Settings(teacher_path="x", teacher_alpha=0.3, teacher_temp=2.0)
    torch.testing.assert_close(loss_of(settings, output, y, teacher), 0.7 * hard + 0.3 * soft)


def test_batches_show_every_sample_once_and_move_images_by_whole_pixels():
    x, y = torch.arange(24.0).reshape(6, 1, 2, 2) + 1, torch.arange(6)
    batches = Batches(x, y, 4, seed=0)
    first = torch.cat([ids for ids, _, _ in batches])
    second = torch.cat([ids for ids, _, _ in batches])
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(6)) and not torch.equal(
        first, second
    )
    moved = Batches(x, y, 6, seed=0, shift=1, flips=True)
    for ids, images, _ in moved:
        for number, image in zip(ids, images):
            canvas = torch.nn.functional.pad(x[number], [1] * 4)
            options = [
                c[:, i : i + 2, j : j + 2]
                for c in (canvas, torch.nn.functional.pad(x[number].flip(2), [1] * 4))
                for i in range(3)
                for j in range(3)
            ]
            assert any(torch.equal(image, option) for option in options)


def test_augmentation_moves_images_as_far_as_asked():
    data = load_images("digits", train_size=20, test_size=10)
    shifts = {
        value: Trainer(
            Settings(data_augment=True, augment_shift=value, r=4), data, torch.device("cpu")
        ).batches.shift
        for value in (None, 0, 3)
    }
    assert shifts == {None: 1, 0: 0, 3: 3}


@pytest.mark.slow
@pytest.mark.skipif(
    not CIFAR.is_dir(), reason="the packed CIFAR-10 beside the checkout (../shared/data) is absent"
)
def test_the_printed_command_runs_on_real_cifar10(tmp_path):
    """The seed's command line with `--cuda` replaced by `--float`, at a smaller rank, subset and
    number of epochs."""
    subprocess.run([sys.executable, CIFAR / "unpack.py", tmp_path / "data", "cifar10"], check=True)
    flags = (
        "--lr 1.0 --gclip-per-param --gclip 0.4 --lr-drop-ratio 0.15 --lr-drop-milestones 40 "
        "--scheduler multistep "
        "--wd 0.00001 --r 400 --batch-size 8 --epochs 50 --width 0 --float --seed 0 --depth 2 "
        "--bias-alpha 0.5 "
        "--first-layer-lr-mult 0.1 --last-layer-lr-mult 4.0 --first-layer-alpha 1.0 "
        "--last-layer-alpha 0.5 "
        "--no-apply-lr-mult-to-wd"
    ).split()
    small = [
        "--r",
        "32",
        "--epochs",
        "2",
        "--train-subset-size",
        "4000",
        "--test-subset-size",
        "2000",
        "--quiet",
    ]
    places = [
        "--dataset",
        "cifar10",
        "--data",
        str(tmp_path / "data"),
        "--save-dir",
        str(tmp_path / "run"),
    ]
    records = main([*flags, *small, *places])
    # Chance is .1 with a standard error of .007 on 2,000 images; so short a run is not expected to
    # do more than leave it.
    assert records[-1]["test_acc"] > 0.15 and records[-1]["train_loss"] < records[0]["train_loss"]


def test_small_helpers():
    assert milestones("3, 5,") == [3, 5] and human_bytes(1536) == "1.5 kB"
    with pytest.raises(ValueError, match="already has|no data set"):
        load_images("mnist")
    with pytest.raises(ValueError, match="a subset of 9999"):
        load_images("digits", train_size=9999)
    assert train.__doc__ and parser().prog.endswith("cifar10mlp")


def test_held_out_images_are_tested_and_not_trained_on(tmp_path):
    records = run(tmp_path, "--held-out", "40")
    assert records[-1]["rows"] == 3 * (12 + 2 * 80)  # rows of 80 images, not of 120
    trainer = trainer_of(["--held-out", "40", *SMALL])
    data = trainer.data
    assert len(data.held_out_y) == 40
    trainer.run_epoch([])
    with torch.no_grad():
        right = (trainer.net(data.held_out_x.flatten(1)).argmax(1) == data.held_out_y).double()
    assert trainer.records[0]["held_out_acc"] == pytest.approx(right.mean().item())


def trainer_of(flags):
    settings = _settings(flags)
    data = cifar10mlp.images_of(settings).hold_out(settings.held_out)
    return Trainer(settings, data, torch.device("cpu"))


def test_the_average_is_that_of_the_networks_at_the_ends_of_epochs(tmp_path):
    flags = [*SMALL, "--memory", "moments", "--epochs", "3", "--average-from", "2", "--lr", "0.3"]
    trainer, states = trainer_of(flags), []
    for _ in range(3):
        trainer.run_epoch([])
        states.append({name: p.detach().clone() for name, p in trainer.net.named_parameters()})
    for name, parameter in trainer.average.module.named_parameters():
        torch.testing.assert_close(parameter, (states[1][name] + states[2][name]) / 2)
    assert "average_test_acc" not in trainer.records[0]
    with torch.no_grad():
        outputs = trainer.average.module(trainer.data.test_x.flatten(1))
    right = (outputs.argmax(1) == trainer.data.test_y).double().mean().item()
    assert trainer.records[2]["average_test_acc"] == pytest.approx(right)
    # it is part of the checkpoint
    again = trainer_of(flags)
    again.load_state(trainer.state())
    for one, two in zip(again.average.parameters(), trainer.average.parameters()):
        assert torch.equal(one, two)


def test_label_smoothing_is_that_of_training_alone():
    output, y = torch.randn(7, 10, generator=torch.Generator().manual_seed(0)), torch.arange(7)
    logs = output.log_softmax(1)
    smoothed = -(0.9 * logs[torch.arange(7), y] + 0.1 * logs.mean(1)).mean()
    settings = Settings(label_smoothing=0.1)
    torch.testing.assert_close(loss_of(settings, output, y, label_smoothing=0.1), smoothed)
    torch.testing.assert_close(loss_of(settings, output, y), -logs[torch.arange(7), y].mean())


def test_what_is_not_the_papers_network_on_cifar10_is_said():
    assert "--depth 2 is two hidden π-layers" in Settings(dataset="cifar10").note_on_depth()
    assert "one: --depth 1" in Settings(dataset="cifar10", depth=0).note_on_depth()
    assert not Settings(dataset="cifar10", depth=1).note_on_depth()
    assert "on ImageNet32 has one" in TransferSettings().note_on_depth()
    assert not Settings(depth=3).note_on_depth()
    assert "the paper: 1, which its code, counting stages" in " ".join(
        parser().format_help().split()
    )


def test_that_is_said_before_training(tmp_path, capsys, monkeypatch):
    digits = load_images("digits", train_size=20, test_size=10)
    monkeypatch.setattr(cifar10mlp, "images_of", lambda settings: digits)
    flags = ["--dataset", "cifar10", "--r", "6", "--epochs", "1", "--overwrite"]
    for depth, said in (("2", True), ("1", False)):
        main([*flags, "--depth", depth, "--save-dir", str(tmp_path / "run")])
        out = capsys.readouterr().out
        assert ("two hidden π-layers" in out) is said
        assert not said or out.index("two hidden") < out.index("train loss")


def test_a_run_older_than_a_setting_had_its_default(tmp_path):
    run(tmp_path, "--epochs", "1")
    path = tmp_path / "run" / "settings.json"
    known = json.loads(path.read_text())
    del known["held_out"]
    path.write_text(json.dumps(known))
    assert len(run(tmp_path, "--resume")) == 2
    known.pop("held_out", None)
    path.write_text(json.dumps(known))
    with pytest.raises(SystemExit):
        run(tmp_path, "--resume", "--epochs", "3", "--held-out", "20")


def _settings(flags):
    known = parser().parse_args(flags)
    return Settings(**{name: getattr(known, name) for name in Settings.__dataclass_fields__})


def _without_times(records):
    times = Trainer.clocks
    return [{key: value for key, value in record.items() if key not in times} for record in records]


def _same_state(one, two):
    for state in (one, two):
        for clock in Trainer.clocks:
            state["extras"]["sums"].pop(clock)
        state["extras"]["records"] = _without_times(state["extras"]["records"])
    _same(one, two, "checkpoint")


def _same(one, two, where):
    assert type(one) is type(two), where
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two), where
    elif isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for key in one:
            _same(one[key], two[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(two), where
        for i, (a, b) in enumerate(zip(one, two)):
            _same(a, b, f"{where}[{i}]")
    else:
        assert one == two, where
