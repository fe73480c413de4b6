"""What helps ConvNets of infinite width to learn and keeps their limit: whitening, the scalar
normalisation, noise of a finite width, a rate for high degrees. Oracles: finite networks, Monte
Carlo, autograd in float64, torch's own parameter groups."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pilimit_lib.inf import (
    DegreeRates,
    FiniteWidthNoise,
    InfPiConv2d,
    InfPiConvNet,
    InfPiInputConv2d,
    InfPiLinear,
    ScalarNorm,
    hermite_series,
    param_groups,
    whiten_,
)
from pilimit_lib.inf.conv.noise import finite_width_factor
from pilimit_lib.inf.dual.relu import relu_k
from tests.inf.test_conv_nets import images, network, train


def rate(exact, sampled) -> float:
    """By how much nearer networks of 512 channels are than those of 32; medians."""
    gaps = []
    for n in (32, 512):
        torch.manual_seed(n)
        off = [(sampled(n) - exact).square().mean() for _ in range(5)]
        gaps.append(torch.stack(off).median().sqrt())
    return float(gaps[0] / gaps[1])


# The scalar normalisation


def normal(kind: str = "chain", **how) -> InfPiConvNet:
    net = network(kind, norm="scalar", **how)
    for number, norm in enumerate(net.norms):
        nn.init.constant_(norm.scale, 1.0 + 0.2 * number)
        norm.running.fill_(0.5 + number)
    return net


def test_it_divides_by_the_root_mean_square_length_and_evaluates_by_the_running_one():
    torch.manual_seed(0)
    norm, g = ScalarNorm(gain=2.0, momentum=0.25), 3 * torch.randn(4, 5, 6, 7)
    out = norm(g)
    square = g.square().sum(1).mean()
    torch.testing.assert_close(out, 2 * g / square.sqrt())
    torch.testing.assert_close(norm.running, 0.75 + 0.25 * square[None])
    norm.eval()
    torch.testing.assert_close(norm(g), 2 * g / norm.running.sqrt(), rtol=1e-4, atol=1e-5)
    assert torch.equal(norm(g[:1]), norm(g)[:1])
    half = norm(g.bfloat16())
    assert half.dtype == torch.bfloat16
    assert torch.autograd.gradcheck(
        ScalarNorm(dtype=torch.float64), (g[:1, :2].double().requires_grad_(),)
    )


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_finite_network_with_it_tends_to_the_infinite_one(mode):
    net = normal("residual", bias_alpha=0.5)
    x, _ = images()
    getattr(net, mode)()
    with torch.no_grad():
        exact = copy.deepcopy(net)(x)
        assert 2 < rate(exact, lambda n: getattr(net.sample(n), mode)()(x)) < 9  # expected: 4


@pytest.mark.slow
def test_twins_trained_with_it_by_projected_sgd_follow():
    net = normal()
    exact = train(copy.deepcopy(net), 0.1)
    assert rate(exact, lambda n: train(net.sample(n), 0.1)) > 2


def test_it_is_batch_norm_where_ranks_are_white():
    """Batch norm divides channel i by its own σ_i, which is not the same for all ω: its kernel is
    E[φ(⟨ω,g⟩) φ(⟨ω,g'⟩)/ωᵀSω], S the batch's second moments. Where S is 1 that is s s' k(c)/r, the
    scalar's kernel; elsewhere it is not."""
    torch.manual_seed(0)
    r, omega = 3, torch.randn(400_000, 3, dtype=torch.float64)
    g = torch.randn(2, r, dtype=torch.float64)
    unit, s = F.normalize(g), g.norm(dim=1)
    scalar = s[0] * s[1] * relu_k((unit[0] @ unit[1]).clamp(-1, 1))
    skewed = torch.tensor([5.0, 1.0, 0.2], dtype=torch.float64)
    off = []
    for S in (torch.ones(r, dtype=torch.float64), skewed):
        phi = torch.relu(omega @ g.T) / (omega.square() @ S).sqrt()[:, None]
        off.append(abs((phi[:, 0] * phi[:, 1]).mean() / (scalar / S.sum()) - 1))
    assert off[0] < 0.02 and off[1] > 0.05


def test_it_is_saved_printed_trained_and_refused_by_networks_without_it():
    net = normal()
    x, _ = images()
    again = InfPiConvNet.from_state_dict(net.state_dict())
    assert torch.equal(again.eval()(x), net.eval()(x))
    assert "norm='scalar'" in repr(net) and "norms.0" in repr(net)
    with pytest.raises(RuntimeError, match="norm is 'scalar'"):
        network().load_state_dict(net.state_dict())
    held = {id(p) for group in param_groups(net, 0.1) for p in group["params"]}
    assert held == {id(p) for p in net.parameters()}
    twin = net.sample(8)
    assert torch.equal(type(twin).from_state_dict(twin.state_dict()).eval()(x), twin.eval()(x))
    before = copy.deepcopy(net.norms[0])
    with pytest.raises(RuntimeError, match="running"):
        net.norms[0].load_state_dict({"scale": torch.zeros(1)})
    assert torch.equal(before.scale, net.norms[0].scale)


def test_a_branch_starts_at_its_scale():
    net = network("residual", norm="scalar")
    assert net.norms[2].scale.item() == net.branch_gain == 0.5 and net.norms[1].scale.item() == 1
    assert net.layers[2].gain == 1
    for wrong in ({"momentum": 0.0}, {"eps": 0.0}):
        with pytest.raises(ValueError, match="a share above 0 up to 1 and a positive number"):
            ScalarNorm(**wrong)
    for norm, message in (
        ("batch", "norm is 'batch'.*each channel by a deviation of its own.*use norm='scalar'"),
        ("layer", "use layernorm=True"),
        ("group", "each tends to the root mean square of all.*use norm='scalar'"),
        ("none", "norm is 'none'. None or 'scalar' was expected"),
    ):
        with pytest.raises(ValueError, match=message):
            InfPiConvNet(3, 2, (3, 4), norm=norm)
    with pytest.raises(ValueError, match=r"maps \[b, c, h, w\] that are not empty, got \[3, 4\]"):
        ScalarNorm()(torch.randn(3, 4))


# Whitening


def pictures(b: int = 60, size: int = 9):
    """Noise, smoothed over neighbours and mixed over channels, and not of mean 0."""
    torch.manual_seed(3)
    x = F.avg_pool2d(torch.randn(b, 3, size + 2, size + 2), 3, 1)
    return torch.einsum("ij,bjhw->bihw", torch.randn(3, 3), x) + 0.3


@pytest.mark.parametrize("r", [5, 27, 30])
@pytest.mark.parametrize("bias", [0.0, 0.5])
def test_patches_are_white(r, bias):
    layer, x = InfPiInputConv2d(3, r, 3, stride=2, bias_alpha=bias), pictures()
    values = whiten_(layer, x, eps=1e-6)
    g = layer(x).transpose(0, 1).flatten(1).double().detach()
    kept = min(r, 27)
    moment = g @ g.T / g.shape[1]
    expected = torch.zeros(r, r, dtype=torch.float64)
    expected[:kept, :kept] = torch.diag(values / (values + 1e-6 * values[0]))[:kept, :kept] / kept
    torch.testing.assert_close(moment, expected, rtol=0, atol=1e-3)
    if bias:
        torch.testing.assert_close(g.mean(1), torch.zeros(r).double(), rtol=0, atol=1e-4)
    assert bool((values.diff() <= 0).all()) and len(values) == 27


def test_a_whitened_layer_is_a_linear_map_like_any_other():
    """It can be sampled, does not depend on how images are split, and eps keeps small directions
    small."""
    net, x = InfPiConvNet(3, 2, (4, 3)), pictures()
    values = whiten_(net.layers[0], x)
    twin = net.sample(6).layers[0]
    expected = torch.tensordot(twin.omega, net.layers[0].weight, 1) / 6**0.5
    torch.testing.assert_close(twin.weight, expected)
    first = net.layers[0].weight.clone()
    whiten_(net.layers[0], torch.cat([x, x]))
    torch.testing.assert_close(net.layers[0].weight, first, rtol=1e-3, atol=1e-4)
    layer = InfPiInputConv2d(3, 27)
    lengths = []
    for eps in (1e-9, 1.0):
        whiten_(layer, x, eps)
        lengths.append(layer.weight.flatten(1).norm(dim=1))
    assert lengths[0][-1] * values[-1].sqrt() > 0.15 and lengths[1][-1] < lengths[1][0] * 2


def test_images_that_can_not_be_whitened_are_refused():
    layer = InfPiInputConv2d(3, 4)
    before = layer.weight.clone()
    for x, message in (
        (torch.randn(3, 8, 8), r"expects images \[b, 3, h, w\]"),
        (torch.randn(2, 3, 2, 8), "hold no patch"),
        (torch.zeros(2, 3, 8, 8), "all alike, or hold NaN"),
        (torch.full((2, 3, 8, 8), float("nan")), "NaN"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=message):
            whiten_(layer, x)
    with pytest.raises(ValueError, match="eps is 0"):
        whiten_(layer, pictures(), 0)
    assert torch.equal(layer.weight, before)


# Noise of a finite width


def test_noise_is_unbiased_and_has_the_variance_of_wishart_matrices():
    torch.manual_seed(0)
    r, n, draws = 4, 6, 40_000
    g = torch.randn(r, dtype=torch.float64)
    found = torch.stack([finite_width_factor(r, n, g) @ g for _ in range(draws)])
    square = g.square().sum()
    expected = (square * torch.eye(r, dtype=torch.float64) + torch.outer(g, g)) / n
    error = (expected.diagonal() / draws).sqrt()
    assert bool(((found.mean(0) - g).abs() < 5 * error).all())
    torch.testing.assert_close(found.T.cov(), expected, rtol=0, atol=0.04 * float(square))
    mean = (found - g).square().sum(1).mean()
    torch.testing.assert_close(mean, (r + 1) / n * square, rtol=0.05, atol=0)


def test_noise_is_the_forward_pass_of_a_linear_finite_network():
    torch.manual_seed(0)
    r, n, g = 4, 7, torch.randn(3, 4, 5, 6)
    noise = FiniteWidthNoise(n)
    torch.manual_seed(1)
    found = noise(g)
    torch.manual_seed(1)
    omega = torch.randn(n, r)
    h = torch.einsum("nr,brhw->bnhw", omega, g) / n**0.5  # all samples and positions share Ω
    torch.testing.assert_close(found, torch.einsum("nr,bnhw->brhw", omega, h) / n**0.5)


def test_noise_is_fresh_in_training_and_absent_in_evaluation():
    net = network(noise_width=8)
    x, y = images()
    assert not torch.equal(net(x), net(x))
    torch.manual_seed(5)
    first = net(x)
    torch.manual_seed(5)
    assert torch.equal(net(x), first)
    F.cross_entropy(net(x), y).backward()
    assert all(parameter.grad.any() for parameter in net.parameters())
    plain = network()
    plain.load_state_dict(net.state_dict())  # noise is no part of the function
    assert torch.equal(net.eval()(x), plain.eval()(x))
    assert InfPiConvNet.from_state_dict(net.state_dict()).noise_width == 8
    assert net.sample(4).noise is None
    with pytest.raises(ValueError, match="width is 0; the width of a finite network"):
        InfPiConvNet(3, 2, (3, 4), noise_width=0)


# The degree-2 block of V


def test_high_degrees_start_at_zero_and_lengths_are_kept():
    torch.manual_seed(0)
    layer = InfPiConv2d(3, 20_000, 1, start_degree=1, gain=2.0)
    start = layer.features.starts[2]
    assert not layer.V[start:].any() and layer.V[:start].any()
    g = torch.randn(1, 3, 1, 4)
    lengths = layer(g).norm(dim=1) / g.norm(dim=1)
    torch.testing.assert_close(lengths, torch.full_like(lengths, 2.0), rtol=0.05, atol=0)
    # an odd activation has no monomials of degree 2: those of degree 3 are the high ones
    odd = InfPiConv2d(3, activation="erf", degree=3, start_degree=2)
    assert hermite_series("erf", 3, "minimax").kappa[2] == 0
    assert not odd.V[odd.features.starts[3] :].any() and odd.V[: odd.features.starts[3]].any()
    torch.manual_seed(0)
    plain = InfPiConv2d(3, 4)
    torch.manual_seed(0)
    assert torch.equal(InfPiConv2d(3, 4, start_degree=2).V, plain.V)


class Split(nn.Module):
    """A layer whose V is two parameters: the oracle."""

    def __init__(self, layer: InfPiConv2d) -> None:
        super().__init__()
        self.layer, start = layer, layer.features.starts[2]
        self.low = nn.Parameter(layer.V[:start].detach().clone())
        self.high = nn.Parameter(layer.V[start:].detach().clone())

    def forward(self, g):
        V = torch.cat([self.low, self.high])
        return torch.func.functional_call(self.layer, {"V": V}, (g,))


@pytest.mark.parametrize(
    "kind, how",
    [
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05}),
        (torch.optim.Adam, {"lr": 0.02, "betas": (0.8, 0.9)}),
        (torch.optim.AdamW, {"lr": 0.02, "weight_decay": 0.1}),
    ],
)
def test_a_rate_by_degree_is_a_group_of_its_own(kind, how):
    torch.manual_seed(0)
    layer = InfPiConv2d(3, 2, padding=1, dtype=torch.float64)
    oracle = Split(copy.deepcopy(layer))
    mine = kind(layer.parameters(), **how)
    DegreeRates(layer, mine, 0.3)
    groups = [{"params": [oracle.low]}, {"params": [oracle.high], "lr": 0.3 * how["lr"]}]
    theirs = kind(groups, **how)
    g = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    for _ in range(6):
        for module, optimizer in ((layer, mine), (oracle, theirs)):
            optimizer.zero_grad()
            module(g).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(layer.V, torch.cat([oracle.low, oracle.high]), rtol=0, atol=1e-12)
    assert not torch.equal(layer.V[-1], copy.deepcopy(oracle.layer).V[-1])


def test_rates_of_degrees_that_have_no_place_are_refused():
    layer = InfPiConv2d(3)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    with pytest.raises(ValueError, match="factor is -1"):
        DegreeRates(layer, optimizer, -1)
    with pytest.raises(ValueError, match="Linear has no layer of moments"):
        DegreeRates(nn.Linear(2, 2), optimizer, 1)
    fused = InfPiLinear(3, fused=True)
    with pytest.raises(ValueError, match="fused=False"):
        DegreeRates(fused, torch.optim.SGD(fused.parameters(), 0.1), 1)
    start = layer.features.starts[2]
    before = layer.V.detach().clone()
    rates = DegreeRates(layer, optimizer, 0)
    layer(torch.randn(1, 3, 4, 4)).sum().backward()
    optimizer.step()
    assert torch.equal(layer.V[start:], before[start:])
    assert not torch.equal(layer.V[:start], before[:start])
    rates.remove()
    optimizer.step()
    assert not torch.equal(layer.V[start:], before[start:])
