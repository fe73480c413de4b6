"""The hand-written MAML backward against double autograd and against finite differences, in
float64."""

import pytest
import torch

from pilimit_orig.inf.meta import adapt_readout, meta_backward
from pilimit_orig.losses import LOSSES
from tests.pilimit_orig import small

RATE, BIAS_MULT = 0.7, 0.5


def oracle_loss(net, p, support, query, steps, loss, second_order=True):
    """The query loss after inner steps, differentiable through them (or with them held
    constant)."""
    extra, bias_shift = [], torch.zeros((), dtype=torch.float64)
    for _ in range(steps):
        out, direction, sigma = small.function(net, p, support[0], extra, bias_shift)
        value = (
            torch.nn.functional.cross_entropy(out, support[1])
            if loss == "xent"
            else ((out - (torch.eye(net.dout, dtype=torch.float64)[support[1]] - 0.1)) ** 2).mean()
        )
        (delta,) = torch.autograd.grad(value, out, create_graph=True)
        rows = (-RATE * net.last_layer_alpha * delta * sigma, direction)
        shift = -RATE * BIAS_MULT * net.last_bias_alpha * net.last_layer_alpha * delta.sum(0)
        if not second_order:
            rows, shift = tuple(t.detach() for t in rows), shift.detach()
        extra.append(rows)
        bias_shift = bias_shift + shift
    out, _, _ = small.function(net, p, query[0], extra, bias_shift)
    return LOSSES[loss][0](out, query[1])[0]


def hand(net, support, query, steps, loss, **kw):
    buffer = net.newgradbuffer()
    adaptation = adapt_readout(
        net, *support, lr=RATE, steps=steps, loss=loss, bias_lr_mult=BIAS_MULT
    )
    value, _ = meta_backward(net, adaptation, *query, buffer, **kw)
    net.restore()
    return value, buffer


@pytest.mark.parametrize("second_order", [True, False], ids=["second", "first"])
@pytest.mark.parametrize("loss", ["xent", "mse"])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(
    "case",
    [
        dict(),
        dict(layernorm=True),
        dict(L=3),
        dict(bias_alpha=0.0, last_bias_alpha=None),
        dict(L=1, last_bias_alpha=0.0),
    ],
    ids=str,
)
def test_meta_gradient_is_autograd(case, steps, loss, second_order):
    net = small.network(**case)
    support, query = small.data(net, 5, seed=1), small.data(net, 7, seed=2)
    p = small.leaves(net)
    value = oracle_loss(net, p, support, query, steps, loss, second_order)
    expected = dict(zip(p, torch.autograd.grad(value, list(p.values()))))
    got_value, buffer = hand(net, support, query, steps, loss, second_order=second_order)
    assert torch.isclose(got_value, value)
    got = small.by_parameter(net, buffer)
    for key in expected:
        # The oracle keeps away from cosine 1 by 1e-14, which costs it about the root of that in its
        # derivative.
        assert torch.allclose(got[key], expected[key], atol=3e-7), key


def test_meta_gradient_is_a_finite_difference():
    net = small.network()
    support, query = small.data(net, 5, seed=1), small.data(net, 7, seed=2)
    _, buffer = hand(net, support, query, 2, "xent")
    got = small.by_parameter(net, buffer)
    g, eps = torch.Generator().manual_seed(9), 1e-5
    for (kind, l), gradient in got.items():
        # restore() puts back the dictionaries, so they are looked up by name each time.
        name = "As" if kind == "A" else "biases"
        value, kept = [], getattr(net, name)[l]
        direction = torch.randn(kept.shape, generator=g, dtype=torch.float64)
        for sign in (1, -1):
            getattr(net, name)[l] = kept + sign * eps * direction
            value.append(hand(net, support, query, 2, "xent")[0])
        getattr(net, name)[l] = kept
        difference = (value[0] - value[1]) / (2 * eps)
        assert torch.isclose((gradient * direction).sum(), difference, rtol=1e-5, atol=1e-8), (
            kind,
            l,
        )


def test_first_and_second_order_differ():
    """The case in which the tests above could not tell them apart would be a degenerate one."""
    net = small.network()
    support, query = small.data(net, 5, seed=1), small.data(net, 7, seed=2)
    second, first = (
        hand(net, support, query, 1, "xent", second_order=order)[1].first for order in (True, False)
    )
    assert (second - first).norm() > 0.05 * first.norm()


def test_a_fixed_readout_at_zero_receives_nothing_and_the_body_all():
    net = small.network(readout_zero_init=True, last_bias_alpha=0.0)
    net.As[3], net.Amult[3], net.Bs[3] = net.As[3][:1] * 0, net.Amult[3][:1] * 0, net.Bs[3][:1]
    support, query = small.data(net, 5, seed=1), small.data(net, 7, seed=2)
    _, learned = hand(net, support, query, 1, "xent")
    _, fixed = hand(net, support, query, 1, "xent", readout_fixed=True)
    assert learned.rows(3)[0].shape == (12, 3) and fixed.rows(3) is None
    assert torch.equal(learned.first, fixed.first)


def test_the_inner_loop_leaves_no_trace_and_tasks_add_up():
    net = small.network()
    tasks = [(small.data(net, 5, seed=s), small.data(net, 7, seed=s + 50)) for s in range(3)]
    before = {l: a.clone() for l, a in net.Amult.items()}
    together, alone = net.newgradbuffer(), 0
    for support, query in tasks:
        adaptation = adapt_readout(net, *support, lr=RATE)
        meta_backward(net, adaptation, *query, together, weight=1 / 3)
        net.restore()
        single = net.newgradbuffer()
        adaptation = adapt_readout(net, *support, lr=RATE)
        meta_backward(net, adaptation, *query, single)
        net.restore()
        alone = alone + single.first / 3
    assert torch.allclose(together.first, alone)
    assert all(torch.equal(net.Amult[l], before[l]) for l in before)
    net.step(0.1, buffer=together)
    assert net.Amult[3].shape[0] == before[3].shape[0] + 3 * (7 + 5)
