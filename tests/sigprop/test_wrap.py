"""wrap: any chain of blocks in one call."""

import pytest
import torch
from torch import nn

from pilimit_lib import sigprop
from pilimit_lib.sigprop import monitors, propagators, signals


def adam(m):
    return torch.optim.Adam(m.parameters(), 0.01)


def blocks():
    return [nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Dropout(0.1), nn.Linear(8, 3)]


class Net(nn.Module):
    def __init__(self, more=False):
        super().__init__()
        self.layers = nn.ModuleList(blocks())
        if more:
            self.stem = nn.Linear(3, 3)


def wrapped(network, **options):
    return sigprop.wrap(
        network, signal=signals.project_labels(3, (8,), nn.Linear(12, 8)), optimizer=adam, **options
    )


@pytest.mark.parametrize(
    "make", [lambda: nn.Sequential(*blocks()), lambda: nn.ModuleList(blocks()), blocks, Net]
)
def test_every_kind_of_chain(make):
    net = wrapped(make())
    assert [type(p) for p in net.model] == [
        propagators.Loss,
        propagators.Fixed,
        propagators.Identity,
    ]
    assert net(torch.randn(6, 12), torch.arange(6) % 3).shape == (6, 3)


def test_parameters_are_shared_not_copied():
    network = nn.Sequential(*blocks())
    net = wrapped(network)
    assert net.model[0].module is network[0] and len(net.local_optimizers()) == 2


def test_output_says_where_the_global_loss_begins():
    chain = [nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)]
    assert [type(p).__name__ for p in wrapped(chain, output=-2).model] == [
        "Loss",
        "Identity",
        "Identity",
    ]
    net = wrapped(chain[:2], output=None)
    assert [type(p).__name__ for p in net.model] == ["Loss", "Loss"] and not list(net.parameters())
    with pytest.raises(ValueError, match="output=3 is none of the 3 blocks"):
        wrapped(chain, output=3)


def test_propagators_stay_as_they_are():
    own = propagators.Forward(nn.Linear(8, 8))
    signal = propagators.signals.Fixed(signals.project_labels(3, (8,)))
    net = sigprop.wrap([own, nn.Linear(8, 3)], signal=signal, optimizer=adam)
    assert net.model[0] is own and net.signal is signal


def test_monitors_around_each_loss():
    group = monitors.Group()
    net = wrapped(blocks(), monitor=monitors.loss.LabelMetrics, monitors=group)
    net(torch.randn(6, 12), torch.arange(6) % 3)
    assert {name: m["count"] for name, m in group.as_dict().items()} == {
        "signal:Sequential": 6,
        "0:Sequential": 6,
    }


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: wrapped(Net(more=True)),
            ValueError,
            r"\['stem.weight', 'stem.bias'\] of Net lie outside",
        ),
        (lambda: wrapped(Net(), blocks="tail"), ValueError, "no list of blocks called 'tail'"),
        (lambda: wrapped(nn.Linear(2, 2)), ValueError, "holds 0 lists of blocks"),
        (lambda: wrapped(3), TypeError, "network must be an nn.Sequential"),
        (lambda: wrapped([]), ValueError, "no blocks"),
        (lambda: wrapped([nn.Linear(2, 2), 3]), ValueError, "must be an nn.Module"),
    ],
)
def test_bad_networks_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
