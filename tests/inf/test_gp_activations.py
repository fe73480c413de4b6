"""Kernels of other activations against quadrature, numerical derivatives, wide networks, and ReLU's
own kernel."""

from __future__ import annotations

import math

import pytest
import torch

from pilimit_lib.inf.gp import ActivationKernel, ReLUKernel
from pilimit_lib.inf.gp.activations import DUALS

FUNCTIONS = {
    "relu": torch.relu,
    "erf": torch.erf,
    "gelu": torch.nn.functional.gelu,
    "tanh": torch.tanh,
}
PAIRS = [(0.3, 1.0, 0.7), (-0.9, 1.0, 1.0), (1.2, 2.0, 0.9), (0.0, 0.4, 3.0)]  # c, p, q


def expectation(function, c, p, q, nodes=200):
    """E[φ(u) φ(v)] by a trapezoidal rule over a wide grid: nothing of Gauss-Hermite."""
    z = torch.linspace(-9, 9, 40 * nodes // 2 + 1, dtype=torch.float64)
    weight = torch.exp(-z * z / 2) / math.sqrt(2 * math.pi) * (z[1] - z[0])
    coarse, its_weight = z[::4], weight[::4] * 4
    correlation = c / math.sqrt(p * q)
    v = math.sqrt(q) * (correlation * z[:, None] + math.sqrt(1 - correlation**2) * coarse)
    return float((weight * function(math.sqrt(p) * z)) @ function(v) @ its_weight)


@pytest.mark.parametrize("name", DUALS)
def test_expectations_are_those_of_a_fine_grid(name):
    for c, p, q in PAIRS:
        K, slope = DUALS[name](*(torch.tensor(value, dtype=torch.float64) for value in (c, p, q)))
        assert float(K) == pytest.approx(expectation(FUNCTIONS[name], c, p, q), abs=2e-5)
        h = 1e-5
        ends = [
            float(DUALS[name](*(torch.tensor(v, dtype=torch.float64) for v in (c + d, p, q)))[0])
            for d in (-h, h)
        ]
        assert float(slope) == pytest.approx((ends[1] - ends[0]) / (2 * h), abs=2e-5)


@pytest.mark.parametrize("ntk", [False, True], ids=["nngp", "ntk"])
def test_of_relu_it_is_the_relu_kernel(ntk):
    x, y = torch.randn(5, 3), torch.randn(4, 3)
    setting = dict(ntk=ntk, varw=1.5, varb=0.2)
    ours = ActivationKernel(3, "relu", **setting)(x, y)
    assert torch.allclose(ours, ReLUKernel(3, **setting)(x, y), atol=1e-12)


@pytest.mark.parametrize("name", ["erf", "gelu", "tanh"])
def test_wide_networks_tend_to_it(name):
    """Two hidden layers in the NTK parametrisation, and their tangent kernel by autograd."""
    x, n, draws, setting = torch.randn(4, 3).double(), 300, 30, dict(varw=1.5, varb=0.1)
    nngp, ntk = 0, 0
    for _ in range(draws):
        parameters = []
        for size, before in ((n, 3), (n, n), (1, n)):
            parameters += [math.sqrt(1.5) * torch.randn(size, before), torch.randn(size) * 0.1**0.5]
        parameters = [value.double().requires_grad_() for value in parameters]
        last, out = None, x
        for W, b in zip(parameters[::2], parameters[1::2]):
            last = out if last is None else FUNCTIONS[name](out)
            out = last @ W.T / math.sqrt(last.shape[1]) + b
        rows = [torch.autograd.grad(value, parameters, retain_graph=True) for value in out[:, 0]]
        J = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
        nngp, ntk = nngp + (last @ last.T / n).detach() / draws, ntk + J @ J.T / draws
    for is_ntk, estimate in ((False, nngp), (True, ntk)):
        found = ActivationKernel(2, name, is_ntk, **setting)(x, x)
        assert (found - estimate).abs().max() < 0.1 * found.abs().max()


def test_what_means_nothing_is_refused():
    with pytest.raises(ValueError, match="relu, erf, gelu, tanh"):
        ActivationKernel(1, "swish")
    with pytest.raises(ValueError, match="depth"):
        ActivationKernel(0)
    with pytest.raises(ValueError, match="varw is -1"):
        ActivationKernel(1, varw=-1)
    with pytest.raises(ValueError, match="both sides"):
        ActivationKernel(1)(torch.ones(2, 3), torch.ones(2, 4))
    zeros = ActivationKernel(2, "gelu", True)(torch.zeros(2, 3), torch.ones(2, 3))
    assert torch.isfinite(zeros).all()
