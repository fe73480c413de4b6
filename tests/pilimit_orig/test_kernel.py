"""NNGP and NTK of the plain implementation: the value worked out by hand, and Monte Carlo of finite
networks."""

import pytest
import torch

from pilimit_orig.inf.kernel import InfReLUGPModel, InfReLUNTKModel, relu_gp_fn, relu_ntk_fn


def pair(c, d=2):
    """x, y [1 d] with |x|² = |y|² = d and cosine c."""
    return torch.tensor([[1.0, 0.0]]).double() * d**0.5, torch.tensor(
        [[c, (1 - c * c) ** 0.5]]
    ).double() * d**0.5


def test_the_value_worked_out_by_hand():
    x, y = pair(0.3)
    assert relu_gp_fn([2.0], [0.0])(x, y).item() == pytest.approx(0.4827, abs=1e-4)
    assert relu_ntk_fn([2.0], [0.0], [1, 1], [0, 0])(x, y).item() == pytest.approx(0.6619, abs=1e-4)
    assert relu_ntk_fn([2.0], [0.0], [1, 1], [0, 0], as_published=True)(
        x, y
    ).item() == pytest.approx(0.8790, abs=1e-4)


def finite(varws, varbs, lrws, lrbs, X, width, draws):
    """Means over random networks of E[φφ] at the last hidden layer and of the tangent kernel
    weighted by multipliers."""
    g, gp, ntk = torch.Generator().manual_seed(0), 0.0, 0.0
    for _ in range(draws):
        sizes = [X.shape[1]] + [width] * len(varws) + [1]
        std_w, std_b = [v**0.5 for v in varws] + [1.3**0.5], [v**0.5 for v in varbs] + [0.0]
        W = [
            (s * torch.randn(b, a, generator=g)).requires_grad_()
            for s, a, b in zip(std_w, sizes, sizes[1:])
        ]
        B = [(s * torch.randn(b, generator=g)).requires_grad_() for s, b in zip(std_b, sizes[1:])]
        h = X.float()
        for l, (w, b) in enumerate(zip(W, B)):
            h = torch.relu(h) if l else h
            features = h.detach()
            h = h @ w.T / w.shape[1] ** 0.5 + b
        gp = gp + features @ features.T / width / draws
        scale = [m**0.5 for m in [*lrws, *lrbs]]
        J = []
        for i in range(len(X)):
            slopes = torch.autograd.grad(h[i, 0], W + B, retain_graph=True)
            J.append(torch.cat([s * slope.flatten() for s, slope in zip(scale, slopes)]))
        J = torch.stack(J)
        ntk = ntk + J @ J.T / draws
    return gp, ntk


@pytest.mark.parametrize(
    "setting",
    [([2.0], [0.0], [1, 1], [0, 0]), ([1.5, 2.0], [0.3, 0.1], [0.5, 1, 3], [1, 0.5, 2])],
    ids=["L1", "L2"],
)
def test_kernels_are_limits_of_finite_networks(setting):
    g = torch.Generator().manual_seed(1)
    X = torch.randn(5, 6, generator=g).double()
    gp, ntk = finite(*setting, X, width=512, draws=60)
    varws, varbs, _, _ = setting
    for got, estimate in (
        (relu_gp_fn(varws, varbs)(X, X), gp),
        (relu_ntk_fn(*setting, varw_readout=1.3)(X, X), ntk),
    ):
        assert (got - estimate).abs().max() < 0.03 * got.abs().max()


@pytest.mark.parametrize(
    "make",
    [
        lambda: InfReLUGPModel([2.0], [0.1], 4, 2, torch.float64),
        lambda: InfReLUNTKModel([2.0], [0.1], [1, 1], [1, 1], 4, 2, torch.float64),
    ],
    ids=["gp", "ntk"],
)
def test_training_reaches_kernel_regression(make):
    """Full-batch gradient descent with decay ends at the ridge regression of the same kernel."""
    X, T = (
        torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).double(),
        torch.eye(2).double().repeat(3, 1),
    )
    model, wd = make(), 0.05
    lr = 1.0 / float(torch.linalg.eigvalsh(model.kernel(X, X)).max())
    for _ in range(200):
        model.zero_grad()
        model.backward(model(X) - T)
        model.step(lr, wd)
    for _ in range(3000):
        model.As, model.Xs = model.Amult[:, None] * model.As, model.Xs
        model.As, model.Xs, model.Amult = (
            model.As.reshape(-1, 6, 2).sum(0),
            X,
            torch.ones(6, dtype=torch.float64),
        )
        model.zero_grad()
        model.backward(model(X) - T)
        model.step(lr, wd)
    K = model.kernel(X, X)
    assert torch.allclose(model(X), K @ torch.linalg.solve(K + wd * torch.eye(6), T), atol=1e-6)


def test_rows_can_be_undone_and_clipped():
    model = InfReLUGPModel([2.0], [0.1], 4, 2)
    model.checkpoint()
    delta = torch.randn(3, 2)
    model(torch.randn(3, 4))
    model.backward(delta)
    model.gclip(0.1)
    assert model.gnorm() == pytest.approx(0.1, rel=1e-3)
    model.step(1.0)
    assert model.As.shape == (3, 2)
    model.restore()
    assert model.As.shape == (0, 2)


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="one of each per hidden layer"):
        relu_gp_fn([1.0], [])
    with pytest.raises(ValueError, match="expected 2 of each"):
        relu_ntk_fn([1.0], [0.0], [1], [1])
