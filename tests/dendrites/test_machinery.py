"""Layers that others have worked on: weight and spectral norm, pruning, hooks, weights in use."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize, prune

from pilimit_lib.dendrites import DendriteConfig, EveryEpoch, Growth, dendritic, finalize
from tests.dendrites.helpers import mlp


def adam(parameters):
    return torch.optim.Adam(parameters, 0.01)


class Doubled(nn.Module):
    """A parametrisation without an inverse."""

    def forward(self, x):
        return 2 * x


CASES = {
    "weight norm": lambda: (parametrizations.weight_norm(nn.Linear(5, 4)), (6, 5)),
    "spectral norm": lambda: (parametrizations.spectral_norm(nn.Linear(5, 4)), (6, 5)),
    "orthogonal": lambda: (parametrizations.orthogonal(nn.Linear(4, 4)), (6, 4)),
    "own": lambda: (
        parametrize.register_parametrization(nn.Linear(5, 4), "weight", Doubled()),
        (6, 5),
    ),
    "convolution": lambda: (parametrizations.spectral_norm(nn.Conv2d(2, 4, 3)), (6, 2, 5, 5)),
}


@pytest.mark.parametrize("case", CASES)
def test_parametrised_layers_grow_learn_and_come_back(case):
    torch.manual_seed(0)
    config = DendriteConfig(switch=EveryEpoch(), retain_all=True, seed=0)
    layer, shape = CASES[case]()
    twin = copy.deepcopy(layer)
    growth = Growth(dendritic(nn.Sequential(layer), config), optimizer=adam)
    x = torch.randn(shape)
    for score in (1.0, 2.0, 3.0):
        for _ in range(2):
            growth.optimizer.zero_grad()
            growth.model(x).square().sum().backward()
            growth.optimizer.step()
        growth.model.eval()
        before = growth.model(x).detach()
        assert growth.step(score).added == ("0",)
        torch.testing.assert_close(growth.model.eval()(x), before, atol=1e-6, rtol=0)
        growth.model.train()
    grown = growth.model[0]
    assert grown.dendrites[0].w.abs().max() > 0
    assert type(grown.dendrites[0].body) is type(grown.neuron)
    fresh = dendritic(nn.Sequential(twin), config)
    fresh.load_state_dict(growth.model.state_dict())
    expected = growth.model.eval()(x)
    torch.testing.assert_close(fresh.eval()(x), expected)
    torch.testing.assert_close(finalize(growth.model)(x), expected)


def test_weight_norm_begins_as_small_as_other_dendrites_and_spectral_norm_at_norm_one():
    draw = lambda: torch.Generator().manual_seed(0)  # noqa: E731
    plain = dendritic(nn.Linear(5, 4)).grow(draw()).body
    normed = dendritic(parametrizations.weight_norm(nn.Linear(5, 4))).grow(draw()).body
    assert normed.weight.norm() < 3 * plain.weight.norm()
    spectral = dendritic(parametrizations.spectral_norm(nn.Linear(50, 40))).grow(draw()).body
    assert torch.linalg.matrix_norm(spectral.weight, 2).item() == pytest.approx(1.0, abs=0.1)


def old_weight_norm(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(layer)


@pytest.mark.parametrize(
    "norm, remedy",
    [
        (old_weight_norm, "parametrizations.weight_norm"),
        (nn.utils.spectral_norm, "parametrizations.spectral_norm"),
        (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "prune.remove"),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weights_made_by_hooks_are_refused_at_the_conversion(norm, remedy):
    net = mlp()
    net[2] = norm(net[2])
    with pytest.raises(TypeError, match=f"layer '2'(.|\n)*{remedy}(.|\n)*track=\\['.2'\\]"):
        dendritic(net)
    assert type(net[0]) is nn.Linear  # nothing was changed
    dendritic(net, DendriteConfig(track=[".2"]))


def test_hooks_from_before_the_conversion_fire_once_and_on_the_neurons():
    net, seen = mlp(), []
    net[0].register_forward_hook(lambda module, args, output: seen.append("after"))
    net[0].register_forward_pre_hook(lambda module, args: seen.append("before"))
    net[0].register_full_backward_hook(lambda module, grads, outs: seen.append("backward"))
    growth = Growth(dendritic(net, DendriteConfig(switch=EveryEpoch())), optimizer=adam)
    growth.step(1.0)
    growth.step(2.0)
    assert len(net[0].dendrites) == 2
    net(torch.randn(3, 5, requires_grad=True)).sum().backward()
    assert seen == ["before", "after", "backward"]


class Tied(nn.Module):
    """The last layer is used through its weight only."""

    def __init__(self):
        super().__init__()
        self.inner, self.out, self.idle = nn.Linear(5, 4), nn.Linear(4, 3), nn.Linear(2, 2)

    def forward(self, x):
        return functional.linear(self.inner(x), self.out.weight)


def test_a_layer_used_through_its_weight_is_named_and_gets_no_dendrites():
    growth = Growth(dendritic(Tied(), DendriteConfig(switch=EveryEpoch())), optimizer=adam)
    growth.model(torch.randn(3, 5))
    with pytest.warns(UserWarning, match="layer 'out' was never called, only its weights"):
        assert growth.step(1.0).added == ("inner", "idle")
    growth.step(2.0)  # said once
    called = Growth(dendritic(mlp(), DendriteConfig(switch=EveryEpoch())), optimizer=adam)
    assert called.model[0].weight.shape == (7, 5)
    called.model(torch.randn(3, 5))
    assert called.step(1.0).added == ("0", "2")
