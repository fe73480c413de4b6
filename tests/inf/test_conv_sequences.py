"""Convolutions along sequences: torch's own in one dimension, and finite networks, are the
oracles."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pilimit_lib.inf import InfPiConv1d, InfPiInputConv1d
from pilimit_lib.inf.numerics import direction


@pytest.mark.parametrize(
    "how",
    [
        {"kernel_size": 3, "padding": "same"},
        {"kernel_size": 4, "stride": 3, "padding": 2, "dilation": 2},
        {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    ],
)
def test_they_are_conv1d_of_features(how):
    torch.manual_seed(0)
    layer = InfPiConv1d(3, 2, dtype=torch.float64, **how)
    g = torch.randn(2, 3, 11, dtype=torch.float64, requires_grad=True)
    theirs = nn.Conv1d(layer.conv.P, 2, bias=False, dtype=torch.float64, **how)
    theirs.weight = nn.Parameter(layer.conv.V.detach()[:, 0].permute(2, 0, 1).contiguous())
    unit, s = direction(g.transpose(1, 2).reshape(-1, 3))
    phi = (layer.conv.features.matrix(unit) * s).view(2, 11, -1).transpose(1, 2)
    expected, found = theirs(phi), layer(g)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(layer(g[0]), found[0])
    for a, b in zip(*(torch.autograd.grad(o.square().sum(), g) for o in (found, expected))):
        torch.testing.assert_close(a, b)
    first = InfPiInputConv1d(3, 2, dtype=torch.float64, **how)
    ordinary = nn.Conv1d(3, 2, bias=False, dtype=torch.float64, **how)
    ordinary.weight = nn.Parameter(first.conv.weight.detach()[:, :, 0])
    torch.testing.assert_close(first(g), ordinary(g))


def test_pooling_is_of_activations():
    torch.manual_seed(0)
    layer, g = InfPiConv1d(3, 2, 1, pool=2), torch.randn(2, 3, 7)
    single = InfPiConv1d(3, 2, 1)
    single.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(g), F.avg_pool1d(single(g), 2))


def test_finite_networks_of_sequences_tend_to_the_infinite_one():
    torch.manual_seed(0)
    first, second = InfPiInputConv1d(2, 3, padding=1), InfPiConv1d(3, 4, stride=2)
    readout = InfPiConv1d(4, 2, 1, output_layer=True)
    nn.init.normal_(readout.conv.V)
    x, gaps = torch.randn(3, 2, 12), []

    def finite(n):
        a = first.sample(n_out=n)
        b = second.sample(n, n, a.omega)
        return readout.sample(n, n, b.omega)(b(a(x)))

    with torch.no_grad():
        exact = readout(second(first(x)))
        for n in (32, 512):
            off = [(finite(n) - exact).square().mean() for _ in range(8)]
            gaps.append(torch.stack(off).median().sqrt())
    assert 2 < gaps[0] / gaps[1] < 9  # rate: 4
    assert torch.equal(copy.deepcopy(second)(first(x)), second(first(x)))


def test_what_is_no_sequence_is_refused():
    layer = InfPiConv1d(3)
    for x in (torch.randn(2, 3, 4, 5), torch.randn(3)):
        with pytest.raises(ValueError, match=r"InfPiConv1d expects sequences \[b, c, l\]"):
            layer(x)
    with pytest.raises(ValueError, match="kernel_size is .3, 3.; sequences have one dimension"):
        InfPiConv1d(3, kernel_size=(3, 3))
    with pytest.raises(ValueError, match="leaves nothing of a map of 1x2"):
        layer(torch.randn(1, 3, 2))
    with pytest.raises(
        ValueError, match="groups is 3; 1 was expected.*a population with a map of its own"
    ):
        InfPiConv1d(3, groups=3)
