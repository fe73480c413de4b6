"""The finite network: its gradients against autograd, and that it tends to the infinite one while
both train."""

import pytest
import torch

from pilimit_orig.inf import FinPiMLP
from pilimit_orig.losses import LOSSES
from tests.pilimit_orig import small


@pytest.mark.parametrize(
    "case",
    [dict(), dict(layernorm=True), dict(L=1), dict(L=3, bias_alpha=0.0, last_bias_alpha=None)],
    ids=str,
)
def test_backward_is_autograd(case):
    inf = small.network(**case)
    net = inf.sample(16, seed=3)
    X, Y = small.data(inf)
    W, b = ({l: t.clone().requires_grad_() for l, t in p.items()} for p in (net.W, net.b))
    x = X
    for l in range(1, net.L + 2):
        h = x @ W[l].T + (net.alpha_of_bias(l) * b[l] if l in b else 0)
        h = net.first_layer_alpha * h if l == 1 else h
        x = torch.relu(h / h.norm(dim=1, keepdim=True) if net.layernorm else h)
    out = net.last_layer_alpha * h
    assert torch.allclose(net(X), out, atol=1e-12)
    net.backward(LOSSES["xent"][0](net(X), Y)[1])
    grads = torch.autograd.grad(
        torch.nn.functional.cross_entropy(out, Y), list(W.values()) + list(b.values())
    )
    for got, expected in zip(list(net.dW[l] for l in W) + list(net.db[l] for l in b), grads):
        assert torch.allclose(got, expected, atol=1e-12)


def test_projection_is_the_closest_point_in_the_span():
    inf = small.network()
    net = inf.sample(16, seed=3)
    net.backward(LOSSES["xent"][0](net(small.data(inf)[0]), small.data(inf)[1])[1])
    raw = net.dW[2].clone()
    net.project()
    O = net.Omega[2]
    assert torch.allclose(net.dW[2], O @ torch.linalg.solve(O.T @ O, O.T @ raw), atol=1e-10)
    with pytest.raises(RuntimeError, match="Gaussian start"):
        FinPiMLP(5, 3, 1, 16).project()


@pytest.mark.parametrize("layernorm", [False, True])
def test_training_side_by_side_tends_to_the_infinite_network(layernorm):
    """max|Δf| after training falls like n^-1/2: the mean over four draws, a factor of 16 in
    width."""
    gaps = []
    for width in (64, 1024):
        gap = []
        for seed in range(4):
            inf = small.network(L=2, layernorm=layernorm)
            X, Y = small.data(inf, 12)
            fin = inf.sample(width, seed=seed)
            for _ in range(5):
                for net in (inf, fin):
                    net.zero_grad()
                    net.backward(LOSSES["xent"][0](net(X), Y)[1])
                fin.project()
                for net in (inf, fin):
                    net.gclip(0.4, per_param=True)
                    net.step(
                        0.3,
                        0.01,
                        bias_lr_mult=0.5,
                        first_layer_lr_mult=0.1,
                        last_layer_lr_mult=2.0,
                        apply_lr_mult_to_wd=False,
                    )
            gap.append((inf.predict(X) - fin(X)).abs().max())
        gaps.append(torch.stack(gap).mean())
    slope = float((gaps[1] / gaps[0]).log() / torch.tensor(16.0).log())
    assert -0.75 < slope < -0.3, (slope, gaps)


def test_features_tend_to_the_kernel_of_the_embedding():
    inf = small.network()
    X, _ = small.data(inf)
    u = inf.embedding(X)
    f = inf.sample(4096, seed=0).embedding(X)
    assert torch.allclose(f @ f.T, 2 * small.kernel(u @ u.T), atol=0.06)
