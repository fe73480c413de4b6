"""A batch that is not finite destroys nothing: refused by name, or passed over and counted."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pilimit_lib import sigprop
from pilimit_lib.sigprop.propagators import NonFinite

ADAM = {"optimizer": lambda m: torch.optim.Adam(m.parameters(), 0.01)}


def everything(net, outer):
    """Parameters, buffers and the moments of all optimisers."""
    tensors = dict(net.state_dict())
    for name, optimizer in {"outer": outer, **net.local_optimizers()}.items():
        for i, state in enumerate(optimizer.state.values()):
            tensors |= {f"{name} {i} {key}": torch.as_tensor(v) for key, v in state.items()}
    return copy.deepcopy(tensors)


def step(net, outer, x, y):
    loss = F.cross_entropy(net(x, y), y)
    outer.zero_grad()
    loss.backward()
    outer.step()
    return loss


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture
def trained(make, data):
    net = make(norm=True, **ADAM)
    outer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(2):
        step(net, outer, *data)
    return net, outer


def spoilt(x, value, row=5):
    x = x.clone()
    x[row, 3] = value
    return x


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_by_default_it_is_refused_and_the_sample_is_named(trained, data, value):
    net, outer = trained
    x, y = data
    before = everything(net, outer)
    with pytest.raises(NonFinite, match=r"1 of 24 samples.*\(rows 5 of the batch\).*'skip'"):
        net(spoilt(x, value), y)
    assert same(before, everything(net, outer)) and net.skipped == 0
    assert isinstance(NonFinite(""), ValueError)
    step(net, outer, x, y)
    assert all(v.isfinite().all() for v in everything(net, outer).values())


def test_the_first_batch_is_refused_as_well(make, data):
    net = make()
    with pytest.raises(NonFinite):
        net(spoilt(data[0], float("nan")), data[1])
    net(*data)


def test_skipped_batches_are_counted_and_leave_everything_as_it_was(trained, data):
    net, outer = trained
    x, y = data
    net.nonfinite = "skip"
    before = everything(net, outer)
    loss = step(net, outer, spoilt(x, float("nan")), y)
    assert net.skipped == 1 and same(before, everything(net, outer)) and loss.isfinite()
    clean = x.clone()
    clean[5, 3] = 0
    with torch.no_grad():
        assert torch.equal(net(spoilt(x, float("nan")), y), net.eval()(clean))
    assert net.train() is net and net.skipped == 2
    step(net, outer, x, y)
    assert not same(before, everything(net, outer))


def test_wrap_takes_the_mode_and_names_bad_ones(make, data):
    assert make(nonfinite="skip").nonfinite == "skip"
    with pytest.raises(ValueError, match="nonfinite is one of .*'skip'.*got 'drop'"):
        make(nonfinite="drop")


def test_evaluation_passes_what_it_gets(trained, data):
    net, _ = trained
    x, y = data
    out = net.eval()(spoilt(x, float("nan")), y)
    assert out[5].isnan().all() and out[:5].isfinite().all() and out[6:].isfinite().all()


class Overflow(nn.Module):
    """Finite until told otherwise."""

    factor = 1.0

    def forward(self, x):
        return x * self.factor


@pytest.mark.parametrize("mode", ["raise", "skip"])
def test_an_overflow_inside_stops_at_its_layer(data, mode):
    x, y = data
    bad = Overflow()
    blocks = [
        nn.Linear(8, 8),
        nn.Sequential(nn.Linear(8, 8), bad, nn.BatchNorm1d(8)),
        nn.Linear(8, 3),
    ]
    signal = sigprop.signals.project_labels(3, (8,), nn.Linear(12, 8))
    net = sigprop.wrap(blocks, signal=signal, nonfinite=mode, **ADAM)
    outer = torch.optim.Adam(net.parameters(), 0.01)
    step(net, outer, x, y)
    before = everything(net, outer)
    bad.factor = float("inf")
    if mode == "raise":
        with pytest.raises(NonFinite, match=r"(?s)NaN activations.*") as caught:
            step(net, outer, x, y)
        assert "raised in 'model.1'" in caught.value.__notes__[0]
    else:
        assert step(net, outer, x, y).isfinite() and net.skipped == 1
    after = everything(net, outer)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed and not any("model.1" in key or "model.2" in key for key in changed)
    assert all(v.isfinite().all() for v in after.values())


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite_moves_nothing(data, what):
    x, y = data

    def loss(sp_learn, h1, t1, h0, t0, context):
        # sqrt at 0: the value is finite, the slope is not
        return h1.sum() * float("nan") if what == "loss" else (0 * h1).square().sum().sqrt()

    signal = sigprop.signals.project_labels(3, (12,), fixed=True)
    net = sigprop.wrap([nn.Linear(12, 8), nn.Linear(8, 3)], signal=signal, loss=loss, **ADAM)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(NonFinite, match=f"local {what}"):
        net(x, y)
    assert same(before, net.state_dict())
    assert all(p.grad is None for _, p in net.named_parameters())
    net.nonfinite = "allow"
    net(x, y)
    assert not same(before, net.state_dict())


@pytest.mark.parametrize("mode", ["raise", "skip"])
def test_accumulated_gradients_that_are_not_finite_step_no_layer(make, data, mode):
    net = make(nonfinite=mode, **ADAM)
    with net.accumulate():
        net(*data)
    before = copy.deepcopy(net.state_dict())
    net.model[1].module[0].weight.grad[0, 0] = float("inf")
    if mode == "raise":
        with pytest.raises(NonFinite, match="local gradient"):
            net.local_step()
    else:
        net.local_step()
        assert net.skipped == 1
    assert same(before, net.state_dict())
    assert all(p.grad is None for learner in net.learners().values() for p in _all(learner))


def _all(module):
    return [p for _, p in module.named_parameters()]


def test_errors_of_a_loop_back_are_refused_too(data):
    x, y = data
    signal = sigprop.signals.ProjectionContextInput(nn.Linear(3, 8), nn.Linear(12, 8), (3,), (8,))
    net = sigprop.models.LoopBack(
        nn.Sequential(
            sigprop.propagators.Loss(nn.Linear(8, 8), loss=sigprop.loss.v9_input_target_max_all),
            sigprop.propagators.Identity(nn.Linear(8, 3)),
        ),
        sigprop.propagators.signals.Loss(signal, loss=sigprop.loss.v9_input_target_max_all),
        error=lambda out, y: out * float("nan"),
        **ADAM,
    )
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(NonFinite):
        net(x, y)
    assert same(before, net.state_dict())


def test_integers_and_nothing_count_as_finite():
    finite = sigprop.propagators.finite.finite
    assert finite(None, torch.arange(3), torch.zeros(0), torch.ones(2, device="meta"))
    # whose sums overflow
    assert finite(torch.full((4,), 6e4, dtype=torch.float16), torch.full((4,), 3e38))
    assert not finite(torch.tensor([float("inf"), -float("inf")]))
    assert not finite(torch.ones(2), torch.tensor([1.0, float("nan")]))
