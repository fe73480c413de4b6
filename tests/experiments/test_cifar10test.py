"""The test command as a user runs it: saved networks of every kind, kernels, files, errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiments.cifar10 import cifar10mlp
from experiments.cifar10.cifar10test import main
from experiments.training.images import load_images
from pilimit_lib.core import load, save
from pilimit_lib.inf import InfMLP
from pilimit_lib.inf.checkpoints.original import to_pilimit_orig
from pilimit_lib.inf.gp import ReLUKernel
from tests.pilimit_orig import originals, small

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--train-subset-size", "300", "--test-subset-size", "120", "--quiet"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder of a short training run on the digits."""
    folder = tmp_path_factory.mktemp("run") / "infinite"
    cifar10mlp.main(
        [*SMALL, "--r", "16", "--epochs", "2", "--save-model", "--save-dir", str(folder)]
    )
    return folder


def run(tmp_path, *flags):
    return main([*SMALL, "--save-dir", str(tmp_path / "test"), *map(str, flags)])


def test_a_saved_network_scores_as_after_training(trained, tmp_path, capsys):
    last = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    for file in ("model.th", "checkpoint.pt"):
        (record,) = run(tmp_path, "--load-model-path", trained / file, "--overwrite")
        assert record["test_acc"] == last["test_acc"] and record["test_loss"] == pytest.approx(
            last["test_loss"], rel=1e-5
        )
        assert record["dataset"] == "digits"
    assert "infinite network, r=16, depth 2" in capsys.readouterr().out
    assert json.loads((tmp_path / "test" / "results.jsonl").read_text()) == record


def test_a_network_of_the_papers_code_scores_the_same(trained, tmp_path):
    net = InfMLP.from_state_dict(load(trained / "model.th"))
    save(to_pilimit_orig(net), tmp_path / "orig.th")
    (here,) = run(tmp_path, "--load-model-path", trained / "model.th")
    (there,) = run(
        tmp_path,
        "--load-model-path",
        tmp_path / "orig.th",
        "--load-from-pilimit-orig",
        "--r",
        16,
        "--overwrite",
    )
    assert there["test_acc"] == here["test_acc"] and there["test_loss"] == pytest.approx(
        here["test_loss"], rel=1e-5
    )


def test_a_wide_sample_scores_nearly_as_the_infinite_network(trained, tmp_path):
    (infinite,) = run(tmp_path, "--load-model-path", trained / "model.th")
    (finite,) = run(
        tmp_path, "--load-model-path", trained / "model.th", "--width", 2048, "--overwrite"
    )
    assert "width 2048" in finite["what"]
    assert finite["test_loss"] == pytest.approx(infinite["test_loss"], rel=0.15)


def test_a_finite_run_is_tested_with_its_own_settings(tmp_path):
    records = cifar10mlp.main(
        [
            *SMALL,
            "--r",
            "12",
            "--width",
            "48",
            "--epochs",
            "1",
            "--save-model",
            "--first-layer-alpha",
            "1.5",
            "--save-dir",
            str(tmp_path / "finite"),
        ]
    )
    (record,) = run(tmp_path, "--load-model-path", tmp_path / "finite" / "model.th")
    assert record["test_acc"] == records[-1]["test_acc"]
    (features,) = run(
        tmp_path,
        "--load-model-path",
        tmp_path / "finite" / "model.th",
        "--test-kernel",
        "--kernel-reg",
        "1e-3",
        "--overwrite",
    )
    # The outputs have had one epoch on 300 images; regression on the features is solved.
    assert features["test_acc"] > record["test_acc"] + 0.1
    (tmp_path / "finite" / "settings.json").unlink()
    with pytest.raises(SystemExit):
        run(tmp_path, "--load-model-path", tmp_path / "finite" / "model.th", "--overwrite")


def test_the_feature_kernel_is_that_of_the_embedding(trained, tmp_path):
    (record,) = run(
        tmp_path, "--load-model-path", trained / "model.th", "--test-kernel", "--kernel-reg", "1e-4"
    )
    data = load_images("digits", train_size=300, test_size=120)
    net = InfMLP.from_state_dict(load(trained / "model.th"))
    with torch.no_grad():
        f, g = (net.embedding(x.flatten(1)).double() for x in (data.train_x, data.test_x))

    def k(c):
        c = c.clamp(-1, 1)
        return ((1 - c * c).sqrt() + c * torch.acos(-c)) / (2 * torch.pi)

    targets = torch.nn.functional.one_hot(data.train_y, 10).double() - 0.1
    out = k(g @ f.T) @ torch.linalg.solve(k(f @ f.T) + 1e-4 * 0.5 * torch.eye(300), targets)
    assert record["test_acc"] == float((out.argmax(1) == data.test_y).double().mean()) > 0.5


@pytest.mark.parametrize(
    "kind",
    [["--gp"], ["--ntk"], ["--ntk", "--ntk-as-published", "--depth", "1"], ["--gp", "--float"]],
)
def test_kernels_of_random_networks(kind, tmp_path, capsys):
    (record,) = run(
        tmp_path,
        *kind,
        "--dataset",
        "digits",
        "--kernel-reg",
        "1e-3",
        "--varw",
        "2",
        "--varb",
        "0.1",
    )
    assert record["test_acc"] > 0.9 and record["train"] == 300
    assert "of memory" in capsys.readouterr().out


def test_held_out_images_judge_a_ridge_as_test_images_would(tmp_path):
    (record,) = run(
        tmp_path, "--gp", "--dataset", "digits", "--held-out", "80", "--kernel-reg", 0.1
    )
    assert (record["train"], record["test"]) == (220, 120)
    data = load_images("digits", train_size=300, test_size=120).hold_out(80)
    K = ReLUKernel(2)(data.train_x, data.train_x)
    targets = torch.nn.functional.one_hot(data.train_y, 10).double() - 0.1
    K.diagonal().add_(0.1 * K.diagonal().mean())
    solution = torch.linalg.solve(K, targets)
    for side in ("held_out", "test"):
        x, y = getattr(data, f"{side}_x"), getattr(data, f"{side}_y")
        right = (ReLUKernel(2)(x, data.train_x) @ solution).argmax(1) == y
        assert record[f"{side}_acc"] == pytest.approx(right.double().mean().item())


def test_several_ridges_are_drawn_and_one_that_fails_leaves_the_others(tmp_path):
    records = run(
        tmp_path,
        "--gp",
        "--dataset",
        "digits",
        "--multiple-regs",
        "--save-kernel",
        "--float",
        "--kernel-reg",
        "0",
    )
    assert len(records) == 11 and [record["reg"] for record in records] == sorted(
        record["reg"] for record in records
    )
    assert (tmp_path / "test" / "regs.png").read_bytes().startswith(b"\x89PNG")
    before = (tmp_path / "test" / "kernel.npy").stat().st_mtime_ns
    again = run(
        tmp_path,
        "--gp",
        "--dataset",
        "digits",
        "--multiple-regs",
        "--save-kernel",
        "--float",
        "--kernel-reg",
        "0",
    )
    assert [r.get("test_acc") for r in again] == [r.get("test_acc") for r in records]
    assert (tmp_path / "test" / "kernel.npy").stat().st_mtime_ns == before
    eigen = run(
        tmp_path,
        "--gp",
        "--dataset",
        "digits",
        "--multiple-regs",
        "--kernel-reg",
        "1e-8",
        "--method",
        "eigen",
        "--overwrite",
    )
    assert eigen[-1]["test_acc"] == records[-1]["test_acc"]


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "give one of --load-model-path, --gp and --ntk"),
        (["--gp", "--ntk"], "give one of"),
        (["--gp", "--width", "64"], "--width belongs to a network"),
        (["--gp", "--test-kernel"], "--test-kernel belongs to a network"),
        (["--gp", "--last-layer-lr-mult", "2"], "it needs --ntk"),
        (["--gp", "--kernel-reg", "-1"], "must not be negative"),
        (["--gp", "--held-out", "-1"], "--held-out must not be negative"),
        (["--load-model-path", "x", "--held-out", "9"], "for choosing a ridge"),
        (["--ntk", "--dataset", "digits", "--depth", "0"], "depth counts hidden layers"),
        (
            ["--gp", "--dataset", "digits", "--train-subset-size", "99999"],
            "a subset of 99999 was asked for",
        ),
        (["--load-model-path", "absent.th"], "there is no checkpoint at absent.th"),
        (
            ["--load-model-path", "absent.th", "--load-from-pilimit-orig"],
            "there is no checkpoint at absent.th",
        ),
        (["--gp", "--dataset", "digits", "--varw", "0"], "all variances are zero"),
    ],
)
def test_what_cannot_be_meant_is_said(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--save-dir", str(tmp_path / "test"), "--quiet", *flags])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "test" / "results.jsonl").exists()


def test_a_network_that_does_not_fit_is_said(trained, tmp_path, capsys):
    path = str(trained / "model.th")
    originals.save_object(small.network(), tmp_path / "small.th")
    net = InfMLP(64, 7, 8, 1)
    save(net.state_dict(), tmp_path / "seven.th")
    (tmp_path / "evil.th").write_bytes(b"\x80\x02cposix\nsystem\nX\x02\x00\x00\x00ls\x85R.")
    for flags, message in (
        (["--load-model-path", path, "--r", "20"], "r is 16, 20 was given"),
        (
            ["--load-model-path", path, "--load-from-pilimit-orig"],
            "first_layer_alpha, last_layer_alpha",
        ),
        (
            ["--load-model-path", path, "--dataset", "fashion_mnist", "--data", str(tmp_path)],
            "fashion_mnist",
        ),
        (
            ["--load-model-path", str(tmp_path / "small.th"), "--load-from-pilimit-orig"],
            "the network takes 5 numbers",
        ),
        (["--load-model-path", str(tmp_path / "seven.th")], "only its features can be tested"),
        (
            ["--load-model-path", str(tmp_path / "evil.th"), "--load-from-pilimit-orig"],
            "not a file of torch.save",
        ),
        (["--load-model-path", str(tmp_path / "evil.th")], "not loaded"),
    ):
        with pytest.raises(SystemExit):
            run(tmp_path, *flags)
        assert message in capsys.readouterr().err


def test_another_test_in_the_folder_is_not_overwritten(tmp_path, capsys):
    run(tmp_path, "--gp", "--dataset", "digits", "--kernel-reg", "1e-3")
    with pytest.raises(SystemExit):
        run(tmp_path, "--gp", "--dataset", "digits", "--kernel-reg", "1e-2")
    assert "choose another --save-dir" in capsys.readouterr().err


def test_the_command_line(tmp_path):
    command = [
        sys.executable,
        "-m",
        "experiments.cifar10.cifar10test",
        "--gp",
        "--dataset",
        "digits",
        "--kernel-reg",
        "1e-3",
        *SMALL,
        "--save-dir",
        str(tmp_path / "test"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert (
        "NNGP, depth 2, ridge 0.001" in done.stdout
        and "% of 120 test images (digits)" in done.stdout
    )


@pytest.mark.slow
def test_cifar10_beats_chance_by_far(tmp_path):
    """NNGP on 2000 real images; skipped where they are not at hand."""
    unpack = ROOT.parent / "shared" / "data" / "unpack.py"
    if not unpack.exists():
        pytest.skip("no CIFAR-10 at ../shared/data")
    subprocess.run(
        [sys.executable, str(unpack), str(tmp_path), "cifar10"], check=True, capture_output=True
    )
    (record,) = main(
        [
            "--gp",
            "--data",
            str(tmp_path),
            "--train-subset-size",
            "2000",
            "--test-subset-size",
            "1000",
            "--kernel-reg",
            "0.1",
            "--save-dir",
            str(tmp_path / "test"),
            "--quiet",
        ]
    )
    assert record["test_acc"] > 0.3
