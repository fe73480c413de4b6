"""Dendrites that begin with pre-activations of unit variance."""

import pytest
import torch
from torch import nn

from pilimit_lib.core import restore, snapshot
from pilimit_lib.dendrites import DendriteConfig, dendritic, dendritic_layers
from tests.dendrites.helpers import mlp

CONFIG = DendriteConfig(init="standardised", convert=[nn.Linear, nn.Conv2d, "Sequential"])
BLOCKS = {
    "linear": lambda: (nn.Linear(5, 40), (300, 5)),
    "convolution": lambda: (nn.Conv2d(2, 40, 3), (20, 2, 6, 6)),
    "convolution and norm": lambda: (
        nn.Sequential(nn.Conv2d(2, 40, 3, bias=False), nn.BatchNorm2d(40)),
        (20, 2, 6, 6),
    ),
}


@pytest.mark.parametrize("block", BLOCKS)
def test_after_the_first_batch_activations_vary_and_the_function_is_the_same(block):
    torch.manual_seed(0)
    module, shape = BLOCKS[block]()
    layer = dendritic(module, CONFIG)
    x = torch.randn(shape) + 0.5
    before = layer(x)
    dendrite = layer.grow(torch.Generator().manual_seed(0))
    first = dendrite.body(x)
    torch.testing.assert_close(layer(x), before)
    rows = dendrite.body(x).detach().movedim(1, -1).reshape(-1, 40)
    # the norm divides by sqrt(var + 1e-5), and weights of 0.01 give a var above 2e-4
    torch.testing.assert_close(rows.std(0, correction=0), torch.ones(40), atol=0.025, rtol=0)
    means = rows.mean(0)
    assert 0.7 < means.std() < 1.3 and abs(means.mean()) < 0.5  # N(0, 1) over 40 neurons
    assert torch.sigmoid(rows).std(0).min() > 0.05
    assert block == "convolution and norm" or torch.sigmoid(first).std() < 0.02
    again = rows.clone()
    layer(x * 3)  # once only
    layer.eval()(x)
    assert torch.equal(
        layer.train() and dendrite.body(x).detach().movedim(1, -1).reshape(-1, 40), again
    )


def test_evaluation_does_not_count_as_the_first_batch_and_it_survives_a_snapshot():
    config = DendriteConfig(init="standardised")
    net = dendritic(mlp(), config)
    for _, layer in dendritic_layers(net):
        layer.grow(torch.Generator().manual_seed(0))
    x = torch.randn(50, 5)
    net.eval()(x)
    with torch.no_grad():
        net.train()(x)
    weights = net[0].dendrites[0].body.weight
    assert weights.abs().max() < 0.1
    fresh = dendritic(mlp(1), config)
    restore(fresh, snapshot(net))
    for model in (net, fresh):
        model(x)
    assert weights.abs().max() > 0.1
    assert torch.equal(weights, fresh[0].dendrites[0].body.weight)
    assert "shifts" not in net[0].structure()
