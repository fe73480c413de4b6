"""The library against the naive float64 network, over many hyper-parameters."""

import copy

import pytest
import torch
from torch import nn

from pilimit_lib.inf import PiSGD, clip_grad_norm_, param_groups
from pilimit_lib.inf.dual.relu import relu_k, relu_k_prime
from tests.oracles import NaiveNet, Rows, Training, monte_carlo, relu_expectation

from .nets import cross_entropy, data, network

NETS = {
    "shallow": {"L": 0},
    "plain": {},
    "deep": {"L": 4},
    "layer norm": {"layernorm": True},
    "deep layer norm": {"L": 3, "layernorm": True},
    "alphas": {
        "first_layer_alpha": 1.7,
        "last_layer_alpha": 0.4,
        "bias_alpha": 0.5,
        "last_bias_alpha": 0.25,
    },
    "no bias": {"bias_alpha": 0},
    "no last bias": {"last_bias_alpha": 0},
    "no bias but the last": {"bias_alpha": 0, "last_bias_alpha": 2},
    "rank above data": {"r": 9, "d": 4},
    "one output": {"o": 1},
    "rank 1": {"r": 1},
}
TRAININGS = {
    "plain": Training(),
    "wd": Training(wd=0.1),
    "multipliers": Training(first_mult=0.1, last_mult=4, bias_mult=0.5),
    "wd with multipliers": Training(wd=0.05, first_mult=0.1, last_mult=4, bias_mult=0.5),
    "wd without multipliers": Training(
        wd=0.05, first_mult=0.1, last_mult=4, bias_mult=0.5, apply_mult_to_wd=False
    ),
    "clip": Training(clip=0.2),
    "clip each": Training(clip=0.1, per_param=True),
    "clip that does not bind": Training(clip=1e3),
    "momentum": Training(momentum=0.9),
    "dampening": Training(momentum=0.8, dampening=0.3),
    "nesterov": Training(momentum=0.9, nesterov=True),
    "momentum, wd": Training(momentum=0.9, wd=0.1),
    "nesterov, wd, clip, multipliers": Training(
        momentum=0.7,
        nesterov=True,
        wd=0.05,
        clip=0.3,
        last_mult=4,
        first_mult=0.1,
        apply_mult_to_wd=False,
    ),
    "the paper's": Training(
        lr=1.0,
        clip=0.4,
        per_param=True,
        wd=1e-5,
        first_mult=0.1,
        last_mult=4,
        apply_mult_to_wd=False,
    ),
}
CASES = (
    [(net, "plain") for net in NETS]
    + [("plain", how) for how in TRAININGS if how != "plain"]
    + [
        ("deep layer norm", "nesterov, wd, clip, multipliers"),
        ("alphas", "the paper's"),
        ("no bias", "momentum, wd"),
        ("alphas", "clip each"),
        ("layer norm", "clip"),
        ("deep", "dampening"),
    ]
)


def optimizer_for(net, how: Training) -> PiSGD:
    groups = param_groups(
        net, how.lr, how.wd, how.first_mult, how.last_mult, how.bias_mult, how.apply_mult_to_wd
    )
    return PiSGD(groups, momentum=how.momentum, dampening=how.dampening, nesterov=how.nesterov)


def train(net, naive, how: Training, steps: int = 4, micro: int = 1, loss=cross_entropy) -> None:
    optimizer = optimizer_for(net, how)
    for _ in range(steps):
        optimizer.zero_grad()
        for _ in range(micro):
            x, y = data(4, net.d_in, net.d_out)
            value = loss(y)(net(x)) / micro
            value.backward()
            expected = naive.backward(x, lambda out, y=y: loss(y)(out) / micro)
            torch.testing.assert_close(value.detach(), expected, rtol=0, atol=1e-10)
        if how.clip:
            total = clip_grad_norm_(net, how.clip, how.per_param)
            twin = copy.copy(naive)
            twin.grads = dict(naive.grads)
            torch.testing.assert_close(
                total, twin.clip(how.clip, how.per_param), rtol=1e-9, atol=1e-12
            )
        optimizer.step()
        naive.step(how)


def assert_equal(net, naive) -> None:
    x = torch.randn(7, net.d_in, dtype=torch.float64)
    torch.testing.assert_close(net(x).detach(), naive.forward(x), rtol=0, atol=1e-10)
    torch.testing.assert_close(net.layers[0].A.detach(), naive.A, rtol=0, atol=1e-10)
    for layer, bias in zip(net.layers, naive.biases):
        assert (layer.bias is None) == (bias is None)
        if bias is not None:
            torch.testing.assert_close(layer.bias.detach(), bias, rtol=0, atol=1e-10)


@pytest.mark.parametrize("net, how", CASES, ids=[f"{a} | {b}" for a, b in CASES])
def test_training_equals_the_formulas(net, how):
    net = network(**NETS[net])
    naive = NaiveNet(net)
    assert_equal(net, naive)
    train(net, naive, TRAININGS[how])
    assert_equal(net, naive)


@pytest.mark.parametrize("how", ["plain", "momentum, wd", "clip each"])
def test_accumulation(how):
    net = network()
    naive = NaiveNet(net)
    train(net, naive, TRAININGS[how], steps=3, micro=3)
    assert_equal(net, naive)


def test_another_loss():
    net = network(o=2)
    naive = NaiveNet(net)
    train(
        net,
        naive,
        Training(),
        loss=lambda y: lambda out: (out - nn.functional.one_hot(y, 2)).square().mean(),
    )
    assert_equal(net, naive)


@pytest.mark.parametrize("settings", NETS.values(), ids=NETS)
def test_gradient_of_the_input_is_that_of_autograd_through_the_formula(settings):
    net = network(**settings)
    x = torch.randn(4, net.d_in, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(4, net.d_out, dtype=torch.float64)
    (ours,) = torch.autograd.grad((net(x) * weights).sum(), x)
    (expected,) = torch.autograd.grad((NaiveNet(net).forward(x) * weights).sum(), x)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("layernorm", [False, True])
def test_gradient_of_one_layer_by_finite_differences(layernorm):
    layer = network(L=1, layernorm=layernorm).layers[1]
    g = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (g,), atol=1e-6)


@pytest.mark.parametrize("parts", [(8,), (1, 7), (3, 3, 2), (1,) * 8])
def test_a_batch_is_its_accumulated_parts(parts):
    whole = network()
    split = copy.deepcopy(whole)
    optimizers = [
        PiSGD(net.parameters(), lr=0.3, momentum=0.9, weight_decay=0.01) for net in (whole, split)
    ]
    for _ in range(3):
        x, y = data(8)
        for net, sizes, optimizer in zip((whole, split), ((8,), parts), optimizers):
            optimizer.zero_grad()
            for a, b in zip(x.split(sizes), y.split(sizes)):
                (nn.functional.cross_entropy(net(a), b, reduction="sum") / 8).backward()
            clip_grad_norm_(net, 0.5)
            optimizer.step()
    assert whole.rows == split.rows
    x, _ = data(5)
    torch.testing.assert_close(whole(x), split(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "how",
    [
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.8, "dampening": 0.4},
        {"momentum": 0.9, "weight_decay": 0.1},
        {"weight_decay": 0.1},
        {"momentum": 0.9, "maximize": True},
    ],
    ids=str,
)
def test_momentum_of_rows_is_momentum_in_function_space(how):
    """Only the readout is trained, so its values f on all points are one dense vector, and torch's
    own SGD steps on it.

    The gradient in function space is K ∂L/∂f with K(p, q) = s_p s_q k(ĝ_p·ĝ_q).
    """
    net = network(L=0, bias_alpha=0, last_layer_alpha=0.7)
    net.layers[0].A.requires_grad_(False)
    x, y = data(12)
    with torch.no_grad():
        g = net.layers[0](x)
        f = nn.Parameter(net.layers[1](g))
    s = g.norm(dim=1)
    K = torch.outer(s, s) * relu_expectation(g @ g.T / torch.outer(s, s))
    ours, dense = PiSGD(net.parameters(), lr=0.2, **how), torch.optim.SGD([f], lr=0.2, **how)
    for t in range(6):
        batch = torch.arange(3) + 3 * (t % 3)
        ours.zero_grad()
        cross_entropy(y[batch])(net(x[batch])).backward()
        ours.step()
        values = f.detach()[batch].requires_grad_()
        (delta,) = torch.autograd.grad(cross_entropy(y[batch])(0.7 * values), values)
        f.grad = K[:, batch] @ delta
        dense.step()
        torch.testing.assert_close(net(x), 0.7 * f.detach(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("c", [-0.95, -0.3, 0.0, 0.4, 0.9, 0.999])
def test_expectations_by_monte_carlo(c):
    for ours, f in ((relu_k, torch.relu), (relu_k_prime, lambda u: (u > 0).double())):
        mean, error = monte_carlo(f, c)
        assert abs(float(ours(torch.tensor(c, dtype=torch.float64))) - mean) < 5 * error + 1e-12


def test_expectations_at_the_ends_and_beyond():
    c = torch.tensor([-1.0, 1.0, -1.0001, 1.0001])
    torch.testing.assert_close(relu_k(c), torch.tensor([0.0, 0.5, 0.0, 0.5]))
    torch.testing.assert_close(relu_k_prime(c), torch.tensor([0.0, 0.5, 0.0, 0.5]))


def test_the_norm_of_pending_rows_is_that_of_the_matrix_that_a_finite_network_would_add():
    """|ΔW| of n^-1 Ω Σ_m A_m φ(Ω' B_m)ᵀ, averaged over Ω, tends to the norm that clipping uses."""
    rows = Rows(
        torch.randn(4, 3).double(),
        torch.ones(4).double(),
        nn.functional.normalize(torch.randn(4, 6).double()),
    )
    n, squares = 4096, []
    for _ in range(8):
        omega, below = torch.randn(n, 3).double(), torch.randn(n, 6).double()
        update = omega @ rows.A.T @ torch.relu(below @ rows.B.T).T / n
        squares.append(update.square().sum())
    torch.testing.assert_close(torch.stack(squares).mean().sqrt(), rows.norm(), rtol=0.02, atol=0)
