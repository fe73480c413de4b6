"""Convolutions of infinite width beyond the plain one: strides, kernels of any size by layer,
borders of every kind, one dimension."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pilimit_lib.inf import InfPiConv2d, InfPiConvNet, InfPiInputConv2d
from pilimit_lib.inf.conv.geometry import PADDING_MODES
from pilimit_lib.inf.conv.sums import plain
from tests.inf.test_conv_nets import images

BORDERS = PADDING_MODES[1:]


def by_definition(layer: InfPiConv2d, g):
    """The layer from all of Φ at once, with torch's own pooling, border and convolution."""
    geometry = layer.geometry
    eye = torch.eye(layer.P, dtype=g.dtype).view(layer.P, 1, 1, layer.P)
    pointwise = copy.deepcopy(geometry).__class__((1, 1), pool=geometry.pool)
    phi = plain(layer.features, g, eye, pointwise, layer.layernorm)
    rows, columns = geometry.padding
    if geometry.padding_mode != "zeros":
        phi = F.pad(phi, (columns, columns, rows, rows), geometry.padding_mode)
        rows = columns = 0
    return F.conv2d(
        phi,
        layer.V.permute(3, 0, 1, 2),
        None,
        geometry.stride,
        (rows, columns),
        geometry.dilation,
    )


@pytest.mark.parametrize("mode", PADDING_MODES)
@pytest.mark.parametrize(
    "how",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": (3, 2), "stride": 2, "padding": (2, 0), "pool": (2, 1)},
        {"kernel_size": 3, "padding": 2, "dilation": 2, "pool": 2, "layernorm": True},
    ],
)
def test_a_border_is_that_of_torch_on_the_activations(mode, how):
    torch.manual_seed(0)
    layer = InfPiConv2d(3, 2, padding_mode=mode, dtype=torch.float64, chunk_elements=150, **how)
    g = torch.randn(2, 3, 7, 9, dtype=torch.float64, requires_grad=True)
    found, expected = layer(g), by_definition(layer, g)
    weight = torch.randn_like(expected)
    torch.testing.assert_close(found, expected)
    inputs = (g, layer.V)
    for a, b in zip(*(torch.autograd.grad((o * weight).sum(), inputs) for o in (found, expected))):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(layer(g[0]), found[0])


@pytest.mark.parametrize("mode", BORDERS)
def test_the_border_of_an_input_layer_is_that_of_conv2d(mode):
    theirs = nn.Conv2d(3, 4, 3, 2, (2, 1), padding_mode=mode, bias=False)
    ours = InfPiInputConv2d(3, 4, 3, 2, (2, 1), padding_mode=mode)
    with torch.no_grad():
        theirs.weight.copy_(ours.weight)
    x = torch.randn(2, 3, 6, 5)
    torch.testing.assert_close(ours(x), theirs(x))


PLANS = {
    "strided": {"strides": (2, 1)},
    "kernels": {"kernels": (4, 1, 3), "input_stride": 2},
    "reflect": {"padding_mode": "reflect", "strides": (1, 2)},
    "circular, residual": {"padding_mode": "circular", "shortcuts": ((0, 2),), "branch_gain": 0.5},
    "replicate, pooled": {"padding_mode": "replicate", "pools": (2, 1)},
}


def plan(name: str, **more) -> InfPiConvNet:
    torch.manual_seed(0)
    net = InfPiConvNet(3, 2, (3, 4, 3), **PLANS[name] | more)
    nn.init.normal_(net.layers[-1].V, std=0.5)
    return net


@pytest.mark.parametrize("name", PLANS)
def test_finite_twins_tend_to_networks_of_any_shape(name):
    net, gaps = plan(name), []
    x, _ = images(size=8)
    with torch.no_grad():
        exact = net(x)
        for n in (32, 512):
            torch.manual_seed(n)
            off = [(net.sample(n)(x) - exact).square().mean() for _ in range(8)]
            gaps.append(torch.stack(off).median().sqrt())
    assert 2 < gaps[0] / gaps[1] < 9  # rate: 4


@pytest.mark.parametrize("name", PLANS)
def test_their_checkpoints_build_them_again_and_refuse_others(name):
    net = plan(name)
    x, _ = images(size=8)
    again = InfPiConvNet.from_state_dict(net.state_dict())
    assert torch.equal(again(x), net(x)) and again.architecture() == net.architecture()
    assert torch.equal(copy.deepcopy(net)(x), net(x))
    other = InfPiConvNet(3, 2, (3, 4, 3))
    with pytest.raises(RuntimeError, match=f"{next(iter(PLANS[name]))} is "):
        other.load_state_dict(net.state_dict())
    twin = net.sample(6)
    assert torch.equal(type(twin).from_state_dict(twin.state_dict())(x), twin(x))


def test_the_checkpoint_of_a_plain_network_is_as_it_was():
    later = {"strides", "kernels", "padding_mode", "start_degree", "norm", "noise_width"}
    net = InfPiConvNet(3, 2, (3, 4), strides=(1,), kernels=(3, 3))
    assert not later & set(net.architecture())
    assert "strides" not in repr(net) and "strides=(2, 1)" in repr(plan("strided"))
    net.load_state_dict(InfPiConvNet(3, 2, (3, 4)).state_dict())


def test_what_has_no_place_is_refused():
    for how, message in (
        ({"padding_mode": "same"}, "padding_mode is 'same'; one of zeros, circular"),
        ({"start_degree": -1}, "start_degree is -1.*outputs would begin at 0"),
    ):
        with pytest.raises(ValueError, match=message):
            InfPiConv2d(4, **how)
    reflect = InfPiConv2d(4, padding=3, padding_mode="reflect", pool=2)
    with pytest.raises(ValueError, match="can't take its border from a map of 3x4.*less 1"):
        reflect(torch.randn(1, 4, 6, 9))
    for wrong, message in (
        ({"strides": (2,)}, "strides has 1 entries for 2 hidden layers"),
        ({"kernels": (3, 3)}, "kernels has 2 entries for 3 layers"),
        ({"kernels": (3, 2, 3)}, "kernel_size is 2 with stride 1; an odd number"),
        ({"kernels": (2, 3, 3), "input_stride": 4}, "kernel_size is 2 with stride 4"),
        ({"strides": (1, 2), "shortcuts": [(0, 2)]}, "strides .1, 2.; a sum needs the same rank"),
    ):
        with pytest.raises(ValueError, match=message):
            InfPiConvNet(3, 2, (4, 4, 4), **wrong)


def test_groups_are_layers_of_populations():
    """A finite convolution with groups: each group of channels is a π-layer's twin by itself, and a
    layer over both is the sum of two whose Ω is the same."""
    torch.manual_seed(0)
    n, maps = 6, [torch.randn(2, 3, 5, 5) for _ in range(2)]
    layers = [InfPiConv2d(3, 2, padding=1) for _ in range(2)]
    below = [torch.randn(n, 3) for _ in range(2)]
    h = [torch.einsum("nr,brhw->bnhw", o, g) / n**0.5 for o, g in zip(below, maps)]
    twins = [layer.sample(n, n, omega) for layer, omega in zip(layers, below)]
    grouped = nn.Conv2d(2 * n, 2 * n, 3, padding=1, groups=2, bias=False)
    grouped.weight = nn.Parameter(torch.cat([twin.weight for twin in twins]))
    phi = [twin.nonlin(x.movedim(1, -1)).movedim(-1, 1) for twin, x in zip(twins, h)]
    expected = torch.cat([twin(x) for twin, x in zip(twins, h)], 1)
    torch.testing.assert_close(grouped(torch.cat(phi, 1)), expected)
    omega = torch.randn(n, 2)
    over = [layer.sample(n, n, o, omega) for layer, o in zip(layers, below)]
    dense = nn.Conv2d(2 * n, n, 3, padding=1, bias=False)
    dense.weight = nn.Parameter(torch.cat([twin.weight for twin in over], 1))
    torch.testing.assert_close(dense(torch.cat(phi, 1)), sum(f(x) for f, x in zip(over, h)))
