"""Whose optimiser gets a new dendrite, in which group, and in which place."""

import pytest
import torch
from torch import nn

from pilimit_lib.dendrites import GPA, UPA, DendriteConfig, EveryEpoch, Growth, dendritic
from tests.dendrites.helpers import mlp

CONFIG = DendriteConfig(switch=EveryEpoch(), retain_all=True)


class Pair(nn.Module):
    """Two networks in one module, as the documentation has it for GANs."""

    def __init__(self, *extra):
        super().__init__()
        self.netG, self.netD = mlp(0), mlp(1)
        self.more = nn.ModuleList(extra)


def held(optimizer):
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def ids(module):
    return {id(p) for p in module.parameters()}


def test_an_optimiser_never_gets_the_dendrites_of_another_s_network():
    pair = dendritic(Pair(), CONFIG)
    of_g, of_d = (torch.optim.SGD(net.parameters(), 0.01) for net in (pair.netG, pair.netD))
    growth = Growth(pair, optimizer=of_g)
    for score in (1.0, 2.0):
        growth.step(score)
        pair.netD(pair.netG(torch.randn(8, 5)).repeat(1, 2)[:, :5]).square().sum().backward()
        before = [p.detach().clone() for p in pair.netD.parameters()]
        of_g.step()
        assert all(map(torch.equal, before, pair.netD.parameters()))
        assert held(of_g) == ids(pair.netG)
        assert len(list(pair.netD[0].dendrites)) == len(list(pair.netG[0].dendrites)) == score
    assert held(of_d) < ids(pair.netD)


def test_the_documented_tracker_keeps_two_optimisers_apart(facade):
    pair = UPA.initialize_pai(Pair())
    of_g = torch.optim.Adam(pair.netG.parameters())
    GPA.pai_tracker.set_optimizer_instance(of_g)
    pair, restructured, _ = GPA.pai_tracker.add_validation_score(1.0, pair)
    assert restructured and held(of_g) == ids(pair.netG)


def test_a_frozen_layer_s_dendrites_are_trained_by_who_trains_what_surrounds_it():
    inner = mlp(2)
    inner[0].requires_grad_(False)
    pair = Pair(inner)
    pair.netD[0].requires_grad_(False)
    pair.netG[0].requires_grad_(False)
    pair.more[0][2].requires_grad_(False)  # a frozen third network belongs to neither
    pair = dendritic(pair, CONFIG)
    of_g = torch.optim.SGD([p for p in pair.netG.parameters() if p.requires_grad], 0.1)
    growth = Growth(pair, optimizer=of_g)
    growth.step(1.0)
    frozen = ids(pair.netG[0].neuron)
    assert held(of_g) == ids(pair.netG) - frozen


def by_name(net):
    """Groups as the Hugging Face Trainer makes them."""
    names = dict(net.named_parameters())
    return [
        {"params": [p for n, p in names.items() if "bias" not in n], "weight_decay": 0.1},
        {"params": [p for n, p in names.items() if "bias" in n], "weight_decay": 0.0},
    ]


def one(net):
    return [{"params": list(net.parameters())}]


def backwards(net):
    """Groups in an order of the user's own."""
    return [{"params": list(net[2].parameters()) + list(net[0].parameters())}]


def frozen(net):
    return [{"params": [p for p in net.parameters() if p.requires_grad]}]


@pytest.mark.parametrize("groups", [one, by_name, backwards, frozen])
def test_after_growth_groups_are_as_if_they_were_built_for_the_grown_network(groups):
    net = mlp()
    if groups is frozen:
        net[0].requires_grad_(False)
    net = dendritic(net, CONFIG)
    optimizer = torch.optim.Adam(groups(net))
    growth = Growth(net, optimizer=optimizer)
    for score in (1.0, 2.0, 3.0):
        growth.step(score)
    fresh = torch.optim.Adam(groups(net))
    for group, expected in zip(optimizer.param_groups, fresh.param_groups, strict=True):
        assert [id(p) for p in group["params"]] == [id(p) for p in expected["params"]]
        assert group["weight_decay"] == expected["weight_decay"]


def test_a_used_up_generator_of_parameters_is_an_error_not_all_parameters(facade):
    pair = UPA.initialize_pai(Pair())
    GPA.pai_tracker.set_optimizer(torch.optim.Adam)
    arguments = {"params": pair.netG.parameters(), "lr": 0.1}
    assert held(GPA.pai_tracker.setup_optimizer(pair, arguments)) == ids(pair.netG)
    with pytest.raises(ValueError, match="opt_args\\['params'\\] = model.parameters\\(\\)"):
        GPA.pai_tracker.setup_optimizer(pair, arguments)
    without = {"lr": 0.1}
    assert held(GPA.pai_tracker.setup_optimizer(pair, without)) == ids(pair)
