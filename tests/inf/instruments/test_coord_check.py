"""Scaling with width: what is planted wrongly must be named, and nothing else."""

import math

import pandas as pd
import pytest
import torch

from pilimit_lib.inf import InfMLP, PiSGD
from pilimit_lib.inf.instruments import coord_check
from pilimit_lib.inf.instruments.coord_check import records

from .nets import F64, data, train

WIDTHS = (64, 512)
LAYERS = ("layers.0", "layers.1", "layers.2")


def limit(trained=True):
    torch.manual_seed(3)
    net = InfMLP(5, 3, r=6, L=1, bias_alpha=0, dtype=F64)
    if trained:
        train(net, *data("rows", 12), steps=10, lr=0.3)
    return net


def check(net, mult=None, change=None, with_limit=True, **how):
    """`mult`: learning-rate multiplier by layer, of the width; `change`: what is done to a network
    of width n."""

    def make(n):
        made = net.sample(n)
        if change is not None:
            with torch.no_grad():
                change(made, n)
        return made

    def optimizer(made):
        groups = []
        for name, layer in zip(LAYERS, made.layers):
            factor = (mult or {}).get(name, lambda n: 1.0)
            rate = factor(made.n) if hasattr(made, "n") else 1.0
            groups.append({"params": list(layer.parameters()), "lr": 0.05 * rate})
        return PiSGD(groups, lr=0.05)

    x, y = data("rows", 12)
    given = net if with_limit else None
    return coord_check(make, WIDTHS, x, y, optimizer, limit=given, steps=2, **how)


@pytest.mark.parametrize("trained", [True, False])
def test_sampled_networks_scale_as_their_limit(trained):
    found = check(limit(trained))
    assert found.ok and not found.off and "widths 64 to inf" in str(found)
    frame = pd.DataFrame(records(found))
    last = frame[(frame.step == 2) & (frame.quantity == "change")]
    mean = last.groupby(["layer", "width"])["size"].mean()
    for layer in LAYERS:
        assert mean[layer, 512] == pytest.approx(mean[layer, math.inf], rel=0.3)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_planted_learning_rate_is_named(layer, trained):
    found = check(limit(trained), {layer: lambda n: 3.0})
    assert found.off == [layer]
    (finding,) = found.findings
    assert finding.what == "own update" and finding.ratio == pytest.approx(3, rel=0.35)
    assert f"{layer}: its own update goes as n^" in str(found) and "learning rate" in str(found)


def test_widths_alone_do_not_show_a_factor_that_all_share():
    assert check(limit(), {"layers.1": lambda n: 3.0}, with_limit=False).ok


@pytest.mark.parametrize("power", [-1, 1])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_rate_that_scales_wrongly_is_named_without_a_limit_too(layer, power):
    found = check(limit(trained=power > 0), {layer: lambda n: (n / 64) ** power}, with_limit=False)
    assert found.off == [layer]
    assert found.findings[0].exponent == pytest.approx(power, abs=0.3)
    assert math.isnan(found.findings[0].ratio)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_planted_initialisation_is_named(layer):
    found = check(limit(), change=lambda net, n: net.layers[layer].weight.mul_(2))
    assert found.off == [LAYERS[layer]]
    assert found.findings[0].what == "gain"
    assert found.findings[0].ratio == pytest.approx(2, rel=0.35)
    scaled = check(limit(), change=lambda net, n: net.layers[layer].weight.mul_((n / 64) ** 0.5))
    assert scaled.off == [LAYERS[layer]] and "initialisation" in str(scaled)


def test_a_readout_that_should_start_at_zero():
    found = check(limit(trained=False), change=lambda net, n: net.layers[2].weight.normal_())
    assert found.off == ["layers.2"] and found.findings[0].ratio == math.inf


def test_the_limit_stays_and_bad_arguments_are_refused():
    net = limit()
    rows = list(net.rows)
    check(net)
    assert net.rows == rows
    x, y = data("rows")
    with pytest.raises(ValueError, match="two positive widths, one seed"):
        coord_check(net.sample, (8,), x, y, lambda n: PiSGD(n.parameters()))
