"""Pruning keeps the function; the preview finds the layer where a dendrite helps."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from pilimit_lib.dendrites import (
    DendriteConfig,
    EveryEpoch,
    Growth,
    dendritic,
    dendritic_layers,
    preview,
    prune,
)
from tests.dendrites.helpers import ConvNet, grow_all, mlp


def adam_after_steps(model, x):
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    return optimizer


def test_negligible_dendrites_go_and_the_function_and_moments_stay():
    model = grow_all(dendritic(mlp()), times=4)
    x = torch.randn(6, 5)
    optimizer = adam_after_steps(model, x)
    layer = model[0]
    with torch.no_grad():
        for k in (1, 3):
            layer.dendrites[k].w.zero_()
        for later in (2, 3):
            layer.dendrites[later].v[1].zero_()
    before = model(x).detach()
    count = sum(p.numel() for p in model.parameters())
    moment = optimizer.state[layer.dendrites[2].v]["exp_avg"].clone()
    result = prune(model, 0.0, optimizer)
    assert result.removed == (("0", 3), ("0", 1)) and len(layer.dendrites) == 2
    torch.testing.assert_close(model(x), before, atol=1e-6, rtol=0)
    assert (
        result.parameters
        == count - sum(p.numel() for p in model.parameters())
        == 2 * (42 + 7) + 7 + 3 * 7 + 7
    )
    assert torch.equal(optimizer.state[layer.dendrites[1].v]["exp_avg"], moment[:1])
    held = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert held == {id(p) for p in model.parameters()}
    fresh = dendritic(mlp(1))
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh(x), model(x), atol=0, rtol=0)


def test_what_a_later_dendrite_needs_is_kept():
    model = grow_all(dendritic(nn.Sequential(nn.Linear(5, 3))), times=2)
    with torch.no_grad():
        model[0].dendrites[0].w.zero_()
    assert prune(model, 0.0).removed == ()
    with torch.no_grad():
        model[0].dendrites[1].w.zero_()
    assert prune(model, 0.0).removed == (("0", 1), ("0", 0)) and prune(model, 1.0).removed == ()


def test_the_first_of_two_can_go_and_growth_goes_on():
    config = DendriteConfig(switch=EveryEpoch(), retain_all=True)
    growth = Growth(dendritic(mlp(), config), optimizer=lambda ps: torch.optim.SGD(ps, 0.1))
    growth.step(1.0)
    growth.step(2.0)
    growth.network[0].dendrites[1].w.data += 1
    assert prune(growth.network, 1e-3, growth.optimizer).removed == (("0", 0), ("2", 1), ("2", 0))
    assert growth.network[0].dendrites[0].v is None
    growth.step(3.0)
    assert [len(layer.dendrites) for _, layer in dendritic_layers(growth.network)] == [2, 1]
    growth.network(torch.randn(2, 5)).sum().backward()
    with pytest.raises(ValueError, match="threshold"):
        prune(growth.network, -1.0)


def test_gain_is_the_explained_error_of_the_best_draw():
    torch.manual_seed(0)
    model = dendritic(nn.Sequential(nn.Linear(3, 2)), DendriteConfig()).double()
    x, target = torch.randn(30, 3, dtype=torch.float64), torch.randn(30, 2, dtype=torch.float64)
    model(x)
    loss = lambda net, batch: 0.5 * (net(batch[0]) - batch[1]).square().sum()  # noqa: E731
    (found,) = preview(model, loss, [(x, target)], draws=3, seed=4)
    from pilimit_lib.dendrites.layers.initial import fresh_copy
    from pilimit_lib.dendrites.run.phases import generator_for

    generator, gains = generator_for(4, "0", -1, 0), []
    shifts = torch.randn(3, 2, generator=generator_for(4, "0", -1, 1), dtype=torch.float64).numpy()
    residual = (model(x) - target).detach().numpy()
    for shift in shifts:
        body = fresh_copy(model[0].neuron, generator, 1.0, False)
        z = body(x).detach().numpy()
        a = 1 / (1 + np.exp(-(z - z.mean(0)) / z.std(0) - shift))
        explained = 0.0
        for i in range(2):  # least squares on [a_i, 1] against the residual beyond its mean
            design = np.stack([a[:, i], np.ones(30)], 1)
            fit = design @ np.linalg.lstsq(design, residual[:, i], rcond=None)[0]
            explained += ((residual[:, i] - residual[:, i].mean()) ** 2).sum() - (
                (residual[:, i] - fit) ** 2
            ).sum()
        gains.append(explained)
    assert found.gain == pytest.approx(max(gains), rel=1e-9) and found.parameters == 3 * 2 + 2 + 2


class TwoInputs(nn.Module):
    """The target bends in a, not in b: dendrites on the layer that sees a can explain it."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 1), nn.Linear(4, 1)

    def forward(self, x):
        return self.a(x[:, :4]) + self.b(x[:, 4:])


def test_preview_finds_where_dendrites_help_and_training_agrees():
    torch.manual_seed(0)
    net = dendritic(TwoInputs())
    x = torch.randn(400, 8)
    y = torch.tanh(2 * x[:, :4].sum(1, keepdim=True)).abs() + x.sum(1, keepdim=True)

    def train(model, steps):
        optimizer = torch.optim.Adam(model.parameters(), 0.03)
        for _ in range(steps):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
        return (model(x) - y).square().mean().item()

    train(net, 150)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    ranked = preview(
        net,
        lambda model, batch: (model(batch[0]) - batch[1]).square().sum(),
        [(x[:200], y[:200]), (x[200:], y[200:])],
        draws=16,
    )
    assert [g.name for g in ranked] == ["a", "b"] and ranked[0].gain > 3 * ranked[1].gain
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items()) and net.training
    losses = {}
    for name in ("a", "b"):
        copied = copy.deepcopy(net)
        for seed in range(3):
            dict(dendritic_layers(copied))[name].grow(torch.Generator().manual_seed(seed))
        losses[name] = train(copied, 200)
    assert losses["a"] < losses["b"]


def test_budget_is_kept_and_select_takes_the_choice():
    torch.manual_seed(0)
    config = DendriteConfig(switch=EveryEpoch())
    net = dendritic(ConvNet(), config)
    x, y = torch.randn(16, 1, 6, 6), torch.randint(0, 3, (16,))
    net(x)
    loss = lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1])  # noqa: E731
    ranked = preview(net, loss, [(x, y)], budget=60)
    chosen = [g for g in ranked if g.chosen]
    assert chosen and sum(g.parameters for g in chosen) <= 60 and len(ranked) == 3
    growth = Growth(
        net,
        optimizer=lambda ps: torch.optim.SGD(ps, 0.1),
        select=lambda network: [
            g.name for g in preview(network, loss, [(x, y)], budget=60) if g.chosen
        ],
    )
    assert set(growth.step(1.0).added) == {g.name for g in chosen}
    with pytest.raises(ValueError, match="no dendritic layers"):
        preview(mlp(), loss, [])
    with pytest.raises(RuntimeError, match="ran no dendritic layer"):
        preview(net, lambda model, batch: torch.zeros((), requires_grad=True), [0])
