"""Learning rates of single neurons, under every optimiser that could move a weight without a
gradient."""

import pytest
import torch
from torch import nn, optim

from pilimit_lib.lab import NotFound, watch

from .conftest import PlainNet

OPTIMISERS = {
    "sgd with momentum": (
        optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    ),
    "adam": (optim.Adam, {"lr": 0.01}),
    "adam with decay": (optim.Adam, {"lr": 0.01, "weight_decay": 0.1}),
    "adamw": (optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "rmsprop": (optim.RMSprop, {"lr": 0.01, "momentum": 0.5}),
}


def steps(model, optimizer, count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.randn(8, 1, 8, 8, generator=generator)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMISERS)
def test_rate_zero_is_bit_identical_with_a_warm_optimiser(name):
    kind, options = OPTIMISERS[name]
    torch.manual_seed(0)
    model = PlainNet()
    optimizer = kind(model.parameters(), **options)
    lab = watch(model, optimizer, example=torch.randn(2, 1, 8, 8))
    # momentum and moments are warm: a gradient of zero would still move the weights
    steps(model, optimizer, 3)
    stem, narrow = lab.model.layers[0], lab.model.layers[2]
    stem.set_per_neuron_learning_rate({0, 1}, lr=0.0)
    narrow.set_per_incoming_neuron_learning_rate({2}, lr=0.0)
    row, bias, column = (
        t.detach().clone()
        for t in (model.stem.weight[:2], model.stem.bias[:2], model.narrow.weight[:, 2])
    )
    rest = model.stem.weight[2:].detach().clone()
    steps(model, optimizer, 5)
    assert torch.equal(model.stem.weight[:2], row) and torch.equal(model.stem.bias[:2], bias)
    assert torch.equal(model.narrow.weight[:, 2], column)
    assert (model.stem.weight[2:] != rest).any(dim=(1, 2, 3)).all()


@pytest.mark.parametrize("name", OPTIMISERS)
def test_a_rate_scales_the_step_and_one_leaves_it_alone(name):
    """The first step at rate r is r times the full one (under Adam a scaled gradient would give the
    full one)."""

    def first_step(rate):
        torch.manual_seed(0)
        model = PlainNet()
        kind, options = OPTIMISERS[name]
        optimizer = kind(model.parameters(), **options)
        lab = watch(model, optimizer, example=torch.randn(2, 1, 8, 8))
        if rate is not None:
            lab.model.layers[0].set_per_neuron_learning_rate({1}, lr=rate)
        old = model.stem.weight.detach().clone()
        steps(model, optimizer, 1)
        return model.stem.weight.detach() - old, model.stem.weight.detach()

    full, weight = first_step(None)
    half, _ = first_step(0.5)
    torch.testing.assert_close(half[1], 0.5 * full[1], rtol=1e-3, atol=1e-7)
    assert torch.equal(half[0], full[0])
    assert torch.equal(first_step(1.0)[1], weight)


def test_transposed_convolution_scales_its_own_dimension():
    torch.manual_seed(0)
    model = nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.ReLU(), nn.Conv2d(4, 1, 1))
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    lab = watch(model, optimizer, example=torch.randn(2, 3, 4, 4))
    lab.model.layers[0].set_per_neuron_learning_rate({3}, lr=0)
    before = model[0].weight.detach().clone()
    model(torch.randn(2, 3, 4, 4)).square().mean().backward()
    optimizer.step()
    changed = model[0].weight != before
    assert not changed[:, 3].any() and changed[:, :3].any(dim=(0, 2, 3)).all()


@pytest.mark.parametrize("rate", [float("nan"), float("inf"), -0.1, 1.5, "0.5", True, None])
def test_a_bad_rate_is_refused_and_nothing_is_set(rate):
    model = PlainNet()
    lab = watch(model, optim.SGD(model.parameters(), lr=0.1), example=torch.randn(2, 1, 8, 8))
    with pytest.raises(ValueError, match="multiplier"):
        lab.model.layers[0].set_per_neuron_learning_rate({0}, lr=rate)
    assert (lab.model.layers[0].neurons.rate == 1).all()


def test_unknown_neurons_are_refused_and_nothing_is_set():
    model = PlainNet()
    lab = watch(model, optim.SGD(model.parameters(), lr=0.1), example=torch.randn(2, 1, 8, 8))
    with pytest.raises(NotFound, match=r"no such neurons: \[999\]; they are counted from 0 to 5"):
        lab.model.layers[0].set_per_neuron_learning_rate({0, 999}, lr=0.0)
    with pytest.raises(TypeError, match="integers"):
        lab.model.layers[0].set_per_neuron_learning_rate({0.5}, lr=0.0)
    assert (lab.model.layers[0].neurons.rate == 1).all()


def test_frozen_layers_do_not_move_with_a_warm_optimiser():
    torch.manual_seed(0)
    model = PlainNet()
    optimizer = optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    lab = watch(model, optimizer, example=torch.randn(2, 1, 8, 8))
    steps(model, optimizer, 3)
    lab.model.freeze_layers_up_to_idx(2)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.step()  # a left-over gradient would be applied here
    steps(model, optimizer, 3)
    still = {n for n, p in model.named_parameters() if torch.equal(p, before[n])}
    assert still == {"stem.weight", "stem.bias", "inner.weight", "narrow.weight", "narrow.bias"}
    with pytest.raises(NotFound, match="no layer with index 7"):
        lab.model.freeze_layers_up_to_idx(7)
