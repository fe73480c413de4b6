"""The scripts: data, networks, runs that resume bit for bit, and both examples as a user calls
them."""

import json
import runpy
import sys
from dataclasses import replace

import pandas as pd
import pytest
import torch
from torch import nn

from experiments.sigprop import evaluation, memory, methods, networks, timing, training
from experiments.sigprop.methods import Settings
from experiments.training.images import load_images
from pilimit_lib import core

TINY = Settings(width=4, epochs=2, batch=50)


@pytest.fixture(scope="module")
def digits():
    return load_images("digits", train_size=170)


def test_a_batch_must_be_filled(digits, tmp_path):
    with pytest.raises(ValueError, match="170 images do not fill a batch of 500"):
        training.run(replace(TINY, batch=500), "sigprop", 0, digits, tmp_path)
    # 170 images make three full batches and a short one, which top-k of 30 could not use
    settings = replace(TINY, loss="v15", k=30, epochs=1)
    assert len(training.run(settings, "sigprop", 0, digits, tmp_path)) == 1


@pytest.mark.parametrize("name", networks.NAMES)
@pytest.mark.parametrize("image", [(1, 8, 8), (3, 32, 32), (1, 28, 28)])
def test_networks_take_images_of_any_size(name, image):
    first, shape, blocks, output = networks.build(name, image, 10, 4, 3)
    x = torch.randn(3, *image)
    h = first(x)
    assert tuple(h.shape[1:]) == shape and output(nn.Sequential(*blocks)(h)).shape == (3, 10)


def test_methods_share_layers_and_initial_values(digits):
    def hidden(method):
        torch.manual_seed(3)
        model, optimizer = methods.make(TINY, method, (1, 8, 8))
        return (
            model,
            optimizer,
            sorted(
                p.detach().sum().item() for n, p in model.named_parameters() if "context" not in n
            ),
        )

    (_, _, a), (net, outer, b), (frozen, _, c) = map(hidden, ("backprop", "sigprop", "frozen"))
    assert a == b == c and len(net.local_optimizers()) == 3 and not frozen.local_optimizers()
    assert len(outer.param_groups[0]["params"]) == 2
    before = {n: p.clone() for n, p in frozen.named_parameters()}
    methods.step(
        frozen, torch.optim.SGD(frozen.parameters(), 0.1), digits.train_x[:50], digits.train_y[:50]
    )
    moved = {n for n, p in frozen.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if n.startswith("model.2.")}


def test_accuracy_counts_right_answers():
    x = torch.eye(4)[[0, 1, 2, 3, 0]]
    assert evaluation.accuracy(
        nn.Identity(), x, torch.tensor([0, 1, 2, 0, 1]), size=2
    ) == pytest.approx(0.6)


@pytest.mark.parametrize("method", methods.METHODS)
@pytest.mark.parametrize("protocol", [{}, {"decay": True, "augment": True, "probe": 100}])
def test_an_interrupted_run_goes_on_bit_for_bit(method, protocol, digits, tmp_path):
    settings = replace(TINY, loss="v14", epochs=3, **protocol)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    expected = training.run(settings, method, 0, digits, whole)

    class Interrupt(Exception):
        pass

    def stop_in_second_epoch(*args, seen=[]):  # noqa: B006
        seen.append(1)
        if len(seen) == 2:
            raise Interrupt
        return real(*args)

    real, training.examine = training.examine, stop_in_second_epoch
    try:
        with pytest.raises(Interrupt):
            training.run(settings, method, 0, digits, parts)
    finally:
        training.examine = real
    got = training.run(settings, method, 0, digits, parts)
    strip = lambda records: [{k: v for k, v in r.items() if k != "seconds"} for r in records]  # noqa: E731
    assert strip(got) == strip(expected) and [r["epoch"] for r in got] == [1, 2, 3]
    a, b = (core.load(folder / f"{method}-0.pt") for folder in (whole, parts))
    assert all(torch.equal(v, b["model"][k]) for k, v in a["model"].items())
    with pytest.raises(ValueError, match="belongs to a run with other settings"):
        training.run(replace(settings, lr=0.5), method, 0, digits, parts)


@pytest.mark.parametrize("example", ["ex2_input_target_max_rand", "ex4_input_target_topk"])
def test_examples_run_and_write_their_results(example, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        sys,
        "argv",
        [example, "--epochs", "1", "--train", "200", "--width", "4", "--out", str(tmp_path)],
    )
    runpy.run_module(f"experiments.sigprop.{example}", run_name="__main__")
    printed = "".join(capsys.readouterr())
    assert all(method in printed for method in methods.METHODS)
    assert {
        "settings.json",
        "metrics.csv",
        "summary.csv",
        "accuracy.png",
        "sigprop-0.pt",
        "sigprop-0.csv",
    } <= set(path.name for path in tmp_path.iterdir())
    assert json.loads((tmp_path / "settings.json").read_text())["train"] == 200
    if example.startswith("ex4"):
        record = pd.read_csv(tmp_path / "sigprop-0.csv")
        layers = {"signal:Sequential", "0:Sequential", "1:Sequential"}
        assert {f"{layer} accuracy" for layer in layers} < set(record.columns)
        assert "1:Sequential: loss" in printed


def test_memory_and_timing_report_every_way(tmp_path):
    frame = memory.main(
        [
            "--depths",
            "4",
            "16",
            "--width",
            "16",
            "--batch",
            "64",
            "--device",
            "cpu",
            "--out",
            str(tmp_path),
        ]
    )
    saved = frame.pivot(index="way", columns="depth", values="saved kB")
    assert set(saved.index) == set(memory.WAYS)
    assert (
        saved.loc["sigprop", 4] == saved.loc["sigprop", 16]
        and saved.loc["backprop", 16] > 1.5 * saved.loc["backprop", 4]
    )
    live = frame.pivot(index="way", columns="depth", values="live kB")
    assert (
        live.loc["sigprop", 16] < 1.02 * live.loc["sigprop", 4]
        and live.loc["backprop", 16] > 1.5 * live.loc["backprop", 4]
    )
    assert (tmp_path / "memory.png").exists()
    table = timing.main(
        [
            "--networks",
            "mlp",
            "--widths",
            "4",
            "--batch",
            "20",
            "--repeats",
            "2",
            "--device",
            "cpu",
            "--out",
            str(tmp_path),
        ]
    )
    assert len(table) == len(timing.WAYS) and (table.ratio > 0).all()


def test_live_bytes_are_counted_while_they_live():
    with memory.Live() as live:
        a = torch.ones(1000)
        b = a + 1
        assert live.held == 8000
        a = None  # noqa: F841
        assert live.held == 4000 and live.peak == 8000 and b.sum() == 2000


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings, least, frozen_most",
    [
        (Settings(epochs=8, batch=32, lr=2e-3, output_lr=2e-3), 0.95, 0.93),
        (Settings(network="mlp", width=32, epochs=25, lr=2e-3, output_lr=2e-3), 0.94, 0.70),
    ],
)
def test_accuracy_on_digits(settings, least, frozen_most, tmp_path):
    images = load_images("digits")
    mean = {
        method: sum(
            training.run(settings, method, seed, images, tmp_path)[-1]["accuracy"]
            for seed in range(4)
        )
        / 4
        for method in ("sigprop", "frozen")
    }
    assert mean["sigprop"] >= least and mean["frozen"] <= frozen_most
