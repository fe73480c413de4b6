"""Closed-form Gaussian posteriors against dense Gaussian process regression in float64,
scikit-learn's, and many small steps of gradient descent."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, DotProduct

from pilimit_lib.inf import InfMLP
from pilimit_lib.inf.gp import (
    ReLUKernel,
    gp_posterior,
    gradient_flow,
    linear_posterior,
    readout_features,
    readout_posterior,
    set_readout,
)


def problem(n=30, P=12, o=2, noise=0.3):
    psi, w = torch.randn(n, P, dtype=torch.float64), torch.randn(P, o, dtype=torch.float64)
    return psi, psi @ w + noise * torch.randn(n, o, dtype=torch.float64)


def batches(psi, y, size=7):
    return lambda: zip(psi.split(size), y.split(size))


def dense(psi, y, test, prior, noise):
    """(mean [b], variance [b], log marginal likelihood) of one output, from K [n n]."""
    K = prior * psi @ psi.T + noise * torch.eye(len(psi), dtype=torch.float64)
    cross, solve = prior * test @ psi.T, torch.linalg.solve
    variance = prior * test.square().sum(1) - (cross * solve(K, cross.T).T).sum(1)
    likelihood = torch.distributions.MultivariateNormal(torch.zeros(len(psi)).double(), K)
    return cross @ solve(K, y), variance, likelihood.log_prob(y)


@pytest.mark.parametrize("n", [30, 5], ids=["more samples", "more features"])
def test_mean_variance_and_likelihood_are_those_of_dense_regression(n):
    psi, y = problem(n)
    test = torch.randn(4, 12, dtype=torch.float64)
    # With more features than samples no noise at all is likeliest, which a dense solve can't do.
    for given in ({"noise": 0.2, "ridge": 0.7}, *([{}] if n > 12 else [])):
        found = linear_posterior(batches(psi, y), 12, **given)
        for k in range(2):
            mean, variance, likelihood = dense(psi, y[:, k], test, found.prior[k], found.noise[k])
            assert torch.allclose((test @ found.mean)[:, k], mean, atol=1e-8)
            assert torch.allclose(found.variance(test)[:, k], variance, atol=1e-8)
            assert torch.allclose(found.log_marginal_likelihood()[k], likelihood, atol=1e-7)


def test_noise_and_prior_maximise_the_likelihood():
    psi, y = problem()
    best = linear_posterior(batches(psi, y), 12)
    highest = best.log_marginal_likelihood()
    for scale in (0.9, 1.1):
        for ridge, noise in ((scale, 1), (1, scale), (scale, scale)):
            for k in range(2):
                other = linear_posterior(
                    batches(psi, y),
                    12,
                    ridge=float(best.ridge[k]) * ridge,
                    noise=float(best.noise[k]) * noise,
                )
                assert other.log_marginal_likelihood()[k] < highest[k]
    held = linear_posterior(batches(psi, y), 12, noise=0.2)
    for scale in (0.9, 1.1):
        moved = linear_posterior(batches(psi, y), 12, noise=0.2, ridge=float(held.ridge[0]) * scale)
        assert moved.log_marginal_likelihood()[0] < held.log_marginal_likelihood()[0]


def test_it_is_the_gaussian_process_of_scikit_learn():
    psi, y = problem(o=1)
    found = linear_posterior(batches(psi, y), 12)
    kernel = ConstantKernel(float(found.prior), "fixed") * DotProduct(0.0, "fixed")
    theirs = GaussianProcessRegressor(kernel, alpha=float(found.noise), optimizer=None)
    theirs.fit(psi.numpy(), y.numpy()[:, 0])
    test = torch.randn(4, 12, dtype=torch.float64)
    mean, std = theirs.predict(test.numpy(), return_std=True)
    assert np.allclose((test @ found.mean)[:, 0], mean)
    assert np.allclose(found.variance(test)[:, 0].sqrt(), std)
    assert theirs.log_marginal_likelihood_value_ == pytest.approx(
        float(found.log_marginal_likelihood())
    )


def test_leading_directions_are_enough_where_the_others_are_small():
    psi, y = problem(n=60, P=40, o=1)
    psi = psi * 10.0 ** -torch.arange(40).double()[None].mul(0.25)
    test = psi[:5] * 0.5
    whole = linear_posterior(batches(psi, y), 40, ridge=1.0, noise=0.2)
    part = linear_posterior(batches(psi, y), 40, ridge=1.0, noise=0.2, max_dense=8, rank=6)
    assert part.basis.shape == (40, 22)
    assert torch.allclose(test @ part.mean, test @ whole.mean, atol=1e-6)
    assert torch.allclose(part.variance(test), whole.variance(test), rtol=1e-5)


def test_directions_left_out_keep_their_prior_variance():
    psi, y = problem(n=60, P=40, o=1)
    part = linear_posterior(batches(psi, y), 40, ridge=2.0, noise=0.2, max_dense=8, rank=1)
    whole = linear_posterior(batches(psi, y), 40, ridge=2.0, noise=0.2)
    test = torch.randn(5, 40, dtype=torch.float64)
    assert (part.variance(test) >= whole.variance(test)).all()
    away = test - test @ part.basis @ part.basis.T
    assert torch.allclose(part.variance(away)[:, 0], 0.1 * away.square().sum(1))


def test_nothing_but_zeros_is_no_accident():
    zeros = torch.zeros(6, 3, dtype=torch.float64)
    found = linear_posterior(batches(zeros, zeros[:, :1]), 3)
    assert not found.mean.any() and torch.isfinite(found.variance(zeros + 1)).all()


@pytest.mark.parametrize("bias_alpha", [0.5, 0])
@pytest.mark.parametrize("layernorm", [False, True])
def test_outputs_are_linear_in_the_readout(bias_alpha, layernorm):
    net = InfMLP(
        4,
        2,
        5,
        1,
        bias_alpha=bias_alpha,
        last_layer_alpha=0.7,
        layernorm=layernorm,
        memory="moments",
        degree=3,
        dtype=torch.float64,
    )
    x = torch.randn(9, 4, dtype=torch.float64)
    y = torch.randn(9, 2, dtype=torch.float64)
    posterior = readout_posterior(net, batches(x, y))
    set_readout(net, posterior)
    assert torch.allclose(net(x), readout_features(net, x) @ posterior.mean)


def test_rows_and_other_posteriors_are_refused():
    x, y = torch.randn(5, 4), torch.randn(5, 2)
    rows = InfMLP(4, 2, 5, 1)
    with pytest.raises(TypeError, match="to_moments"):
        readout_posterior(rows, batches(x, y))
    small, large = (InfMLP(4, 2, r, 1, memory="moments") for r in (3, 5))
    with pytest.raises(ValueError, match="same network"):
        set_readout(large, readout_posterior(small, batches(x, y)))
    with pytest.raises(ValueError, match="no samples"):
        linear_posterior(lambda: (), 3)
    with pytest.raises(ValueError, match=r"expected \[b, 3\]"):
        linear_posterior(batches(x, y), 3)
    with pytest.raises(ValueError, match="noise is 0"):
        linear_posterior(batches(x, y), 4, noise=0)


NNGP = ReLUKernel(2, varw=2.0, varb=0.1)
NTK = ReLUKernel(2, ntk=True, varw=2.0, varb=0.1)


def samples(n=12, b=4, o=2, d=3):
    return torch.randn(n, d), torch.randn(n, o), torch.randn(b, d)


@pytest.mark.parametrize("kernel", [NNGP, NTK], ids=["nngp", "ntk"])
def test_exact_posterior_is_that_of_scikit_learn(kernel):
    """Theirs gets features of which the kernel is the inner product, ours the kernel."""
    x, y, x_test = samples()
    found = gp_posterior(kernel, x, y, x_test, noise=0.3)
    K = kernel(torch.cat([x, x_test]), torch.cat([x, x_test]))
    values, vectors = torch.linalg.eigh(K)
    psi = (vectors * values.clamp(min=0).sqrt()).numpy()
    theirs = GaussianProcessRegressor(DotProduct(0.0, "fixed"), alpha=0.3, optimizer=None)
    theirs.fit(psi[:12], y[:, 0].double().numpy())
    mean, covariance = theirs.predict(psi[12:], return_cov=True)
    assert np.allclose(found.mean[:, 0], mean)
    assert np.allclose(found.covariance, covariance)
    assert theirs.log_marginal_likelihood_value_ == pytest.approx(
        float(found.log_marginal_likelihood[0])
    )


def test_posteriors_of_kernel_and_of_features_agree():
    """n samples and P features are two ways through the same algebra."""
    psi, y = problem(n=20, P=12)
    test, kernel = torch.randn(4, 12, dtype=torch.float64), lambda a, b: a @ b.T
    features = linear_posterior(batches(psi, y), 12, ridge=0.3, noise=0.3)
    exact = gp_posterior(kernel, psi, y, test, noise=0.3)
    assert torch.allclose(exact.mean, test @ features.mean)
    assert torch.allclose(exact.covariance.diagonal(), features.variance(test)[:, 0])
    assert torch.allclose(exact.log_marginal_likelihood, features.log_marginal_likelihood())


def test_gradient_flow_is_many_small_steps_of_a_linearised_network():
    """f = J w with more weights than samples, from w drawn: steps on w itself, ½ Σ |f - y|²."""
    J, J_test = torch.randn(6, 40).double(), torch.randn(3, 40).double()
    y = torch.randn(6, 2).double()
    w, rate = torch.zeros(40, 2).double(), 1e-5
    tangent = lambda a, b: a @ b.T  # noqa: E731
    found = gradient_flow(tangent, J, y, J_test, [0.0, 0.005, 0.02])
    states = [w]
    for _ in range(2000):
        w = w - rate * J.T @ (J @ w - y)
        states.append(w)
    for t, at in enumerate((0, 500, 2000)):
        assert torch.allclose(found.mean[t], J_test @ states[at], atol=2e-3)
    assert found.covariance is None


def test_covariance_over_time_is_that_of_an_ensemble():
    """Outputs after flow are S_t y + f_0(*) - S_t f_0(x), linear in a draw of the prior."""
    x, y, x_test = samples(o=1)
    found = gradient_flow(NTK, x, y, x_test, [0.0, 0.7], nngp=NNGP)
    both = torch.cat([x, x_test])
    assert torch.allclose(found.covariance[0], NNGP(x_test, x_test)) and not found.mean[0].any()
    theta = NTK(x, x)
    decay = torch.linalg.matrix_exp(-0.7 * theta)
    step = NTK(x_test, x) @ torch.linalg.solve(theta, torch.eye(12).double() - decay)
    draws = torch.linalg.cholesky(NNGP(both, both) + 1e-9 * torch.eye(16)) @ torch.randn(
        16, 20000, dtype=torch.float64
    )
    outputs = step @ y.double() + draws[12:] - step @ draws[:12]
    assert torch.allclose(found.mean[1][:, 0], (step @ y.double())[:, 0])
    scale = found.covariance[1].abs().max()
    assert (torch.cov(outputs) - found.covariance[1]).abs().max() < 0.05 * scale


def test_at_the_end_samples_are_fitted_and_ridges_are_regression():
    x, y, x_test = samples()
    end = gradient_flow(NTK, x, y, x, [float("inf")], nngp=NNGP)
    assert torch.allclose(end.mean[0], y.double(), atol=1e-6)
    assert end.covariance[0].abs().max() < 1e-6
    ridge = gradient_flow(NTK, x, y, x_test, [float("inf")], ridge=0.3)
    assert torch.allclose(ridge.mean[0], gp_posterior(NTK, x, y, x_test, noise=0.3).mean)


def test_a_sample_given_twice_is_no_trouble_for_flow_and_an_error_without_noise():
    x, y, x_test = samples()
    twice = (torch.cat([x, x[:1]]), torch.cat([y, y[:1]]))
    found = gradient_flow(NTK, *twice, x_test, [float("inf")])
    alone = gradient_flow(NTK, x, y, x_test, [float("inf")])
    assert torch.allclose(found.mean, alone.mean, atol=1e-6)
    same = (torch.ones(3, 3), torch.ones(3, 1))
    with pytest.raises(ValueError, match="Take more noise"):
        gp_posterior(lambda a, b: -(a @ b.T), *same, x_test, noise=0.0)
    with pytest.raises(ValueError, match=r"expected \[12, outputs\]"):
        gp_posterior(NTK, x, y[:5], x_test, noise=0.1)
    with pytest.raises(ValueError, match="noise is -1"):
        gp_posterior(NTK, x, y, x_test, noise=-1)
    with pytest.raises(ValueError, match="negative"):
        gradient_flow(NTK, x, y, x_test, [-1.0])
