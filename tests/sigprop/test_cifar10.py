"""The CIFAR-10 protocol on a few digits: falling rates, measured statistics, the probe."""

from dataclasses import replace

import pandas as pd
import pytest
import torch
from torch import nn

from experiments.sigprop import cifar10, evaluation, methods, networks, training
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
