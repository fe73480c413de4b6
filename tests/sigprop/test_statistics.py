"""Running statistics measured anew: the mean over the batches, nothing else touched."""

import copy

import pytest
import torch
from torch import nn

from pilimit_lib import sigprop


def test_statistics_are_the_mean_over_the_batches():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.5))
    net[1].running_mean.fill_(7.0)
    batches = [torch.randn(50, 3), 2 + torch.randn(50, 3)]
    hidden = [net[0](x).detach() for x in batches]
    momentum = net[1].momentum
    sigprop.recalibrate(net, batches)
    assert torch.allclose(net[1].running_mean, (hidden[0].mean(0) + hidden[1].mean(0)) / 2)
    assert torch.allclose(net[1].running_var, (hidden[0].var(0) + hidden[1].var(0)) / 2)
    assert net[1].momentum == momentum and all(m.training for m in net.modules())


def test_a_model_measures_the_input_stream_and_does_not_learn(make, data):
    net = make(norm=True)
    for _ in range(3):
        net(*data)
    before = copy.deepcopy(net.state_dict())
    net.model[0].eval()
    sigprop.recalibrate(net, data[0].split(12))
    assert net.training and not net.model[0].training
    changed = {
        key for key, value in net.state_dict().items() if not torch.equal(value, before[key])
    }
    assert changed and all("running" in key or "batches_tracked" in key for key in changed)
    # what the rows themselves give: over one batch, inference equals training's normalisation
    sigprop.recalibrate(net, [data[0]])
    first = net.signal.module[1].module_input
    norm, x = first[1], first[0](data[0])
    assert torch.allclose(norm.running_mean, x.mean(0), atol=1e-6)


def test_nothing_to_measure_by_is_an_error():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="at least one batch"):
        sigprop.recalibrate(net, [])
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
