"""ImageNet32 files made here in the published format, transfer end to end on them, resuming, costs,
and errors."""

from __future__ import annotations

import json
import pickle
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.imagenet import transfer_imagenet, transfers
from experiments.imagenet.classes import PAPER
from experiments.imagenet.cost import cost
from experiments.imagenet.imagenet32 import BATCHES, load_imagenet32, read_file
from experiments.imagenet.images import pretraining_data, transfer_data
from experiments.imagenet.settings import SOURCES, Settings
from experiments.imagenet.transfer_imagenet import main
from experiments.training.images import load_images
from pilimit_lib.core import load
from pilimit_lib.inf.gp import ReLUKernel

SEED_COMMAND = """--save-dir=./output/ --save-model --cuda --r 200 --lr=0.01 --batch-size=16
    --gclip=0  --epochs=40 --human --wd=0.0001 --bias-alpha=0.5 --first-layer-lr-mult=1.0
    --last-layer-lr-mult=1.0 --gclip-per-param""".split()


def images(labels: np.ndarray, seed: int) -> np.ndarray:
    """Bytes [n 3072] whose colour and stripes depend on the label, with noise."""
    rng = np.random.default_rng(seed)
    styles = np.random.default_rng(0).integers(30, 220, (1001, 3, 8, 8)).repeat(4, 2).repeat(4, 3)
    return (
        np.clip(styles[labels] + rng.normal(0, 40, (len(labels), 3, 32, 32)), 0, 255)
        .astype(np.uint8)
        .reshape(len(labels), -1)
    )


def write_set(folder: Path, classes: int = 10, per_batch: int = 12) -> Path:
    """A small set in the published files: dicts of data, labels from 1, and mean."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, seed in [
        *((f"train_data_batch_{k}", k) for k in range(1, BATCHES + 1)),
        ("val_data", 99),
    ]:
        labels = np.random.default_rng(seed).integers(1, classes + 1, per_batch)
        labels[0] = classes
        held = {"data": images(labels, seed), "labels": labels.tolist()}
        if name != "val_data":
            held["mean"] = held["data"].mean(0)
        (folder / name).write_bytes(pickle.dumps(held, protocol=2))
    return folder


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory) -> Path:
    return write_set(tmp_path_factory.mktemp("imagenet"))


@pytest.fixture(scope="module")
def cifar(tmp_path_factory) -> Path:
    """CIFAR-10's files with 20 images each, under their real names; torchvision checks their
    digests, so these are noted anew."""
    pytest.importorskip("torchvision")
    folder = tmp_path_factory.mktemp("cifar")
    batches = folder / "cifar-10-batches-py"
    batches.mkdir()
    for name in [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]:
        labels = np.arange(20) % 10
        (batches / name).write_bytes(
            pickle.dumps({"data": images(labels + 1, len(name)), "labels": labels.tolist()})
        )
    (batches / "batches.meta").write_bytes(
        pickle.dumps({"label_names": [str(k) for k in range(10)]})
    )
    return folder


@pytest.fixture
def small_cifar(cifar, monkeypatch):
    from torchvision import datasets

    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(datasets.CIFAR10, "meta", {**datasets.CIFAR10.meta, "md5": None})
    return cifar


# ---- the files


def test_the_published_format_is_read(imagenet):
    data = load_imagenet32(imagenet, quiet=True)
    assert (data.features, data.classes, len(data.train_x), len(data.test_y)) == (3072, 10, 120, 12)
    first = pickle.loads((imagenet / "train_data_batch_1").read_bytes())
    assert data.train_y[:12].tolist() == [label - 1 for label in first["labels"]]
    whole = torch.cat(list(data.train_x.split(50)))
    assert torch.allclose(whole.mean((0, 2, 3)), torch.zeros(3), atol=1e-4)
    assert torch.allclose(whole.std((0, 2, 3)), torch.ones(3), atol=1e-3)
    picked = data.train_x[torch.tensor([3, 1])]
    raw = torch.from_numpy(first["data"][[3, 1]]).view(2, 3, 32, 32).float()
    assert torch.allclose(
        picked, (raw - data.train_x.mean) / data.train_x.deviation
    ) and torch.equal(picked, whole[[3, 1]])
    assert len(load_imagenet32(imagenet, 30, 5, quiet=True).train_y) == 30


def test_some_classes_are_kept_in_the_order_that_is_asked_for(imagenet, tmp_path):
    whole = load_imagenet32(imagenet, quiet=True)
    few = load_imagenet32(imagenet, quiet=True, classes=(7, 2))
    for place, label in enumerate((7, 2)):
        of_class = whole.train_x.bytes[whole.train_y == label]
        assert torch.equal(few.train_x.bytes[few.train_y == place], of_class)
        assert (few.test_y == place).sum() == (whole.test_y == label).sum()
    assert few.classes == 2 and set(few.train_y.tolist()) == {0, 1}
    assert len(load_imagenet32(imagenet, 3, quiet=True, classes=(7, 2)).train_y) == 3
    with pytest.raises(ValueError, match="of none of the 2 classes .* --imagenet-classes all"):
        load_imagenet32(imagenet, quiet=True, classes=(500, 501))
    held = few.hold_out(4)
    assert held.held_out_x.bytes.dtype == torch.uint8 and len(held.held_out_y) == 4


def test_the_250_classes_are_those_of_the_paper():
    assert len(set(PAPER)) == len(PAPER) == 250 and 0 <= min(PAPER) <= max(PAPER) < 1000
    assert PAPER[:3] == (294, 828, 241) and PAPER[-1] == 390 and sum(PAPER) == 124_491
    assert Settings().imagenet_classes == "paper"
    # a run older than the flag had all
    assert Settings.before()["imagenet_classes"] == "all"


def test_what_is_missing_or_wrong_is_named_before_anything_is_read(imagenet, tmp_path):
    def held(**changed):
        good = {"data": images(np.ones(3, int), 0), "labels": [1, 2, 3], "mean": np.zeros(3072)}
        (tmp_path / "file").write_bytes(
            pickle.dumps({k: v for k, v in (good | changed).items() if v is not None})
        )
        return tmp_path / "file"

    assert read_file(held())[1].tolist() == [0, 1, 2]
    for changed, message in [
        ({"labels": [0, 1, 2]}, "labels in .* go from 0 to 2; 1 to 1000"),
        ({"labels": [1, 2, 1001]}, "1001"),
        ({"labels": [1, 2]}, r"3 images and labels of shape \[2\]"),
        ({"labels": None}, "data and labels"),
        ({"labels": [1.0, 2.0, 3.0]}, "whole number per image"),
        ({"mean": np.zeros(3)}, "mean in"),
        ({"data": np.zeros((3, 12288), np.uint8)}, "12288.*32 x 32 version"),
        ({"data": "x"}, "are str"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_file(held(**changed))
    (tmp_path / "file").write_bytes((imagenet / "val_data").read_bytes()[:-50])
    with pytest.raises(ValueError, match="damaged"):
        read_file(tmp_path / "file")
    for content in (
        b"\x80\x02X\xff\xff\xff\x7f",
        b"\x80\x02c_codecs\nencode\nX\x01\0\0\0aX\x04\0\0\0nope\x86R.",
        b"\x80\x04\x8e" + b"\xff" * 7 + b"\x0f",
    ):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(ValueError, match="damaged"):
            read_file(tmp_path / "file")
    with pytest.raises(
        FileNotFoundError, match="lacks train_data_batch_1, .*val_data.*image-net.org"
    ):
        load_imagenet32(tmp_path)
    other = write_set(tmp_path / "set")
    (other / "train_data_batch_7").unlink()
    with pytest.raises(FileNotFoundError, match="lacks train_data_batch_7: "):
        load_imagenet32(other)
    with pytest.raises(ValueError, match="12 test images there; a subset of 13"):
        load_imagenet32(imagenet, test_size=13, quiet=True)


def test_arrays_are_read_from_every_version_of_pickles(tmp_path):
    held = {"data": images(np.ones(3, int), 0), "labels": [1, 2, 3], "mean": np.zeros(3072)}
    for protocol in range(2, 6):
        for labels in (held["labels"], np.array(held["labels"])):
            (tmp_path / "file").write_bytes(pickle.dumps(held | {"labels": labels}, protocol))
            x, y = read_file(tmp_path / "file")
            assert np.array_equal(x.flatten(1).numpy(), held["data"]) and y.tolist() == [0, 1, 2]
    # as Python 2 wrote it: texts are bytes
    (tmp_path / "file").write_bytes(
        pickle.dumps({k.encode(): v for k, v in held.items()}, protocol=2)
    )
    assert read_file(tmp_path / "file")[1].tolist() == [0, 1, 2]


def test_an_array_that_is_forged_is_an_error_and_no_crash(tmp_path):
    """Where numpy itself puts arrays together, such files end in errors of every kind, without an
    exception, or in a crash."""

    class Made:
        """What a pickle makes by calling `maker`, and then gives a state."""

        def __init__(self, maker, args, state=None):
            self.made = (maker, args) if state is None else (maker, args, state)

        def __reduce__(self):
            return self.made

    def type_(name, flags, size):
        state = (3, "|", None, None, None, size, 1, flags)
        return Made(np.dtype, (name, False, True), state)

    begin = np.zeros(0, np.uint8).__reduce__()[:2]
    scalar = np.uint8(1).__reduce__()[0]
    forged = [
        Made(*begin, (1, (1, 3072), kind, False, data))
        for kind, data in (
            (np.dtype("u1"), b"x"),
            (np.dtype("u1"), None),
            (None, b"x" * 3072),
            (np.dtype("O"), b"A" * 8 * 3072),
            (np.dtype("O"), ["a"] * 3072),
            (type_("V8", 63, 8), b"A" * 8 * 3072),  # says of itself that it holds objects
            (type_("u1", 63, 8), b"A" * 8 * 3072),
            (type_("V1", 0, 1 << 40), b"x" * 3072),
        )
    ]
    forged += [
        Made(*begin, (1, (2**40, 3072), np.dtype("u1"), False, b"x")),
        Made(*begin, ()),
        Made(begin[0], (np.ndarray, (1 << 40,), b"b")),  # a terabyte
        Made(scalar, (type_("V8", 63, 8), b"A" * 8)),
        Made(scalar, (np.dtype("O"), b"A" * 8)),
    ]
    for number, array in enumerate(forged):
        held = pickle.dumps({"data": array, "labels": [1]}, protocol=2)
        (tmp_path / "file").write_bytes(held)
        with pytest.raises(ValueError, match=r"file is damaged|data in .*file are"):
            pytest.fail(f"forgery {number} was read: {read_file(tmp_path / 'file')}")


def test_a_file_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "file").write_bytes(pickle.dumps({"data": Evil(), "labels": [1]}))
    with pytest.raises(ValueError, match="which no file of ImageNet32 contains"):
        read_file(tmp_path / "file")
    assert not (tmp_path / "ran").exists()


# ---- training and transfer


SMALL = [
    "--imagenet-classes",
    "all",
    "--r",
    "12",
    "--depth",
    "1",
    "--lr",
    "0.3",
    "--batch-size",
    "10",
    "--epochs",
    "2",
    "--kernel-reg",
    "0.1",
    "--quiet",
]
KINDS = {
    "rows": [],
    "moments": ["--memory", "moments"],
    "finite": ["--width", "24"],
    "mu": ["--width", "24", "--gaussian-init"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_pretraining_and_transfer_run_end_to_end(imagenet, small_cifar, tmp_path, kind):
    records = main(
        [
            *SMALL,
            *KINDS[kind],
            "--imagenet-data",
            str(imagenet),
            "--cifar-data",
            str(small_cifar),
            "--transfer",
            "--transfer-milestones",
            "0,2",
            "--save-dir",
            str(tmp_path),
            "--save-model",
            "--save-epochs",
            "all",
        ]
    )
    assert records[1]["train_loss"] < records[0]["train_loss"]
    found = [json.loads(line) for line in (tmp_path / "transfers.jsonl").read_text().splitlines()]
    assert [(record["what"], record.get("epoch")) for record in found] == [
        ("features", 0),
        ("NNGP", None),
        ("features", 2),
    ]
    assert all(
        record["test_acc"] > 0.3 and record["train"] == 100 and record["test"] == 20
        for record in found
    )
    written = {path.name for path in tmp_path.iterdir()}
    assert {
        "model.th",
        "model_epoch_1.th",
        "model_epoch_2.th",
        "transfer.png",
        "curves.png",
        "settings.json",
    } <= written
    last, whole = load(tmp_path / "model_epoch_2.th"), load(tmp_path / "model.th")
    assert all(
        torch.equal(last[name], whole[name])
        for name in whole
        if isinstance(whole[name], torch.Tensor)
    )


def test_the_features_that_are_regressed_are_those_of_the_network(imagenet, small_cifar, tmp_path):
    """The recorded accuracy is that of a ridge regression written out on the saved network's
    embedding."""
    main(
        [
            *SMALL,
            "--imagenet-data",
            str(imagenet),
            "--cifar-data",
            str(small_cifar),
            "--transfer",
            "--save-dir",
            str(tmp_path),
            "--save-model",
            "--solve-kernel",
        ]
    )
    found = [json.loads(line) for line in (tmp_path / "transfers.jsonl").read_text().splitlines()]
    features = {
        record["reg"]: record["test_acc"]
        for record in found
        if record["what"] == "features" and "test_acc" in record
    }
    assert len(features) >= 5 and 0.1 in features
    from pilimit_lib.inf import InfMLP

    net = InfMLP.from_state_dict(load(tmp_path / "model.th"))
    data = transfer_data(Settings(cifar_data=str(small_cifar)))
    with torch.no_grad():
        train, test = (
            net.embedding(part.flatten(1)).double() for part in (data.train_x, data.test_x)
        )

    def kernel(a, b):
        angle = torch.acos((a @ b.T).clamp(-1, 1))
        return (torch.sin(angle) + (torch.pi - angle) * torch.cos(angle)) / (2 * torch.pi)

    K = kernel(train, train)
    targets = torch.nn.functional.one_hot(data.train_y, 10).double() - 0.1
    fitted = torch.linalg.solve(K + 0.1 * K.diagonal().mean() * torch.eye(len(K)), targets)
    again = main(
        [
            *SMALL,
            "--cifar-data",
            str(small_cifar),
            "--test",
            "--transfer",
            "--model-path",
            str(tmp_path / "model.th"),
            "--save-dir",
            str(tmp_path / "test"),
        ]
    )
    assert again[0]["test_acc"] == features[0.1] and again[1]["what"] == "NNGP"
    assert features[0.1] == pytest.approx(
        float(((kernel(test, train) @ fitted).argmax(1) == data.test_y).double().mean())
    )


def test_half_of_the_classes_are_pretrained_and_the_others_transferred_to(small_cifar):
    settings = Settings(dataset="cifar10-half", cifar_data=str(small_cifar), transfer_train_size=7)
    source, target = pretraining_data(settings), transfer_data(settings)
    assert source.classes == target.classes == 5
    assert (len(source.train_y), len(source.test_y), len(target.train_y), len(target.test_y)) == (
        50,
        10,
        7,
        10,
    )
    whole = load_images("cifar10", str(small_cifar))
    assert torch.equal(target.train_x, whole.train_x[whole.train_y >= 5][:7])
    assert torch.equal(target.train_y, whole.train_y[whole.train_y >= 5][:7] - 5)
    assert torch.equal(source.test_x, whole.test_x[whole.test_y < 5])


def test_an_interrupted_run_goes_on_bit_for_bit_and_transfers_once(
    imagenet, small_cifar, tmp_path, monkeypatch
):
    flags = [
        *SMALL,
        "--imagenet-data",
        str(imagenet),
        "--cifar-data",
        str(small_cifar),
        "--transfer",
        "--transfer-milestones",
        "0,1,2",
    ]
    main([*flags, "--save-dir", str(tmp_path / "whole"), "--save-model"])
    from experiments.cifar10.cifar10mlp import Trainer

    original, count = Trainer.step, [0]

    def step(self, *batch):
        count[0] += 1
        original(self, *batch)
        if count[0] in (5, 17):
            import os
            import signal

            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Trainer, "step", step)
    for how, code in ((flags, 130), (["--resume"], 130), (["--resume"], None)):
        with pytest.raises(SystemExit) if code else nullcontext() as stopped:
            main([*how, "--quiet", "--save-dir", str(tmp_path / "parts"), "--save-model"])
        assert code is None or stopped.value.code == code
    a, b = (load(tmp_path / name / "model.th") for name in ("whole", "parts"))
    assert count[0] == 24 and all(
        torch.equal(a[name], b[name]) for name in a if isinstance(a[name], torch.Tensor)
    )
    lines = [
        [
            {k: v for k, v in json.loads(line).items() if k != "seconds"}
            for line in (tmp_path / name / "transfers.jsonl").read_text().splitlines()
        ]
        for name in ("whole", "parts")
    ]
    assert lines[0] == lines[1] and len(lines[0]) == 4


def test_labels_of_validation_images_alone_and_of_later_training_images_are_classes(
    imagenet, small_cifar, tmp_path
):
    beyond = tmp_path / "beyond"
    write_set(beyond)
    val = pickle.loads((beyond / "val_data").read_bytes())
    val["labels"][0] = 13
    (beyond / "val_data").write_bytes(pickle.dumps(val, protocol=2))
    assert load_imagenet32(beyond, quiet=True).classes == 13
    first = pickle.loads((imagenet / "train_data_batch_1").read_bytes())["labels"]
    few = next(size for size in range(1, 12) if max(first[1 : size + 1]) < 10)
    for k in range(1, BATCHES + 1):  # the first images of every batch lack the last class
        held = pickle.loads((beyond / f"train_data_batch_{k}").read_bytes())
        held["labels"][0] = 1
        (beyond / f"train_data_batch_{k}").write_bytes(pickle.dumps(held, protocol=2))
    for folder, flags in ((beyond, []), (beyond, ["--train-subset-size", str(few)])):
        records = main(
            [
                *SMALL,
                *flags,
                "--epochs",
                "1",
                "--imagenet-data",
                str(folder),
                "--cifar-data",
                str(small_cifar),
                "--save-dir",
                str(tmp_path / "out"),
                "--overwrite",
            ]
        )
        assert np.isfinite(records[0]["test_loss"])


def test_memory_for_the_regression_is_asked_for_before_training(
    imagenet, small_cifar, tmp_path, monkeypatch, capsys
):
    from pilimit_lib.inf.gp import solve

    monkeypatch.setattr(solve, "free_memory", lambda device: 1000)
    with pytest.raises(SystemExit):
        main(
            [
                *SMALL,
                "--imagenet-data",
                str(imagenet),
                "--cifar-data",
                str(small_cifar),
                "--transfer",
                "--save-dir",
                str(tmp_path / "run"),
            ]
        )
    assert (
        "--transfer-train-size, --transfer-test-size" in capsys.readouterr().err
        and not (tmp_path / "run").exists()
    )


def test_a_run_is_resumed_with_other_sizes_of_the_transfer(imagenet, small_cifar, tmp_path):
    flags = [
        *SMALL,
        "--imagenet-data",
        str(imagenet),
        "--cifar-data",
        str(small_cifar),
        "--transfer",
        "--save-dir",
        str(tmp_path),
    ]
    main([*flags, "--epochs", "1"])
    main(
        [
            *flags,
            "--epochs",
            "2",
            "--resume",
            "--transfer-train-size",
            "50",
            "--transfer-test-size",
            "10",
        ]
    )
    found = [json.loads(line) for line in (tmp_path / "transfers.jsonl").read_text().splitlines()]
    assert [(record["what"], record["train"], record["test"]) for record in found] == [
        ("features", 100, 20),
        ("NNGP", 100, 20),
        ("features", 50, 10),
        ("NNGP", 50, 10),
    ]


def test_a_cosine_schedule_is_not_continued_beyond_its_end(imagenet, tmp_path, capsys):
    flags = [
        *SMALL,
        "--imagenet-data",
        str(imagenet),
        "--scheduler",
        "cosine",
        "--save-dir",
        str(tmp_path),
    ]
    main(flags)
    with pytest.raises(SystemExit):
        main([*flags, "--epochs", "4", "--resume"])
    assert "schedule of 2 steps" in capsys.readouterr().err
    assert len(main([*flags, "--resume"])) == 2


def test_what_an_overwritten_run_left_is_removed(imagenet, small_cifar, tmp_path):
    flags = [
        *SMALL,
        "--imagenet-data",
        str(imagenet),
        "--cifar-data",
        str(small_cifar),
        "--save-dir",
        str(tmp_path),
    ]
    main([*flags, "--transfer", "--save-model", "--save-epochs", "all"])
    (tmp_path / "model_of_mine.th").write_text("kept")
    main([*flags, "--overwrite", "--epochs", "1"])
    assert {path.name for path in tmp_path.iterdir()} == {
        "settings.json",
        "metrics.jsonl",
        "curves.png",
        "checkpoint.pt",
        "model_of_mine.th",
    }


def test_a_finite_twin_of_moments_is_loaded_with_its_own_activation(
    imagenet, small_cifar, tmp_path, monkeypatch
):
    seen = []
    original = transfers.Transfers.measure
    monkeypatch.setattr(
        transfers.Transfers,
        "measure",
        lambda self, net, *rest: seen.append(net) or original(self, net, *rest),
    )
    depths = []
    monkeypatch.setattr(
        transfers,
        "ReLUKernel",
        lambda depth, **how: depths.append(depth) or ReLUKernel(depth, **how),
    )
    main(
        [
            *SMALL,
            "--memory",
            "moments",
            "--degree",
            "3",
            "--width",
            "16",
            "--imagenet-data",
            str(imagenet),
            "--cifar-data",
            str(small_cifar),
            "--transfer",
            "--save-dir",
            str(tmp_path / "run"),
            "--save-model",
        ]
    )
    how = [
        "--cifar-data",
        str(small_cifar),
        "--test",
        "--transfer",
        "--kernel-reg",
        "0.1",
        "--quiet",
        "--model-path",
        str(tmp_path / "run" / "model.th"),
        "--save-dir",
    ]
    main([*how, str(tmp_path / "test")])  # --depth is 2 by default, the network's is 1
    x = torch.randn(5, 3072)
    assert torch.allclose(seen[0](x), seen[1](x)) and depths == [2, 2]
    trained = (tmp_path / "run" / "transfers.jsonl").read_text()
    for folder, message in (("run", "holds a training run"), ("test", "already holds a transfer")):
        with pytest.raises(FileExistsError, match=message):
            transfer_imagenet.test(
                Settings(cifar_data=str(small_cifar), transfer=True), how[-2], tmp_path / folder
            )
    assert (tmp_path / "run" / "transfers.jsonl").read_text() == trained
    main([*how, str(tmp_path / "test"), "--overwrite"])


# ---- the command line


def test_milestones_beyond_the_last_epoch_are_named_and_the_run_goes_on(
    imagenet, small_cifar, tmp_path, capsys
):
    main(
        [
            *SMALL,
            "--epochs",
            "1",
            "--transfer",
            "--transfer-milestones=0,5,10",
            "--imagenet-data",
            str(imagenet),
            "--cifar-data",
            str(small_cifar),
            "--save-dir",
            str(tmp_path),
        ]
    )
    assert "never reaches [5, 10]" in capsys.readouterr().out
    found = [json.loads(line) for line in (tmp_path / "transfers.jsonl").read_text().splitlines()]
    assert [record.get("epoch") for record in found] == [0, None]


def test_the_flag_of_missing_images_is_named(imagenet, tmp_path, monkeypatch, capsys):
    datasets = pytest.importorskip("torchvision.datasets")

    def refuse(*args, **how):
        raise RuntimeError("no network here")

    monkeypatch.setattr(datasets, "CIFAR10", refuse)
    with pytest.raises(SystemExit):
        main(
            [*SMALL, "--transfer", "--imagenet-data", str(imagenet), "--cifar-data", str(tmp_path)]
        )
    assert "the folder that holds it with --cifar-data" in capsys.readouterr().err


def test_the_printed_command_means_what_it_says_and_what_it_costs(capsys):
    from experiments.cifar10.settings import parser

    args = parser(None, Settings, "x", {"dataset": SOURCES}).parse_args(SEED_COMMAND)
    assert (args.r, args.lr, args.batch_size, args.gclip, args.epochs, args.depth) == (
        200,
        0.01,
        16,
        0,
        40,
        2,
    )
    assert args.save_model and args.cuda and args.gclip_per_param and args.dataset == "imagenet32"
    printed = Settings(r=200, epochs=40, cuda=True)
    rows = cost(printed, 1_281_167, 3072, 1000)
    assert rows.rows == 200 + 40 * 1_281_167 and rows.bytes == 2 * rows.rows * (400 + 400 + 1200)
    assert rows.last_epoch / rows.first_epoch > 50
    moments = cost(Settings(r=200, epochs=40, memory="moments"), 1_281_167, 3072, 1000)
    assert moments.bytes == 4 * 20301 * 1400 and moments.first_epoch == moments.last_epoch
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            main(SEED_COMMAND)
        assert "lacks train_data_batch_1" in capsys.readouterr().err


def test_costs_are_those_of_real_networks():
    from pilimit_lib.inf import InfMLP

    net = InfMLP(7, 3, 6, 2, memory="moments")
    assert cost(Settings(r=6, depth=2, memory="moments"), 100, 7, 3).bytes == net.row_bytes
    net = InfMLP(7, 3, 6, 2)
    assert cost(Settings(r=6, depth=2, epochs=0), 100, 7, 3).bytes == net.row_bytes


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--transfer-milestones", "3"], "they need --transfer"),
        (["--transfer", "--transfer-milestones=-1,30"], "got [-1]"),
        (["--init-from-data"], "is gone"),
        (["--kernel-reg", "-1"], "--kernel-reg must not be negative"),
        (["--resume"], "--save-dir"),
        (["--test"], "--test needs the --model-path"),
        (["--epochs", "0"], "--epochs must be at least 1"),
        ([], "lacks train_data_batch_1"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_written(
    tmp_path, monkeypatch, capsys, flags, message
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(flags)
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())
