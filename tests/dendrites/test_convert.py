"""Which modules become dendritic, in which order, and that nothing is half-converted."""

import pytest
import torch
from torch import nn

from pilimit_lib.dendrites import (
    DendriteConfig,
    DendriticLayer,
    EveryEpoch,
    Growth,
    PAISequential,
    dendritic,
    dendritic_layers,
    report,
)
from pilimit_lib.dendrites.compat.resnet import ResNetPAI
from tests.dendrites.helpers import ConvNet, grow_all, mlp


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(2, 2, 1), nn.Conv1d(2, 2, 1)

    def forward(self, x):
        return self.conv2(self.conv1(x))


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer1 = nn.Sequential(Inner(), Inner())
        self.fc = nn.Linear(2, 2)

    def forward(self, x):
        return self.fc(self.layer1(x).mean(-1))


def names(model):
    return [name for name, _ in dendritic_layers(model)]


@pytest.mark.parametrize(
    "rules, expected",
    [
        ({}, ["layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1", "layer1.1.conv2", "fc"]),
        ({"convert": [nn.Linear]}, ["fc"]),
        ({"convert": ["Inner"]}, ["layer1.0", "layer1.1"]),
        ({"convert": [".layer1.0.conv1", ".fc"]}, ["layer1.0.conv1", "fc"]),
        (
            {"convert": [lambda module, name: name.endswith("conv2")]},
            ["layer1.0.conv2", "layer1.1.conv2"],
        ),
        (
            {"track": [".layer1.0.conv1"]},
            ["layer1.0.conv2", "layer1.1.conv1", "layer1.1.conv2", "fc"],
        ),
        ({"track": ["Inner"]}, ["fc"]),
        ({"track": [nn.Sequential]}, ["fc"]),
        (
            {"track": [".layer1.0"], "convert": [nn.Conv1d, ".layer1.1"]},
            ["layer1.1"],
        ),  # an id outranks types; tracking an id outranks all
        ({"track": ["Inner"], "convert": ["Inner"]}, []),
    ],
)
def test_rules(rules, expected):
    assert names(dendritic(Outer(), DendriteConfig(**rules))) == expected


def test_report_says_what_is_neither_wrapped_nor_tracked():
    model = dendritic(Outer(), DendriteConfig(convert=[nn.Linear], track=[".layer1.0"]))
    found = report(model)
    assert found.wrapped == ("fc",) and found.tracked == ("layer1.0",)
    assert found.untracked_parameters == tuple(
        f"layer1.1.conv{i}.{p}" for i in (1, 2) for p in ("weight", "bias")
    )
    assert len(found.unwrapped_parameters) == 8
    assert report(dendritic(ConvNet())).bare_norms == ("block1.1", "block2.1")
    assert report(dendritic(ConvNet(PAISequential))).bare_norms == ()


def test_an_id_that_meets_nothing_is_an_error_and_nothing_has_changed():
    model = Outer()
    with pytest.raises(
        ValueError,
        match=r"no module with id '.layer1.0.conv3' was met; did you mean \['.layer1.0.conv",
    ):
        dendritic(model, DendriteConfig(track=[".layer1.0.conv3"]))
    assert names(model) == []
    with pytest.raises(ValueError, match="inside a tracked module"):
        dendritic(model, DendriteConfig(track=["Inner"], convert=[".layer1.0.conv1"]))


def test_a_shared_module_is_converted_once_and_shares_its_dendrites():
    shared = nn.Linear(3, 3)
    model = dendritic(nn.Sequential(shared, nn.ReLU(), shared))
    assert model[0] is model[2] and names(model) == ["0"]
    grow_all(model)(torch.randn(2, 3)).sum().backward()
    assert sum(p.numel() for p in model.parameters()) == 2 * 12 + 3


def test_the_network_may_itself_be_the_layer():
    model = dendritic(nn.Linear(2, 2))
    assert isinstance(model, DendriticLayer) and model.name == ""
    growth = Growth(
        model, DendriteConfig(switch=EveryEpoch()), optimizer=lambda ps: torch.optim.SGD(ps, 0.1)
    )
    assert growth.step(1.0).added == ("",) and len(model.dendrites) == 1


def test_replacement_comes_before_conversion():
    class Old(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(2, 2)

    class New(nn.Module):
        def __init__(self, old):
            super().__init__()
            self.inner = old.lin

    old = Old()
    model = dendritic(nn.Sequential(old), DendriteConfig(replace={Old: New}))
    assert (
        type(model[0]) is New and names(model) == ["0.inner"] and model[0].inner.neuron is old.lin
    )
    with pytest.raises(TypeError, match="replacement of '0' \\(Old\\) gave a int"):
        dendritic(nn.Sequential(Old()), DendriteConfig(replace={Old: lambda old: 3}))


def test_attention_projections_that_bypass_forward_are_left_alone():
    model = dendritic(nn.MultiheadAttention(8, 2, batch_first=True))
    # out_proj's weights are read directly: dendrites there would never be used
    assert names(model) == []


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_torchvision_resnet_keeps_its_function_through_replacement_and_growth(kind):
    resnet_module = pytest.importorskip("torchvision.models.resnet", reason="needs torchvision")
    torch.manual_seed(0)
    block = {"basic": resnet_module.BasicBlock, "bottleneck": resnet_module.Bottleneck}[kind]
    net = resnet_module.ResNet(
        block, [1, 1, 1, 1], num_classes=4, width_per_group=16 if kind == "bottleneck" else 64
    ).eval()
    x = torch.randn(2, 3, 32, 32)
    before = net(x)
    model = dendritic(ResNetPAI(net)).eval()
    torch.testing.assert_close(model(x), before)
    grow_all(model, loud=False)
    torch.testing.assert_close(model(x), before, atol=1e-6, rtol=0)
    assert report(model).untracked_parameters == () and report(model).bare_norms == ()


def test_bad_configurations_are_named():
    for kwargs, error, text in [
        ({"convert": "Linear"}, TypeError, "convert got 'Linear'"),
        ({"track": [3]}, TypeError, "track got"),
        ({"processors": [1]}, TypeError, "processors got"),
        ({"dims": [-1, -1]}, ValueError, "a single 0"),
        ({"init_scale": 0}, ValueError, "init_scale got 0"),
        ({"activation": "sigmod"}, ValueError, "activation got 'sigmod'"),
        ({"activation": 3}, TypeError, "activation got 3"),
        ({"optimizer_state": "drop"}, ValueError, "optimizer_state"),
        ({"graphs": "always"}, ValueError, "graphs got"),
        ({"reduce_scores": "max"}, ValueError, "reduce_scores"),
    ]:
        with pytest.raises(error, match=text):
            DendriteConfig(**kwargs)


def test_a_checkpoint_of_another_activation_or_network_is_refused_whole():
    from pilimit_lib.core import restore, snapshot

    source = grow_all(dendritic(mlp()))
    target = dendritic(mlp(), DendriteConfig(activation="tanh"))
    weights = {k: v.clone() for k, v in target.state_dict().items()}
    with pytest.raises(ValueError, match="activation 'sigmoid', but is configured with 'tanh'"):
        restore(target, snapshot(source))
    assert list(target.state_dict()) == list(weights) and all(
        torch.equal(v, weights[k]) for k, v in target.state_dict().items()
    )
    narrow = dendritic(mlp(sizes=(5, 4, 3)))
    with pytest.raises(RuntimeError, match="size mismatch"):
        restore(narrow, snapshot(source))
    assert not len(narrow[0].dendrites)
