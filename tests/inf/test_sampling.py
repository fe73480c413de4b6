"""Finite networks sampled from trained infinite ones: their distance falls like n^-½, and they stay
together while both train."""

import copy
import math

import pytest
import torch

from pilimit_lib.inf import (
    FinPiInputLinearReLU,
    FinPiLinearReLU,
    InfMLP,
    InfPiInputLinearReLU,
    InfPiLinearReLU,
    PiSGD,
    clip_grad_norm_,
    param_groups,
)

from .nets import cross_entropy


def task(steps: int, b: int = 8, d: int = 6):
    """Batches of a learnable three-class problem, and points to compare predictions on."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(steps, b, d, generator=generator)
    y = torch.stack([x[..., 0] + x[..., 1], x[..., 2].abs(), -x[..., 0]], -1).argmax(-1)
    return x, y, torch.randn(64, d, generator=generator)


def trained(steps: int = 20, **settings) -> InfMLP:
    net = InfMLP(6, 3, 10, 1, bias_alpha=0.5, **settings)
    train(net, *task(steps)[:2])
    return net


def optimizer_for(net, lr=1.0, momentum=0.0):
    return PiSGD(
        param_groups(
            net, lr, 1e-3, first_layer_lr_mult=0.3, last_layer_lr_mult=2, bias_lr_mult=0.5
        ),
        momentum=momentum,
    )


def train(
    net, x, y, clip: float = 0, per_param: bool = False, momentum: float = 0, lr: float = 1
) -> None:
    optimizer = optimizer_for(net, lr, momentum)
    for inputs, labels in zip(x, y):
        optimizer.zero_grad()
        cross_entropy(labels)(net(inputs)).backward()
        if clip:
            clip_grad_norm_(net, clip, per_param)
        optimizer.step()


def slope(sizes: list[int], errors: list[float]) -> float:
    """Of the least-squares line through log error against log size."""
    points = torch.tensor([[math.log(n), 1.0] for n in sizes], dtype=torch.float64)
    return float(
        torch.linalg.lstsq(
            points, torch.tensor([[math.log(e)] for e in errors], dtype=torch.float64)
        ).solution[0]
    )


@torch.no_grad()
def distance(net, x, n: int, draws: int) -> float:
    """Root mean square over points, outputs and draws."""
    expected = net(x)
    return float(
        torch.stack([(net.sample(n)(x) - expected).square().mean() for _ in range(draws)])
        .mean()
        .sqrt()
    )


@pytest.mark.parametrize(
    "sizes, settings",
    [
        ([512, 2048, 8192], {}),
        (
            [256, 1024, 4096],
            {
                "layernorm": True,
                "last_layer_alpha": 0.5,
                "first_layer_alpha": 2.0,
                "last_bias_alpha": 0.1,
            },
        ),
    ],
    ids=["plain", "layer norm and alphas"],
)
def test_a_network_sampled_from_a_trained_one_converges_like_one_over_root_n(sizes, settings):
    net, x = trained(**settings), task(1)[2]
    errors = [distance(net, x, n, draws) for n, draws in zip(sizes, (24, 12, 4))]
    assert slope(sizes, errors) == pytest.approx(-0.5, abs=0.15), errors
    assert errors[-1] < 0.1 * float(net(x).detach().std())


def test_one_layer_at_a_time_converges_too():
    """The hidden layer by itself: the norm of its pre-activations, and their angles to those of
    other samples."""
    net, x = trained(), task(1)[2][:8]
    with torch.no_grad():
        g = net.layers[1](net.layers[0](x))
        gram = g @ g.T
        errors = []
        for n, draws in ((256, 12), (4096, 6)):
            squares = []
            for _ in range(draws):
                below = net.layers[0].sample(6, n)
                h = net.layers[1].sample(n, n, prev_omega=below.omega)(below(x))
                squares.append((h @ h.T - gram).square().mean())
            errors.append(float(torch.stack(squares).mean().sqrt() / gram.square().mean().sqrt()))
    assert errors[1] < 0.1 and errors[0] / errors[1] == pytest.approx(4, rel=0.5)


TRAININGS = {
    "plain": {"lr": 0.4},
    "clipped": {"clip": 0.3},
    "each clipped": {"clip": 0.15, "per_param": True},
    "momentum": {"lr": 0.2, "momentum": 0.5},
}


@pytest.mark.parametrize("how", TRAININGS)
@pytest.mark.parametrize("layernorm", [False, True], ids=["plain", "layer norm"])
def test_both_stay_together_while_they_train(how, layernorm):
    infinite = trained(layernorm=layernorm)
    x, y, points = task(8)
    finite = {n: [infinite.sample(n) for _ in range(draws)] for n, draws in ((128, 8), (2048, 2))}
    before = infinite(points).detach()
    for net in [infinite, *(net for nets in finite.values() for net in nets)]:
        train(net, x, y, **TRAININGS[how])
    after = infinite(points).detach()
    moved = (after - before).square().mean().sqrt()
    errors = [
        torch.stack([(net(points).detach() - after).square().mean() for net in nets]).mean().sqrt()
        for nets in finite.values()
    ]
    assert errors[1] < 0.25 * moved, "both learned the same"
    assert 2 < errors[0] / errors[1] < 9, "a distance of n^-½ gives 4"


def test_the_projection_is_what_keeps_them_together():
    """A control: the same finite network without projected gradients learns something else."""
    infinite = trained()
    x, y, points = task(8)
    projected = infinite.sample(1024)
    free = copy.deepcopy(projected)
    for layer in free.layers[:-1]:
        layer.project = False
    for net in (infinite, projected, free):
        train(net, x, y)
    after = infinite(points).detach()
    near, far = ((net(points).detach() - after).square().mean().sqrt() for net in (projected, free))
    assert far > 2 * near


def test_sampling_leaves_the_infinite_network_alone_and_takes_its_settings():
    net = trained(last_layer_alpha=0.5, layernorm=True)
    rows, points = net.rows, task(1)[2]
    before = net(points).detach()
    finite = net.sample(32)
    train(finite, *task(2)[:2])
    assert net.rows == rows and torch.equal(before, net(points).detach())
    assert (finite.n, finite.L, finite.layernorm, finite.last_layer_alpha) == (32, 1, True, 0.5)


def test_layers_by_hand_as_the_original_builds_them():
    inf_layer = trained().layers[1]
    omega = torch.randn(16, 10)
    for layer in (
        FinPiLinearReLU(10, 16, 24, 0.5, inf_layer=inf_layer, prev_omega=omega),
        inf_layer.sample(16, 24, omega),
    ):
        assert (
            layer.weight.shape == (24, 16)
            and layer.omega.shape == (24, 10)
            and layer.bias.shape == (24,)
        )
    A, Amult, B = (getattr(inf_layer, name).detach() for name in ("A", "Amult", "B"))
    expected = layer.omega @ (A * Amult[:, None]).T @ torch.relu(omega @ B.T).T / (16 * 24) ** 0.5
    torch.testing.assert_close(layer.weight.detach(), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"prev_omega.*\[16, 10\]"):
        inf_layer.sample(16, 24, torch.randn(16, 9))


@pytest.mark.parametrize("readout", [False, True])
@pytest.mark.parametrize("layernorm", [False, True])
def test_a_finite_layer_on_its_own_begins_as_one_sampled_from_a_fresh_infinite_layer(
    readout, layernorm
):
    """ω is drawn first, then the rows, then the ω of the layer below. Draws agree to the last bit;
    products of at most 12 terms by some roundings of them, since a BLAS may sum the same product in
    another order where it lies otherwise in memory."""
    some = {"rtol": 0, "atol": 16 * 2.0**-24}  # of terms below 1
    torch.manual_seed(3)
    found = FinPiLinearReLU(5, 12, 4 if readout else 12, 0.5, readout, layernorm)
    torch.manual_seed(3)
    omega = None if readout else torch.randn(12, 5)
    infinite = InfPiLinearReLU(5, 4 if readout else 5, 0.5, readout, layernorm)
    below = torch.randn(12, 5)
    total = infinite.finite_weight(below) / 12**0.5
    expected = total if readout else omega @ total / 12**0.5
    torch.testing.assert_close(found.weight.detach(), expected.detach(), **some)
    torch.manual_seed(3)
    first = FinPiInputLinearReLU(5, 7, 12)
    torch.manual_seed(3)
    omega, infinite = torch.randn(12, 5), InfPiInputLinearReLU(7, 5)
    expected = omega @ infinite.A.T / 12**0.5
    torch.testing.assert_close(first.weight.detach(), expected.detach(), **some)
    assert torch.equal(first.omega, omega)
