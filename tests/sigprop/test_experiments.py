"""The scripts: data, networks, runs that resume bit for bit, and both examples as a user calls them."""
import json
import runpy
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from experiments.sigprop import data, memory, networks, timing, training
from experiments.sigprop.training import Settings
from pilimit_lib import core, sigprop

TINY = Settings(width=4, epochs=2, batch=50)


@pytest.fixture(scope="module")
def digits():
    images = data.load("digits")
    return images._replace(train_x=images.train_x[:150], train_y=images.train_y[:150])


def test_digits_are_split_evenly_and_standardised():
    images = data.load("digits")
    assert len(images.train_x) == 1437 and len(images.test_x) == 360 and images.shape == (1, 8, 8)
    assert images.train_x.mean().abs() < 1e-5 and (images.train_x.std() - 1).abs() < 1e-5
    assert torch.bincount(images.test_y).min() >= 34
    fewer = data.load("digits", train=100, test=50)
    assert len(fewer.train_x) == 100 and torch.equal(fewer.train_y, data.load("digits", train=100, test=50).train_y)


def test_batches_are_full_and_follow_the_seed():
    x, y = torch.arange(10.), torch.arange(10)
    a, b, c = (list(data.batches(x, y, 4, seed)) for seed in (1, 1, 2))
    assert [len(xs) for xs, _ in a] == [4, 4] and all(torch.equal(p[0], q[0]) for p, q in zip(a, b))
    assert not all(torch.equal(p[0], q[0]) for p, q in zip(a, c)) and all(torch.equal(xs.long(), ys) for xs, ys in a)
    with pytest.raises(ValueError, match="do not fill a batch of 11"):
        next(data.batches(x, y, 11, 0))


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
        model, optimizer = training.make(TINY, method, digits.shape)
        return model, optimizer, sorted(p.detach().sum().item() for n, p in model.named_parameters() if "context" not in n)
    (_, _, a), (net, outer, b), (frozen, _, c) = map(hidden, ("backprop", "sigprop", "frozen"))
    assert a == b == c and len(net.local_optimizers()) == 3 and not frozen.local_optimizers()
    assert len(outer.param_groups[0]["params"]) == 2
    before = {n: p.clone() for n, p in frozen.named_parameters()}
    training.step(frozen, torch.optim.SGD(frozen.parameters(), 0.1), digits.train_x[:50], digits.train_y[:50])
    moved = {n for n, p in frozen.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if n.startswith("model.2.")}


def test_accuracy_counts_right_answers():
    x = torch.eye(4)[[0, 1, 2, 3, 0]]
    assert training.accuracy(nn.Identity(), x, torch.tensor([0, 1, 2, 0, 1]), size=2) == pytest.approx(0.6)


@pytest.mark.parametrize("method", training.METHODS)
def test_an_interrupted_run_goes_on_bit_for_bit(method, digits, tmp_path):
    settings = replace(TINY, loss="v14", epochs=3)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    expected = training.run(settings, method, 0, digits, whole)

    class Interrupt(Exception):
        pass
    def stop_in_second_epoch(model, x, y, size=500, seen=[]):  # noqa: B006
        seen.append(1)
        if len(seen) == 2:
            raise Interrupt
        return real(model, x, y, size)
    real, training.accuracy = training.accuracy, stop_in_second_epoch
    try:
        with pytest.raises(Interrupt):
            training.run(settings, method, 0, digits, parts)
    finally:
        training.accuracy = real
    got = training.run(settings, method, 0, digits, parts)
    strip = lambda records: [{k: v for k, v in r.items() if k != "seconds"} for r in records]  # noqa: E731
    assert strip(got) == strip(expected) and [r["epoch"] for r in got] == [1, 2, 3]
    a, b = (core.load(folder / f"{method}-0.pt") for folder in (whole, parts))
    assert all(torch.equal(v, b["model"][k]) for k, v in a["model"].items())
    with pytest.raises(ValueError, match="belongs to a run with other settings"):
        training.run(replace(settings, lr=0.5), method, 0, digits, parts)


@pytest.mark.parametrize("example", ["ex2_input_target_max_rand", "ex4_input_target_topk"])
def test_examples_run_and_write_their_results(example, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [example, "--epochs", "1", "--train", "200", "--width", "4", "--out", str(tmp_path)])
    runpy.run_module(f"experiments.sigprop.{example}", run_name="__main__")
    printed = "".join(capsys.readouterr())
    assert all(method in printed for method in training.METHODS)
    assert {"settings.json", "metrics.csv", "summary.csv", "accuracy.png", "sigprop-0.pt", "sigprop-0.jsonl"} <= set(
        path.name for path in tmp_path.iterdir())
    assert json.loads((tmp_path / "settings.json").read_text())["train"] == 200
    if example.startswith("ex4"):
        record = json.loads((tmp_path / "sigprop-0.jsonl").read_text())
        assert set(record["layers"]) == {"signal:Sequential", "0:Sequential", "1:Sequential"}
        assert "1:Sequential: loss" in printed


def test_memory_and_timing_report_every_way(tmp_path):
    frame = memory.main(["--depths", "4", "16", "--width", "16", "--batch", "64", "--device", "cpu", "--out", str(tmp_path)])
    saved = frame.pivot(index="way", columns="depth", values="saved kB")
    assert set(saved.index) == set(memory.WAYS)
    assert saved.loc["sigprop", 4] == saved.loc["sigprop", 16] and saved.loc["backprop", 16] > 1.5 * saved.loc["backprop", 4]
    live = frame.pivot(index="way", columns="depth", values="live kB")
    assert live.loc["sigprop", 16] < 1.02 * live.loc["sigprop", 4] and live.loc["backprop", 16] > 1.5 * live.loc["backprop", 4]
    assert (tmp_path / "memory.png").exists()
    table = timing.main(["--networks", "mlp", "--widths", "4", "--batch", "20", "--repeats", "2", "--device", "cpu",
                         "--out", str(tmp_path)])
    assert len(table) == len(timing.WAYS) and (table.ratio > 0).all()


def test_live_bytes_are_counted_while_they_live():
    with memory.Live() as live:
        a = torch.ones(1000)
        b = a + 1
        assert live.held == 8000
        a = None  # noqa: F841
        assert live.held == 4000 and live.peak == 8000 and b.sum() == 2000


def test_larger_sets_need_a_folder():
    with pytest.raises(FileNotFoundError, match="needs --data FOLDER"):
        data.load("cifar10", "nowhere")
    with pytest.raises(ValueError, match="unknown data set"):
        data.load("mnist")
    with pytest.raises(ValueError, match="asked for 5000 of 1437"):
        data.load("digits", train=5000)


@pytest.mark.slow
@pytest.mark.parametrize("settings, least, frozen_most", [
    (Settings(epochs=8, batch=32, lr=2e-3, output_lr=2e-3), .95, .93),
    (Settings(network="mlp", width=32, epochs=25, lr=2e-3, output_lr=2e-3), .94, .70),
])
def test_accuracy_on_digits(settings, least, frozen_most, tmp_path):
    images = data.load("digits")
    mean = {method: sum(training.run(settings, method, seed, images, tmp_path)[-1]["accuracy"] for seed in range(4)) / 4
            for method in ("sigprop", "frozen")}
    assert mean["sigprop"] >= least and mean["frozen"] <= frozen_most


@pytest.mark.slow
@pytest.mark.parametrize("partners, wrong", [("product", True), ("label", False)])
def test_partners_of_deep_layers(partners, wrong):
    """Random ReLU layers, ten classes: how many partners are of a wrong class after two of them."""
    torch.manual_seed(0)
    labels = torch.arange(100) % 10
    t = torch.randn(10, 64)[labels]
    for _ in range(2):
        t = nn.functional.relu(nn.Linear(64, 64)(t)).detach()
    w = sigprop.functional.partners(t, by=partners, labels=labels)
    assert bool(w.bool().logical_and(labels[:, None] != labels).any()) == wrong
