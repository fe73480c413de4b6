"""Kernels for GPyTorch against ours, numerical derivatives, and exact regression."""

from __future__ import annotations

import pytest
import torch

from pilimit_lib.inf import InfMLP
from pilimit_lib.inf.gp import ReLUKernel, embed, features_of, gp_posterior

gpytorch = pytest.importorskip("gpytorch", reason="GPyTorch is not installed (extra gp)")

from pilimit_lib.inf.gp.gpytorch_kernels import FeatureKernel, ReLUNetworkKernel  # noqa: E402


def points(a=5, b=4, d=3):
    return torch.randn(a, d, dtype=torch.float64), torch.randn(b, d, dtype=torch.float64)


@pytest.mark.parametrize("ntk", [False, True], ids=["nngp", "ntk"])
def test_values_are_those_of_the_plain_kernel(ntk):
    x, y = points()
    kernel = ReLUNetworkKernel(3, ntk, weight_variance=1.5, bias_variance=0.2).double()
    plain = ReLUKernel(3, ntk, varw=1.5, varb=0.2, lrb=1.0)
    assert torch.allclose(kernel(x, y).to_dense(), plain(x, y), rtol=1e-6)
    assert torch.allclose(kernel(x).to_dense(), plain(x, x), rtol=1e-6)
    assert torch.allclose(kernel(x, diag=True), plain(x, x).diagonal(), rtol=1e-6)
    batched = kernel(torch.stack([x, 2 * x]), torch.stack([y, y])).to_dense()
    assert torch.allclose(batched[1], plain(2 * x, y), rtol=1e-6)


@pytest.mark.parametrize("ntk", [False, True], ids=["nngp", "ntk"])
def test_gradients_are_numerical_derivatives(ntk):
    x, y = points(3, 2)
    kernel = ReLUNetworkKernel(2, ntk).double()

    raw = (kernel.raw_weight_variance.detach(), kernel.raw_bias_variance.detach())
    inputs = [tensor.clone().requires_grad_() for tensor in (x, y, *raw)]
    assert torch.autograd.gradcheck(lambda *args: kernel_at(kernel, *args), inputs)


def kernel_at(kernel, x, y, raw_weight, raw_bias):
    kernel.__dict__["_parameters"].update(
        raw_weight_variance=raw_weight, raw_bias_variance=raw_bias
    )
    return kernel.forward(x, y)


def test_a_sample_with_itself_has_finite_gradients():
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    kernel = ReLUNetworkKernel(2, True).double()
    kernel(x).to_dense().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in (x, *kernel.parameters()))


@pytest.mark.parametrize("finite", [False, True])
def test_feature_kernel_is_that_of_the_network(finite):
    net = InfMLP(3, 2, 5, 1, memory="moments", dtype=torch.float64)
    net = net.sample(50) if finite else net
    x, y = points()
    kernel = FeatureKernel(net)
    expected = features_of(net)(*(embed(net, part, progress=False) for part in (x, y)))
    assert torch.allclose(kernel(x, y).to_dense(), expected, atol=1e-6)
    assert torch.allclose(kernel(x, diag=True), kernel(x).to_dense().diagonal())
    if not finite:
        x.requires_grad_()
        assert torch.autograd.gradcheck(lambda x: kernel.forward(x, y), x)
        kernel(x).to_dense().sum().backward()
        assert net.layers[0].A.grad.isfinite().all() and net.layers[1].V.grad.any()


class Regression(gpytorch.models.ExactGP):
    def __init__(self, x, y, likelihood, kernel):
        super().__init__(x, y, likelihood)
        self.mean_module, self.covar_module = gpytorch.means.ZeroMean(), kernel

    def forward(self, x):
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


def test_regression_with_it_is_exact_and_its_likelihood_can_be_climbed():
    x, x_test = points(12, 4)
    y = x[:, 0].abs() + 0.1 * torch.randn(12, dtype=torch.float64)
    likelihood = gpytorch.likelihoods.GaussianLikelihood().double()
    likelihood.noise = 0.3
    model = Regression(x, y, likelihood, ReLUNetworkKernel(1)).double()
    expected = gp_posterior(ReLUKernel(1, varw=2.0, varb=0.1), x, y[:, None], x_test, noise=0.3)
    model.eval()
    with torch.no_grad():
        found = model(x_test)
    assert torch.allclose(found.mean, expected.mean[:, 0], atol=1e-4)
    assert torch.allclose(found.covariance_matrix, expected.covariance, atol=1e-4)
    model.train()
    likelihood.train()
    objective = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, model)
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    values = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = -objective(model(x), y)
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < values[0]
    assert values[0] == pytest.approx(-float(expected.log_marginal_likelihood) / 12, abs=1e-4)


def test_what_is_no_network_is_refused():
    with pytest.raises(TypeError, match="no embedding"):
        FeatureKernel(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="depth"):
        ReLUNetworkKernel(0)
    with pytest.raises(ValueError, match="bias_variance is 0"):
        ReLUNetworkKernel(1, bias_variance=0)
