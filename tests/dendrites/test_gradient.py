"""Dendrites that begin where their outgoing weight gets the largest gradient."""

import numpy as np
import pytest
import torch
from torch import nn

from pilimit_lib.dendrites import DendriteConfig, EveryEpoch, Growth, dendritic, dendritic_layers
from pilimit_lib.dendrites.layers.gradient import (
    SHIFTS,
    begin,
    directions,
    linear_part,
    patches,
    unexplained,
    whiten,
)
from tests.dendrites.helpers import mlp

BLOCKS = {
    "linear": lambda: nn.Linear(5, 3),
    "convolution": lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1, padding_mode="reflect"),
    "one-dimensional": lambda: nn.Conv1d(2, 3, 4, dilation=2),
    "and norm": lambda: nn.Sequential(nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3)),
}
SHAPES = {
    "linear": (400, 5),
    "convolution": (30, 2, 7, 7),
    "one-dimensional": (40, 2, 20),
    "and norm": (30, 2, 7, 7),
}


def square(z):
    return z * z


def grown(net, losses, seed=0, **settings):
    config = DendriteConfig(
        init="gradient", switch=EveryEpoch(), seed=seed, convert=[nn.Linear, nn.Conv2d], **settings
    )
    return Growth(dendritic(net, config), config, losses=losses)


def test_the_gradient_of_the_outgoing_weight_is_the_largest_singular_value():
    """Neurons at their least squares, so that errors hold nothing linear, and a square as
    activation, of which the second order is all: then it is exact. Oracles: the singular values by
    numpy in other white coordinates, and autograd along random directions of unit variance."""
    torch.manual_seed(0)
    mixed = torch.eye(4) + 0.2 * torch.randn(4, 4)
    x = torch.randn(500, 4, dtype=torch.float64) @ mixed.double() + 1
    target = torch.stack([x[:, 0] * x[:, 1], (x[:, 2] - x[:, 3]).square()], 1)
    net = nn.Sequential(nn.Linear(4, 2)).double()
    design = torch.cat([x, torch.ones(500, 1)], 1)
    fit = torch.linalg.lstsq(design, target).solution
    with torch.no_grad():
        net[0].weight.copy_(fit[:4].T)
        net[0].bias.copy_(fit[4])

    def loss(model):
        return 0.5 * (model(x) - target).square().sum()

    growth = grown(net, lambda model: [loss(model)], activation=square)
    assert growth.step(0.0).added == ("0",)
    dendrite = net[0].dendrites[0]
    reached = torch.autograd.grad(loss(net), dendrite.w)[0].abs().numpy()
    error = (x @ fit[:4] + fit[4] - target).numpy()
    centred = (x - x.mean(0)).numpy()
    white = centred @ np.linalg.inv(np.linalg.cholesky(centred.T @ centred / 500)).T
    for i in range(2):
        singular = np.linalg.svd((white * error[:, i : i + 1]).T @ white)[1]
        assert reached[i] == pytest.approx(singular[0], rel=1e-6)
    for _ in range(200):
        u = torch.randn(2, 4, dtype=torch.float64)
        u /= (torch.tensor(white) @ u.T).std(0, correction=0)[:, None]
        random = (torch.tensor(error) * square(torch.tensor(white) @ u.T)).sum(0).abs().numpy()
        assert (random <= reached * (1 + 1e-6)).all()


def test_whitened_inputs_are_white_and_leave_no_linear_error():
    torch.manual_seed(0)
    x = torch.randn(300, 6, dtype=torch.float64) * torch.tensor([3.0, 2, 1, 1, 0.01, 0]) + 5
    white = whiten(x)
    assert white.rows.shape == (300, 4)  # .01 is beyond the share of the variance
    torch.testing.assert_close(white.rows.T @ white.rows / 300, torch.eye(4, dtype=x.dtype))
    torch.testing.assert_close((x - white.mean) @ white.basis, white.rows)
    assert whiten(x[:9]).rows.shape[1] == 2  # a quarter of the rows
    e = unexplained(x @ torch.randn(6, 2, dtype=x.dtype) + white.rows[:, :1].square(), white.rows)
    design = torch.cat([white.rows, torch.ones(300, 1)], 1)
    assert (design.T @ e).abs().max() < 1e-9 and e.std() > 0.5


def test_each_further_try_takes_the_next_direction():
    torch.manual_seed(0)
    rows, e = whiten(torch.randn(200, 3, dtype=torch.float64), 1.0).rows, torch.randn(200, 2)
    found = [directions(rows, e.double(), order) for order in range(4)]
    for i in range(2):
        basis = torch.stack([u[i] for u in found[:3]])
        torch.testing.assert_close(basis @ basis.T, torch.eye(3, dtype=basis.dtype))
    assert torch.equal(found[3], found[0])


@pytest.mark.parametrize("block", BLOCKS)
def test_it_begins_with_unit_variance_at_one_of_the_shifts(block):
    torch.manual_seed(0)
    module = BLOCKS[block]()
    config = DendriteConfig(init="gradient", convert=[type(module)])
    layer = dendritic(module, config).double()
    x = torch.randn(SHAPES[block], dtype=torch.float64).cumsum(-1)
    y = layer(x)
    dendrite = layer.grow(torch.Generator().manual_seed(0))
    part, norm = linear_part(dendrite.body)
    rows = patches(part, x, layer.axis)
    z = part(x).movedim(layer.axis, -1).reshape(len(rows), -1)
    bias = 0 if part.bias is None else part.bias
    torch.testing.assert_close(rows @ part.weight.flatten(1).T + bias, z)
    assert begin(dendrite, rows, torch.randn(len(rows), 3).double(), torch.sigmoid)
    rows = dendrite.body(x).movedim(layer.axis, -1).reshape(len(rows), -1).detach()
    torch.testing.assert_close(rows.std(0, correction=0), torch.ones(3).double(), atol=1e-5, rtol=0)
    distance = (rows.mean(0)[:, None] - SHIFTS).abs().min(1).values
    assert distance.max() < 1e-9 and dendrite.shifts is None
    assert norm is None or norm.weight.eq(1).all()
    torch.testing.assert_close(layer.train()(x), y)


def test_nothing_moves_but_the_new_dendrites():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Flatten(), nn.Linear(48, 2)
    )
    x, y = torch.randn(40, 1, 6, 6), torch.arange(40) % 2
    batches = [(x[:20], y[:20]), (x[20:], y[20:])]
    modes = []

    def losses(model):
        for a, b in batches:
            modes.append(model.training)
            yield nn.functional.cross_entropy(model(a), b)

    growth = grown(net, losses, max_dendrites=1)
    net(x)
    net[1].eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    random = torch.get_rng_state()
    growth.step(1.0)
    assert modes == [False, False] and net.training and not net[1].training
    assert torch.equal(torch.get_rng_state(), random)
    after = net.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(p.grad is None for p in net.parameters())
    assert len(after) == len(before) + 6
    weights = net[0].dendrites[0].body.weight.detach().clone()
    assert weights.abs().max() > 0.1
    net.train()(x)
    assert torch.equal(net[0].dendrites[0].body.weight, weights), "no batch standardises it anew"


def test_a_retry_begins_elsewhere_and_the_same_run_begins_the_same():
    x, y = torch.randn(60, 5), torch.randn(60, 3)

    def weights(steps):
        growth = grown(mlp(), lambda model: [(model(x) - y).square().mean()], max_tries=2)
        for score in steps:
            growth.step(score)
        return growth.network[0].dendrites[-1].body.weight.detach().clone()

    first = weights([1.0])
    assert torch.equal(first, weights([1.0]))
    assert not torch.allclose(first, weights([1.0, 0.5]), atol=1e-3)


def test_what_has_no_direction_begins_standardised():
    net = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Flatten(), nn.Linear(64, 2))
    x = torch.randn(30, 2, 6, 6)
    growth = grown(net, lambda model: [model(part).square().mean() for part in x.split(15)])
    net(x)
    growth.step(1.0)
    assert net[0].dendrites[0].shifts is not None and net[2].dendrites[0].shifts is None
    config = DendriteConfig(init="gradient", convert=[nn.Linear, "Sequential"])
    deep = dendritic(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)), config)
    assert linear_part(deep.neuron) is None
    # a loss without errors, inputs without variance, and rows that are not finite tell none apart
    for inputs in (torch.ones(30, 2, 6, 6), torch.full((30, 2, 6, 6), float("nan"))):
        blind = grown(nn.Sequential(nn.Flatten(), nn.Linear(72, 2)), lambda model: [])
        blind.losses = lambda model, inputs=inputs: [model(inputs).square().mean()]
        blind.network(x)
        blind.step(1.0)
        assert blind.network[1].dendrites[0].shifts is not None
        assert blind.network[1].dendrites[0].body.weight.isfinite().all()


def test_losses_are_asked_for_at_once_and_their_failure_changes_nothing():
    config = DendriteConfig(init="gradient", switch=EveryEpoch())
    with pytest.raises(ValueError, match=r"Growth\(losses=lambda net"):
        Growth(dendritic(mlp(), config), config)
    growth = Growth(dendritic(mlp()), DendriteConfig())
    with pytest.raises(ValueError, match=r"Growth\(losses=lambda net"):
        growth.reconfigure(config)

    def losses(model):
        raise OSError("the disk is gone")
        yield

    growth = grown(mlp(), losses)
    x = torch.randn(4, 5)
    growth.network(x)
    with pytest.raises(OSError, match="the disk is gone"):
        growth.step(1.0)
    assert all(len(layer.dendrites) == 0 for _, layer in dendritic_layers(growth.network))
    assert growth.network.training and growth.plateau.state.dendrites == 0
    assert all(layer.observer is None for _, layer in dendritic_layers(growth.network))
