"""The hand-written backward against autograd in float64, and the rules of a step."""

import pytest
import torch

from pilimit_orig.inf import InfPiMLP
from pilimit_orig.losses import LOSSES
from tests.pilimit_orig import small

CASES = [
    dict(),
    dict(layernorm=True),
    dict(L=1),
    dict(L=3, layernorm=True),
    dict(bias_alpha=0.0, last_bias_alpha=None),
    dict(bias_alpha=0.0, last_bias_alpha=0.4),
    dict(bias_alpha=1.0, last_bias_alpha=0.0),
]


@pytest.mark.parametrize("loss", ["xent", "mse"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward_is_autograd(case, loss):
    net = small.network(**case)
    X, Y = small.data(net)
    p = small.leaves(net)
    out, direction, _ = small.function(net, p, X)
    assert torch.allclose(net(X), out, atol=1e-12)
    assert torch.allclose(net.embedding(X), direction, atol=1e-12)
    value = (
        torch.nn.functional.cross_entropy(out, Y)
        if loss == "xent"
        else ((out - (torch.eye(net.dout, dtype=torch.float64)[Y] - 0.1)) ** 2).mean()
    )
    expected = dict(zip(p, torch.autograd.grad(value, list(p.values()))))
    hand, delta = LOSSES[loss][0](net(X), Y)
    net.backward(delta)
    assert torch.isclose(hand, value)
    got = small.by_parameter(net, net.grads)
    assert got.keys() == expected.keys()
    for key in expected:
        assert torch.allclose(got[key], expected[key], atol=1e-12), key


@pytest.mark.parametrize("loss", ["xent", "mse"])
def test_curvature_is_the_second_derivative(loss):
    out, labels = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 3, 1, 2, 2])
    v = torch.randn_like(out)
    step = 1e-6
    difference = (
        LOSSES[loss][0](out + step * v, labels)[1] - LOSSES[loss][0](out - step * v, labels)[1]
    ) / (2 * step)
    assert torch.allclose(LOSSES[loss][1](out, labels, v), difference, atol=1e-9)


def test_micro_batches_add_up_to_the_batch():
    net = small.network()
    X, Y = small.data(net)
    delta = LOSSES["xent"][0](net(X), Y)[1]
    net.backward(delta)
    whole, parts = net.grads, net.newgradbuffer()
    for i in range(len(X)):
        net(X[i : i + 1])
        net.backward(delta[i : i + 1], parts)
    for key, norm in whole.norms().items():
        assert torch.isclose(parts.norms()[key], norm), key


def test_momentum_is_that_of_sgd_on_the_function():
    """The readout is linear in features F with F Fᵀ = its kernel: torch's SGD with momentum on
    those is the oracle."""
    net = small.network(L=1, bias_alpha=0.0, last_bias_alpha=None)
    X, Y = small.data(net, b=10)
    directions = torch.cat([net.Bs[2], net.embedding(X)])
    lengths = (X @ net.As[1] * net.first_layer_alpha).norm(dim=1, keepdim=True)
    vals, vecs = torch.linalg.eigh(small.kernel(directions @ directions.T))
    F = vecs * vals.clamp(min=0).sqrt()
    w = (F[:9].T @ (net.Amult[2][:, None] * net.As[2])).requires_grad_()
    rules = dict(momentum=0.8, dampening=0.25)
    oracle = torch.optim.SGD([w], lr=0.5, weight_decay=0.05, **rules)
    for step in range(8):
        batch = slice(0, 5) if step % 2 else slice(5, 10)
        oracle.param_groups[0]["lr"] = 0.5 / (1 + step)
        out = net.last_layer_alpha * lengths[batch] * (F[9:][batch] @ w)
        oracle.zero_grad()
        torch.nn.functional.cross_entropy(out, Y[batch]).backward()
        oracle.step()
        net.zero_grad()
        net.backward(LOSSES["xent"][0](net(X[batch]), Y[batch])[1])
        # The first layer stays where it is, or the features would move.
        net.step(0.5 / (1 + step), 0.05, first_layer_lr_mult=0.0, **rules)
    expected = net.last_layer_alpha * lengths * (F[9:] @ w.detach())
    assert torch.allclose(net.predict(X), expected, atol=1e-9)


@pytest.mark.parametrize("undivided", [True, False])
def test_a_zero_multiplier_freezes_all_but_the_undivided_decay(undivided):
    net = small.network()
    before = {l: a.clone() for l, a in net.Amult.items()}
    net.backward(LOSSES["xent"][0](net(small.data(net)[0]), small.data(net)[1])[1])
    net.step(0.5, 0.1, last_layer_lr_mult=0.0, apply_lr_mult_to_wd=not undivided)
    assert torch.allclose(net.Amult[3], before[3] * (0.95 if undivided else 1.0))
    assert net.Amult[2].shape[0] == before[2].shape[0] + 6


def test_common_clip_scales_all_by_one_factor():
    net = small.network()
    X, Y = small.data(net)
    net.backward(LOSSES["xent"][0](net(X), Y)[1])
    before = net.grads.norms()
    total = net.grads.norm()
    net.gclip(float(total) / 4)
    for key, norm in net.grads.norms().items():
        assert torch.isclose(norm, before[key] / 4, rtol=1e-5), key


def test_restore_undoes_steps_bit_for_bit():
    net = small.network()
    X, Y = small.data(net)
    before = net.predict(X)
    net.checkpoint()
    for _ in range(3):
        net.zero_grad()
        net.backward(LOSSES["xent"][0](net(X), Y)[1])
        net.step(0.3, 0.01, momentum=0.9)
    assert not torch.equal(net.predict(X), before)
    net.restore()
    assert torch.equal(net.predict(X), before) and not net.velocity
    with pytest.raises(RuntimeError, match="checkpoint"):
        net.restore()


def test_a_zero_input_gives_no_nan():
    for layernorm in (False, True):
        net = small.network(bias_alpha=0.0, last_bias_alpha=None, layernorm=layernorm)
        X, Y = small.data(net)
        X[2] = 0
        assert (net(X)[2] == 0).all()
        net.backward(LOSSES["xent"][0](net(X), Y)[1])
        assert (net.grads.rows(3)[0][2] == 0).all()
        net.step(0.1)
        assert net.predict(X).isfinite().all()


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="L is 0"):
        InfPiMLP(5, 3, 0, 4)
    net = small.network()
    with pytest.raises(ValueError, match=r"\[batch, 5\]"):
        net(torch.zeros(2, 7))
    with pytest.raises(ValueError, match="call the network on this batch"):
        net.backward(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="must be positive"):
        net.gclip(0)
