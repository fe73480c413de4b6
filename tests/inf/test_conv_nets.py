"""ConvNets of infinite width: the layers in the manner of nn.Conv2d, the finite twins, checkpoints
and errors."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pilimit_lib.core import load, restore, save, snapshot
from pilimit_lib.inf import (
    FinPiConv2d,
    InfPiConv2d,
    InfPiConvNet,
    InfPiInputConv2d,
    InfPiLinear,
    InfPiResNet,
    PiSGD,
    clip_grad_norm_,
    param_groups,
)
from pilimit_lib.inf.conv.compiled import conv2d
from pilimit_lib.inf.conv.geometry import Geometry
from pilimit_lib.inf.dual.shared import shared_features
from pilimit_lib.inf.moments.compiled import linear


def images(b: int = 4, size: int = 4):
    """Noise, with the first channel brighter where the label is 1."""
    x, y = (
        torch.randn(b, 3, size, size, generator=torch.Generator().manual_seed(1)),
        torch.arange(b) % 2,
    )
    x[:, 0] += 2 * y[:, None, None]
    return x, y


def network(kind: str = "chain", **how):
    torch.manual_seed(0)
    if kind == "residual":
        net = InfPiResNet(3, 2, (3, 4), blocks=1, branch_gain=0.5, **how)
    else:
        net = InfPiConvNet(3, 2, (3, 4, 3), pools=(2, 1), **how)
    # with a readout of 0 little would happen in a few steps
    nn.init.normal_(net.layers[-1].V, std=0.5)
    return net


@pytest.mark.parametrize(
    "kernel, stride, padding, dilation",
    [
        (3, 1, 1, 1),
        ((3, 2), (2, 1), (1, 0), (1, 2)),
        (1, 2, 0, 1),
        (3, 1, "same", 2),
        (3, 1, "valid", 1),
    ],
)
def test_shapes_are_those_of_conv2d(kernel, stride, padding, dilation):
    theirs = nn.Conv2d(4, 5, kernel, stride, padding, dilation)
    x = torch.randn(2, 4, 9, 8)
    for ours in (
        InfPiConv2d(4, 5, kernel, stride, padding, dilation),
        InfPiInputConv2d(4, 5, kernel, stride, padding, dilation),
    ):
        assert ours(x).shape == theirs(x).shape and ours(x[0]).shape == theirs(x[0]).shape
        torch.testing.assert_close(ours(x)[0], ours(x[0]))


def test_a_kernel_of_one_is_the_linear_layer_at_every_position():
    torch.manual_seed(0)
    conv, linear = (
        InfPiConv2d(5, 3, 1, bias_alpha=0.5),
        InfPiLinear(5, 3, fit="minimax", bias_alpha=0.5),
    )
    with torch.no_grad():
        linear.V.copy_(conv.V[:, 0, 0])
        linear.bias.copy_(conv.bias.normal_())
    g = torch.randn(2, 5, 4, 6)
    torch.testing.assert_close(conv(g).permute(0, 2, 3, 1), linear(g.permute(0, 2, 3, 1)))


def test_the_layer_starts_as_a_gaussian_process_with_the_dual_kernel_as_covariance():
    torch.manual_seed(0)
    layer = InfPiConv2d(3, 20_000, 1, gain=2.0)
    g = torch.randn(1, 3, 1, 4)
    out = layer(g)[0, :, 0].T.double()  # [4 o]
    unit, s = F.normalize(g[0, :, 0].T.double()), g[0, :, 0].norm(dim=0).double()
    expected = (
        4
        * torch.outer(s, s)
        * layer.series.kernel(unit @ unit.T)
        / layer.series.kernel(torch.ones(()))
    )
    torch.testing.assert_close(out @ out.T, expected, rtol=0.05, atol=0.05 * float(expected.max()))


@pytest.mark.parametrize(
    "kind, how",
    [
        ("chain", {}),
        ("residual", {"bias_alpha": 0.5}),
        ("chain", {"layernorm": True}),
        ("residual", {"degree": 4, "activation": "gelu"}),
    ],
)
def test_finite_twins_tend_to_the_infinite_network_at_rate_one_over_root_n(kind, how):
    net = network(kind, **how)
    x, _ = images()
    with torch.no_grad():
        exact, gaps = net(x), []
        for n in (32, 512):
            torch.manual_seed(n)
            gaps.append(
                torch.stack([(net.sample(n)(x) - exact).square().mean() for _ in range(8)])
                .median()
                .sqrt()
            )
    assert 2 < gaps[0] / gaps[1] < 9  # rate: 4


def train(net, lr: float):
    x, y = images()
    optimizer = torch.optim.SGD(net.parameters(), lr, momentum=0.9, weight_decay=0.01)
    for _ in range(6):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    with torch.no_grad():
        return net(x)


@pytest.mark.parametrize(
    "kind, lr", [("chain", 0.3), pytest.param("residual", 0.1, marks=pytest.mark.slow)]
)
def test_twins_trained_by_projected_sgd_with_momentum_and_decay_follow_the_infinite_network(
    kind, lr
):
    net, gaps = network(kind), []
    exact = train(copy.deepcopy(net), lr)
    assert (exact - net(images()[0])).square().mean().sqrt() > 0.05
    for n in (32, 512):
        torch.manual_seed(n)
        gaps.append(
            torch.stack([(train(net.sample(n), lr) - exact).square().mean() for _ in range(3)])
            .median()
            .sqrt()
        )
    assert gaps[1] < 0.5 * gaps[0]  # rate: .25


def test_without_the_projection_twins_do_not_follow():
    net, errors = network(), {}
    exact = train(copy.deepcopy(net), 0.3)
    for project in (True, False):
        torch.manual_seed(3)
        twin = net.sample(256)
        for layer in twin.layers[:-1]:
            layer.project = project
        errors[project] = (train(twin, 0.3) - exact).square().mean()
    assert errors[False] > 4 * errors[True]


def test_gradients_of_a_twin_lie_in_the_range_of_its_omega():
    twin = network("residual").sample(32)
    x, y = images()
    F.cross_entropy(twin(x), y).backward()
    assert torch.equal(twin.layers[0].omega, twin.layers[2].omega)  # summed, so of the same neurons
    for layer in twin.layers[:-1]:
        grad = layer.weight.grad.flatten(1)
        coefficients = torch.linalg.lstsq(layer.omega, grad).solution
        assert grad.any() and (layer.omega @ coefficients - grad).norm() < 1e-4 * grad.norm()


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda net: torch.optim.Adam(net.parameters(), 0.01),
        lambda net: PiSGD(param_groups(net, 0.5, 1e-4, 0.5, 2.0)),
    ],
)
def test_training_learns_and_a_snapshot_goes_on_bit_for_bit(optimizer, tmp_path):
    x, y = images()

    def steps(net, optimizer, count):
        losses = []
        for _ in range(count):
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            clip_grad_norm_(net, 1.0)
            optimizer.step()
            losses.append(loss.item())
        return losses

    net = network("residual", bias_alpha=0.1)
    stepper = optimizer(net)
    size = net.row_bytes
    losses = steps(net, stepper, 20)
    assert losses[-1] < 0.9 * losses[0] and net.row_bytes == size
    save(snapshot(net, stepper), tmp_path / "net.pt")
    again = network("residual", bias_alpha=0.1)
    other = optimizer(again)
    restore(again, load(tmp_path / "net.pt"), other)
    assert steps(net, stepper, 3) == steps(again, other, 3)


def test_a_checkpoint_knows_its_architecture():
    net = network("residual", bias_alpha=0.3, last_layer_alpha=0.5)
    x, _ = images()
    again = InfPiConvNet.from_state_dict(net.state_dict())
    assert torch.equal(again(x), net(x)) and again.architecture() == net.architecture()
    other = network("chain")
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(RuntimeError, match="ranks is .* in the checkpoint"):
        other.load_state_dict(net.state_dict())
    assert all(
        torch.equal(value, before[name])
        for name, value in other.state_dict().items()
        if isinstance(value, torch.Tensor)
    )
    with pytest.raises(RuntimeError, match="kernel coefficients"):
        InfPiConv2d(4, fit="hermite").load_state_dict(InfPiConv2d(4, fit="minimax").state_dict())
    with pytest.raises(ValueError, match="no architecture"):
        InfPiConvNet.from_state_dict(other.layers[1].state_dict())


@pytest.mark.parametrize(
    "how", [{"layernorm": True}, {"pools": (2,)}, {"shortcuts": [(0, 1)]}, {"input_stride": 2}]
)
def test_a_network_within_another_module_refuses_the_weights_of_another_architecture(how):
    other = InfPiConvNet(1, 2, (3, 3), bias_alpha=2.0)
    state = nn.Sequential(other).state_dict()
    with pytest.raises(RuntimeError, match=f"{next(iter(how))} is .* in the checkpoint"):
        nn.Sequential(InfPiConvNet(1, 2, (3, 3), bias_alpha=0.5, **how)).load_state_dict(state)
    same = nn.Sequential(InfPiConvNet(1, 2, (3, 3), bias_alpha=0.5, chunk_elements=99))
    same.load_state_dict(state)
    x = torch.randn(2, 1, 6, 6)
    assert same[0].bias_alpha == same[0].layers[1].bias_alpha == 2 and torch.equal(
        same(x), other(x)
    )


def test_a_refused_checkpoint_changes_nothing():
    x = torch.randn(2, 1, 6, 6)
    good = InfPiConvNet(1, 2, (3, 3), bias_alpha=0.5).state_dict()
    shorter, without = ({**good} for _ in range(2))
    shorter["layers.2.V"] = good["layers.2.V"][:-1]
    del without["layers.2.V"]
    sine = InfPiConvNet(1, 2, (3, 3), bias_alpha=0.5, activation=torch.sin)
    for net, state, message in (
        (None, shorter, r"layers.2.V has shape \[9, 1, 1, 2\]; expected \[10, 1, 1, 2\]"),
        (None, without, "layers.2.V is missing"),
        (None, good | {"other": x}, "unknown entries"),
        (
            InfPiConvNet(1, 2, (3, 3)),
            good | {"layers.1.bias": x[0, 0, 0, :3]},
            "build the network with",
        ),
        (
            InfPiConvNet(1, 2, (3, 3), bias_alpha=0.5, activation=torch.erf),
            sine.state_dict(),
            "layers.1.: moments with kernel coefficients",
        ),
    ):
        net = net or InfPiConvNet(1, 2, (3, 3), bias_alpha=0.5)
        before = net(x)
        with pytest.raises(RuntimeError, match=message):
            net.load_state_dict(state)
        assert torch.equal(net(x), before)
    layer = InfPiConv2d(4, fit="hermite")
    before = layer.V.clone()
    with pytest.raises(RuntimeError, match="kernel coefficients"):
        layer.load_state_dict(InfPiConv2d(4, fit="minimax").state_dict())
    assert torch.equal(layer.V, before)
    with pytest.raises(ValueError, match="only its author has; build the network with it"):
        InfPiConvNet.from_state_dict(sine.state_dict())


def test_layers_copy_and_convert():
    layer = InfPiConv2d(3, 4, padding=1, bias_alpha=1)
    g = torch.randn(2, 3, 5, 5)
    expected = layer(g)
    assert torch.equal(copy.deepcopy(layer)(g), expected)
    torch.testing.assert_close(copy.deepcopy(layer).double()(g.double()).float(), expected)


@pytest.mark.filterwarnings("ignore")  # the compiler of some torch versions warns about itself
@pytest.mark.parametrize(
    "how",
    [
        {"stride": (2, 1), "padding": 1, "layernorm": True},
        {"pool": 2, "V_dtype": torch.bfloat16},
        {"padding": 1, "padding_mode": "reflect"},
    ],
)
def test_a_compiled_layer_is_the_same_and_still_makes_its_features_in_chunks(how):
    layer = InfPiConv2d(3, 4, bias_alpha=1, chunk_elements=64, **how)
    twin, called, found = copy.deepcopy(layer), [], []

    def backend(graph, _):
        called.extend(node.target for node in graph.graph.nodes)
        return graph

    for module in (layer, torch.compile(twin, backend=backend, fullgraph=True)):
        g = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
        out = module(g)
        out.square().sum().backward()
        found.append([out, g.grad, *(parameter.grad for parameter in module.parameters())])
    torch.testing.assert_close(*found)
    assert torch.ops.pilimit.feature_conv2d.default in called


@pytest.mark.filterwarnings("ignore")  # the check itself warns
@pytest.mark.parametrize(
    "geometry", [Geometry((3, 2), (2, 1), (1, 0), (1, 2)), Geometry((3, 3), pool=(2, 2))]
)
def test_the_compilers_operators_are_registered_rightly(geometry):
    kappa, how = [0.2, 0.5, 0.3], dict(requires_grad=True)
    P = shared_features(3, tuple(kappa)).P
    torch.library.opcheck(linear, (torch.randn(4, 3, **how), torch.randn(P, 2, **how), kappa))
    V = torch.randn(P, *geometry.kernel, 4, **how)
    torch.library.opcheck(
        conv2d, (torch.randn(2, 3, 6, 5, **how), V, kappa, geometry.numbers, False, 64)
    )


def test_errors_name_the_layer_and_the_remedy():
    with pytest.raises(
        ValueError,
        match=r"InfPiConv2d expects pre-activations \[b, 4, h, w\].*got \[2, 3, 8, 8\].*4 channels",
    ):
        InfPiConv2d(4)(torch.randn(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"InfPiInputConv2d expects images \[b, 3, h, w\]"):
        InfPiInputConv2d(3, 4)(torch.randn(8, 192))
    with pytest.raises(
        ValueError,
        match=r"InfPiConv2d\(kernel_size=3, pool=4\) leaves nothing of .* 8x8.*0x0.*less pooling",
    ):
        InfPiConv2d(4, pool=4)(torch.randn(2, 4, 8, 8))
    # though padding would leave an output
    with pytest.raises(ValueError, match="leaves nothing of a map of 2x2"):
        InfPiConv2d(4, 2, 1, padding=1, pool=4)(torch.randn(2, 4, 2, 2))
    with pytest.raises(
        ValueError,
        match=r"layers\.3: InfPiConv2d\(kernel_size=3, padding=1, pool=2\) leaves nothing of .* "
        r"1x1",
    ):
        InfPiConvNet(3, 2, (4,) * 5, pools=(2,) * 4)(torch.randn(1, 3, 4, 4))
    with pytest.raises(MemoryError, match=r"layers\.2: InfPiConv2d\(r=4000"):
        InfPiConvNet(3, 2, (4, 4000, 4), degree=4)
    with pytest.raises(MemoryError, match=r"InfPiConv2d\(r=4000.*degree 4.*Lower the degree or r"):
        InfPiConv2d(4000, degree=4)
    for wrong, message in (
        ({"kernel_size": 0}, "kernel_size is 0"),
        ({"stride": (1, 0)}, "stride is"),
        ({"padding": "full"}, "padding is"),
        ({"chunk_elements": 0}, "chunk_elements"),
        ({"r_out": 0}, "0"),
    ):
        with pytest.raises(ValueError, match=message):
            InfPiConv2d(4, **wrong)
    for wrong, message in (
        ({"ranks": ()}, "ranks is empty"),
        ({"pools": (1,)}, "pools has 1 entries for 2"),
        ({"kernel_size": 2}, "odd"),
        ({"kernel_size": (3, 3)}, "odd"),
        ({"shortcuts": [(2, 1)]}, "does not lead"),
        ({"shortcuts": [(0, 1)], "pools": (2, 1)}, "same rank and size"),
        ({"shortcuts": [(0, 2), (1, 2)]}, "end in the same layer"),
    ):
        with pytest.raises(ValueError, match=message):
            InfPiConvNet(3, 2, **{"ranks": (4, 4, 4)} | wrong)
    with pytest.raises(ValueError, match="images"):
        network()(torch.randn(3, 8, 8))
    layer = InfPiConv2d(4)
    with pytest.raises(ValueError, match=r"prev_omega must be the ω of the layer below, \[16, 4\]"):
        FinPiConv2d(layer, 16)
    with pytest.raises(ValueError, match="omega must be"):
        FinPiConv2d(layer, 16, 16, torch.randn(16, 4), torch.randn(8, 4))
    with pytest.raises(ValueError, match="images have 3 channels"):
        FinPiConv2d(InfPiInputConv2d(3, 4), 5)
    with pytest.raises(ValueError, match="ranks is empty"):
        InfPiResNet(3, 2, ())
    with pytest.raises(ValueError, match="blocks is"):
        InfPiResNet(3, 2, (4, 4), blocks=(1,))
