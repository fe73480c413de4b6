"""The CIFAR-10 protocol on a few digits: falling rates, measured statistics, the probe."""

from dataclasses import replace

import pandas as pd
import pytest
import torch
from torch import nn

from experiments.sigprop import choose, cifar10, evaluation, lag, methods, networks, training
from experiments.sigprop.methods import Settings
from experiments.training.images import load_images

TINY = Settings(width=4, epochs=2, batch=50)


@pytest.fixture(scope="module")
def digits():
    return load_images("digits", train_size=170)


def test_rates_fall_to_zero_in_every_layer(digits):
    settings = replace(TINY, decay=True)
    progress = training.Progress(settings, "sigprop", 0, digits, None)
    steps = settings.epochs * (len(digits.train_x) // settings.batch)
    for _ in range(steps):
        methods.step(progress.model, progress.optimizer, digits.train_x[:50], digits.train_y[:50])
        for one in progress.schedules:
            one.step()
    optimizers = [progress.optimizer, *progress.model.local_optimizers().values()]
    assert len(optimizers) == 4
    assert all(abs(o.param_groups[0]["lr"]) < 1e-12 for o in optimizers)


def test_the_probe_reads_what_is_linear_in_the_features():
    g = torch.Generator().manual_seed(0)
    y = torch.randint(3, (600,), generator=g)
    x = 5 + torch.randn(3, 20, generator=g)[y] + torch.randn(600, 20, generator=g)
    train, test = (x[:400], y[:400]), (x[400:], y[400:])
    # what least squares without a penalty give on standardised features, by another routine
    z = (x - x[:400].mean(0)) / x[:400].std(0)
    onehot = nn.functional.one_hot(y[:400], 3).float()
    plain = torch.linalg.lstsq(z[:400], onehot - onehot.mean(0)).solution
    assert torch.allclose(evaluation.ridge(z[:400], y[:400], 3, 0.0), plain, atol=1e-4)
    expected = ((z[400:] @ plain).argmax(1) == y[400:]).float().mean().item()
    assert evaluation.probe(train, test, 3) == pytest.approx(expected, abs=0.03) and expected > 0.9
    shuffled = y[:400][torch.randperm(400, generator=g)]
    assert evaluation.probe((x[:400], shuffled), test, 3) < 0.6


@pytest.mark.parametrize("method", methods.METHODS)
def test_features_are_what_the_output_layer_gets(method, digits):
    model, _ = methods.make(TINY, method, (1, 8, 8))
    found = evaluation.features(model, digits.test_x[:30], size=20)
    output = model.model[-1].module if method != "backprop" else model[-1]
    assert torch.allclose(output(found), model(digits.test_x[:30]), atol=1e-6)


@pytest.mark.parametrize("norm", networks.NORMS)
def test_the_protocol_on_a_few_images(norm, digits, tmp_path):
    settings = replace(cifar10.PROTOCOL, network="conv", width=4, epochs=1, batch=50)
    settings = replace(settings, probe=100, norm=norm)
    (record,) = training.run(settings, "sigprop", 0, digits, tmp_path)
    assert {"accuracy", "recalibrated", "probe"} < set(record)
    (line,) = pd.read_csv(tmp_path / "sigprop-0.csv").to_dict("records")
    assert line["probe"] == pytest.approx(record["probe"])


def test_held_out_images_are_training_images_and_test_images_take_no_part(digits):
    chosen = choose.held_out(digits, 40)
    assert torch.equal(torch.cat([chosen.train_x, chosen.test_x]), digits.train_x)
    assert torch.equal(torch.cat([chosen.train_y, chosen.test_y]), digits.train_y)
    assert len(chosen.test_x) == 40 and chosen.classes == digits.classes
    for count in (0, 170):
        with pytest.raises(ValueError, match=f"{count} of 170 training images"):
            choose.held_out(digits, count)


def test_the_choice_is_the_best_on_held_out_images_and_is_resumed(
    digits, tmp_path, monkeypatch, capsys
):
    given = []

    def load(name, root, train):
        given.append((name, train))
        return replace(digits, test_x=digits.test_x[:0], test_y=digits.test_y[:0])

    monkeypatch.setattr(choose, "load_images", load)
    small = replace(cifar10.PROTOCOL, network="conv", batch=32, probe=0)
    monkeypatch.setattr(choose, "PROTOCOL", small)
    arguments = ["--epochs", "2", "--width", "4", "--train", "170", "--held-out", "40"]
    arguments += ["--seeds", "0", "--rates", "2e-3", "1e-9", "--out", str(tmp_path)]
    norm, rate = choose.main(arguments)
    assert given == [("cifar10", 170)] and rate == 2e-3
    table = pd.read_csv(tmp_path / "choice.csv").set_index(["norm", "rate"])
    assert len(table) == 4 and table["mean"].idxmax() == (norm, rate)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pt")}
    assert choose.main(arguments) == (norm, rate) and len(times) == 4
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert "on 40 held-out training images" in capsys.readouterr().out


def test_mending_a_copy_leaves_the_network_and_moves_only_what_it_names(digits):
    settings = replace(cifar10.PROTOCOL, width=4, batch=32, decay=False)
    progress = training.Progress(settings, "sigprop", 0, digits, None)
    for part in range(4):
        x, y = (t[32 * part : 32 * part + 32] for t in (digits.train_x, digits.train_y))
        methods.step(progress.model, progress.optimizer, x, y)
    model = progress.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = lag.measure(model, digits, settings, 0, 5)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert set(found) == {"as trained", "statistics", "output", "both"}
    assert found["as trained"] == evaluation.accuracy(model, digits.test_x, digits.test_y)
    lag.train_on(model, digits, settings, 5, 0)
    moved = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    assert len(moved) == 2 and all(name.startswith("model.2.") for name in moved)
    assert found["output"] == evaluation.accuracy(model, digits.test_x, digits.test_y)


def test_the_ablation_writes_a_row_per_method_and_epoch(tmp_path):
    sizes = ["--train", "300", "--test", "50", "--epochs", "1", "2", "--seeds", "1"]
    frame = lag.main(["--dataset", "digits", *sizes, "--out", str(tmp_path)])
    rows = pd.read_csv(tmp_path / "lag.csv")
    assert list(rows["method"]) == ["sigprop"] * 2 + ["frozen"] * 2 and len(frame) == 4
