"""The plain implementation's command on a small set in CIFAR-10's published format, made here."""

import csv
import pickle

import numpy as np
import pytest
import torch

from pilimit_lib.inf import InfMLP
from pilimit_orig.cifar10.cifar10infmlp import main
from pilimit_orig.cifar10.data import TEST, TRAIN, load
from pilimit_orig.inf import InfPiMLP
from tests.pilimit_orig.test_untrusted import Evil

SMALL = ["--r", "8", "--epochs", "2", "--batch-size", "10", "--lr", "0.5", "--quiet"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Ten classes told apart by the mean colour of the upper half, 20 training images a file."""
    folder = tmp_path_factory.mktemp("data") / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (10, 3, 1, 1))
    for name in TRAIN + TEST:
        labels = [int(l) for l in rng.integers(0, 10, 20)]
        pictures = rng.integers(0, 256, (20, 3, 32, 32))
        pictures[:, :, :16] = 0.3 * pictures[:, :, :16] + 0.7 * colours[labels]
        batch = {
            b"data": pictures.astype(np.uint8).reshape(20, 3072),
            b"labels": labels,
            b"batch_label": b"made",
        }
        (folder / name).write_bytes(pickle.dumps(batch, 2))
    return folder.parent


def run(images, tmp_path, *flags):
    return main(["--data", str(images), *SMALL, "--save-dir", str(tmp_path / "run"), *flags])


def test_images_are_normalised_per_channel(images):
    x, y, test_x, test_y = load(str(images))
    assert x.shape == (100, 3072) and test_x.shape == (20, 3072) and y.dtype == torch.int64
    channels = x.reshape(100, 3, 1024)
    assert (
        channels.mean((0, 2)).abs().max() < 1e-4 and (channels.std((0, 2)) - 1).abs().max() < 1e-4
    )


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--layernorm", "--momentum", "0.5", "--scheduler", "cosine", "--loss", "mse"],
        ["--width", "32"],
        ["--bias-alpha", "0", "--depth", "1", "--last-layer-grad-no-alpha"],
        ["--width", "32", "--no-Gproj", "--tie-omegas"],
        ["--width", "32", "--gaussian-init", "--momentum", "0.5"],
    ],
    ids=str,
)
def test_every_kind_of_network_trains_and_resumes_bit_for_bit(flags, images, tmp_path):
    whole = run(images, tmp_path, *flags, "--gclip-drop-milestones", "1")
    with open(tmp_path / "run" / "metrics.csv", newline="") as file:
        assert [float(row["test_loss"]) for row in csv.DictReader(file)] == [
            record["test_loss"] for record in whole
        ]
    if "--scheduler" in flags:  # the cosine depends on the number of epochs
        return
    again = [
        "--data",
        str(images),
        *SMALL,
        "--save-dir",
        str(tmp_path / "half"),
        *flags,
        "--gclip-drop-milestones",
        "1",
    ]
    main([*again, "--epochs", "1"])
    resumed = main([*again, "--resume"])
    for name in ("train_loss", "test_loss", "test_acc", "rows"):
        assert [record[name] for record in resumed] == [record[name] for record in whole], name


def test_it_learns(images, tmp_path):
    records = run(
        images, tmp_path, "--epochs", "15", "--r", "32", "--last-layer-lr-mult", "4", "--gclip", "1"
    )
    assert (
        records[-1]["test_acc"] > 0.5 and records[-1]["train_loss"] < 0.5 * records[0]["train_loss"]
    )


def test_the_saved_network_opens_in_both_libraries(images, tmp_path):
    records = run(images, tmp_path, "--save-model", "--layernorm", "--last-bias-alpha", "0.25")
    path = tmp_path / "run" / "checkpoint.th"
    _, _, x, y = load(str(images))
    ours, plain = InfMLP.from_pilimit_orig(path), InfPiMLP.load(path)
    with torch.no_grad():
        assert torch.allclose(ours(x), plain.predict(x), atol=1e-5)
    assert float((plain.predict(x).argmax(1) == y).double().mean()) == records[-1]["test_acc"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--depth", "0"], "--depth is 0"),
        (["--gaussian-init"], "give a --width"),
        (["--width", "4"], "below --r"),
        (["--scheduler", "multistep"], "belong together"),
        (["--lr-drop-milestones", "x", "--scheduler", "multistep"], "got 'x'"),
        (["--train-subset-size", "999"], "there are 100"),
        (["--data", "/absent"], "no data_batch_1"),
        (["--cycarr"], "unrecognized"),
        (["--width", "16", "--save-model"], "infinite networks"),
    ],
)
def test_what_cannot_be_meant_is_said(flags, message, images, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(images, tmp_path, *flags)
    assert message in capsys.readouterr().err


def test_a_run_is_not_overwritten_and_not_resumed_with_other_settings(images, tmp_path, capsys):
    run(images, tmp_path, "--epochs", "1")
    for flags, message in (
        (["--epochs", "1"], "already holds a run"),
        (["--resume", "--wd", "0.5"], "other settings: wd"),
    ):
        with pytest.raises(SystemExit):
            run(images, tmp_path, *flags)
        assert message in capsys.readouterr().err


def test_a_malicious_or_damaged_batch_is_refused(images, tmp_path, capsys):
    folder = tmp_path / "evil"
    folder.mkdir()
    for name in TRAIN + TEST:
        (folder / name).write_bytes((images / "cifar-10-batches-py" / name).read_bytes())
    whole = (folder / TRAIN[2]).read_bytes()
    for content in (
        pickle.dumps({b"data": Evil(tmp_path / "executed"), b"labels": []}),
        whole[:5000],
        b"",
        b"hello",
    ):
        (folder / TRAIN[2]).write_bytes(content)
        with pytest.raises(SystemExit):
            main(["--data", str(folder), *SMALL])
        assert "data_batch_3 is not a batch of CIFAR-10 or is damaged" in capsys.readouterr().err
    assert not (tmp_path / "executed").exists()
