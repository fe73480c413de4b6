"""Dendrites on finite π-networks: layers sampled from an infinitely wide network get dendrites like
any others."""

import pytest
import torch

from pilimit_lib.core import restore, snapshot
from pilimit_lib.dendrites import (
    DendriteConfig,
    EveryEpoch,
    Growth,
    dendritic,
    dendritic_layers,
    finalize,
)
from pilimit_lib.inf.mlp import FinPiMLPSample, InfMLP

LAYERS = ["FinPiInputLinearReLU", "FinPiLinearReLU"]


def sampled(n=24, seed=0):
    torch.manual_seed(seed)
    return FinPiMLPSample(InfMLP(d_in=5, d_out=3, r=8, L=1), n)


def config(**kwargs):
    return DendriteConfig(convert=LAYERS, dims=(-1, 0), **kwargs)


def test_growth_keeps_the_function_and_the_formula_holds_in_float64():
    net = sampled().double()
    x = torch.randn(7, 5, dtype=torch.float64)
    before = net(x).detach()
    model = dendritic(net, config())
    model(x)
    assert [name for name, _ in dendritic_layers(model)] == ["layers.0", "layers.1", "layers.2"]
    for _, layer in dendritic_layers(model):
        layer.grow(torch.Generator().manual_seed(1))
        layer.grow(torch.Generator().manual_seed(2))
    torch.testing.assert_close(model(x), before, atol=1e-12, rtol=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    layer = model.layers[1]
    h = torch.randn(7, 24, dtype=torch.float64)
    run = lambda m: torch.relu(h) @ m.weight.T + m.bias_alpha * m.bias  # noqa: E731
    d1, d2 = layer.dendrites
    a1 = torch.sigmoid(run(d1.body))
    a2 = torch.sigmoid(run(d2.body) + d2.v[0] * a1)
    torch.testing.assert_close(
        layer(h), run(layer.neuron) + d1.w * a1 + d2.w * a2, atol=1e-12, rtol=0
    )


def test_a_dendrite_of_a_pi_layer_moves_only_in_the_range_of_omega():
    growth = Growth(
        dendritic(sampled().double(), config(switch=EveryEpoch())),
        optimizer=lambda ps: torch.optim.SGD(ps, 0.5),
    )
    x, y = torch.randn(32, 5, dtype=torch.float64), torch.randn(32, 3, dtype=torch.float64)
    growth.model(x)
    growth.step(1.0)
    start = {
        name: layer.dendrites[0].body.weight.detach().clone()
        for name, layer in dendritic_layers(growth.network)
    }
    for _ in range(5):
        growth.optimizer.zero_grad()
        (growth.model(x) - y).square().mean().backward()
        growth.optimizer.step()
    for name, layer in list(dendritic_layers(growth.network))[:-1]:  # the readout is not projected
        body = layer.dendrites[0].body
        moved = body.weight.detach() - start[name]
        assert moved.norm() > 1e-6, name
        basis = torch.linalg.qr(body.omega).Q
        assert (moved - basis @ (basis.T @ moved)).norm() < 1e-6 * moved.norm(), name


@pytest.mark.parametrize("optimizer_state", ["keep", "reset"])
def test_it_trains_through_growth_and_comes_back_from_a_snapshot(optimizer_state):
    growth = Growth(
        dendritic(
            sampled(),
            config(switch=EveryEpoch(), retain_all=True, optimizer_state=optimizer_state, seed=0),
        ),
        optimizer=lambda ps: torch.optim.Adam(ps, 0.01),
    )
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(128, 5, generator=generator)
    y = torch.stack([x[:, 0] * x[:, 1], x[:, 2].abs(), x[:, 3]], 1)
    losses = []
    for _ in range(3):
        for _ in range(40):
            growth.optimizer.zero_grad()
            loss = (growth.model(x) - y).square().mean()
            loss.backward()
            growth.optimizer.step()
        losses.append(loss.item())
        growth.step(-loss.item())
    assert losses[2] < losses[1] < losses[0]
    fresh = dendritic(sampled(seed=5), config())
    restore(fresh, snapshot(growth.network))
    assert torch.equal(fresh(x), growth.network(x))
    torch.testing.assert_close(finalize(fresh)(x), fresh(x))
