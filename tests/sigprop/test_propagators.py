"""Propagators: what learns, by which step, what travels on, and what can be subclassed."""

import copy

import pytest
import torch
from torch import nn

from pilimit_lib import sigprop
from pilimit_lib.sigprop import Flow, functional, propagators

V9 = sigprop.loss.v9_input_target_max_all


def block(seed=1):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 4), nn.ReLU()).double()


@pytest.fixture
def flow():
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    return Flow(torch.randn(6, 5).double(), torch.eye(5).double()[labels] + 0.1, labels)


@pytest.mark.parametrize("fuse", [True, False, "auto"])
def test_one_step_is_the_sgd_step_and_later_layers_see_the_activations_before_it(flow, fuse):
    reference, layer = block(), block()
    h1, t1 = reference(flow.h), reference(flow.t)
    V9(None, h1, t1, flow.h, flow.t, flow.context).backward()
    expected = [p.detach() - 0.3 * p.grad for p in reference.parameters()]

    propagator = propagators.Loss(layer, torch.optim.SGD(layer.parameters(), 0.3), V9, fuse=fuse)
    out = propagator(flow)
    for p, e in zip(layer.parameters(), expected):
        assert torch.allclose(p, e, rtol=1e-12)
    assert torch.allclose(out.h, h1) and torch.allclose(out.t, t1) and out.context is flow.context
    assert not out.h.requires_grad and not out.t.requires_grad
    assert torch.allclose(propagator.last_loss, V9(None, h1, t1, flow.h, flow.t, None))


def test_no_gradient_reaches_an_earlier_layer(flow):
    earlier, layer = nn.Linear(5, 5).double(), block()
    h, t = earlier(flow.h), earlier(flow.t)
    seen = []
    h.register_hook(seen.append), t.register_hook(seen.append)
    propagators.Loss(layer, torch.optim.SGD(layer.parameters(), 0.1), V9)(Flow(h, t, flow.context))
    assert not seen and earlier.weight.grad is None
    # The control: through Forward the gradient does arrive.
    out = propagators.Forward(layer)(Flow(h, t, flow.context))
    V9(None, out.h, out.t, h, t, None).backward()
    assert len(seen) == 2 and earlier.weight.grad is not None


def test_local_gradients_do_not_stay(flow):
    layer = block()
    propagators.Loss(layer, torch.optim.SGD(layer.parameters(), 0.1), V9)(flow)
    assert all(p.grad is None for p in layer.parameters())


@pytest.mark.parametrize("optimizer", [None, "sgd"])
@pytest.mark.parametrize("training", [True, False])
def test_loss_without_optimizer_or_in_evaluation_changes_nothing_and_builds_no_graph(
    flow, optimizer, training
):
    layer = block()
    before = copy.deepcopy(layer.state_dict())
    sgd = torch.optim.SGD(layer.parameters(), 0.1) if optimizer else None
    propagator = propagators.Loss(layer, sgd, V9).train(training)
    with sigprop.monitors.Memory() as memory:
        propagator(flow)
    changed = any(not torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    learns = training and optimizer is not None
    assert changed == learns and (memory.total > 0) == learns
    assert propagator.last_loss is not None


def test_a_signal_without_optimizer_builds_no_graph():
    signal = propagators.signals.Loss(
        sigprop.signals.project_labels(3, (5,), nn.Linear(4, 5)), None, V9
    )
    with sigprop.monitors.Memory() as memory:
        y = torch.tensor([0, 1, 2])
        signal((torch.randn(3, 4), y, y))
    assert memory.total == 0 and signal.last_loss is not None


def test_nothing_is_learnt_where_gradients_are_off(flow):
    layer = block()
    before = copy.deepcopy(layer.state_dict())
    propagator = propagators.Loss(layer, torch.optim.SGD(layer.parameters(), 0.1), V9)
    with torch.no_grad():
        propagator(flow)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


def test_inference_has_no_targets(flow):
    layer = block()
    for cls in (propagators.Loss, propagators.Fixed, propagators.Forward, propagators.Identity):
        out = cls(layer, loss=V9)(Flow(flow.h, None, None))
        assert out.t is None and torch.equal(out.h, layer(flow.h))


def test_what_the_others_do_to_the_streams(flow):
    layer = block()
    identity, fixed, forward = (
        cls(layer)(flow) for cls in (propagators.Identity, propagators.Fixed, propagators.Forward)
    )
    assert identity.t is flow.t and identity.h.requires_grad
    assert (
        torch.allclose(forward.t, layer(flow.t))
        and forward.h.requires_grad
        and forward.t.requires_grad
    )
    assert torch.allclose(fixed.t, layer(flow.t)) and not fixed.h.requires_grad
    for name, out in (("identity", identity), ("fixed", fixed), ("forward", forward)):
        again = getattr(functional.propagators, name)(flow, layer)
        assert (
            torch.allclose(again.h, out.h)
            and torch.allclose(again.t, out.t)
            and again.h.requires_grad == out.h.requires_grad
        )


def test_functional_propagators_are_reached_from_both_sides():
    assert propagators.functional.forward is functional.propagators.forward
    assert propagators.functional.identity is functional.propagators.identity
    assert propagators.functional.fixed is functional.propagators.fixed


def test_functional_reshape_between_layers():
    out = functional.propagators.forward(
        (torch.ones(2, 3, 4), torch.ones(5, 3, 4), None), lambda x: x.flatten(1)
    )
    assert out.h.shape == (2, 12) and out.t.shape == (5, 12)
    assert functional.propagators.fixed((torch.ones(2, 3), None, None), torch.relu).t is None


def test_recurrent_blocks_learn_and_hand_on_every_step():
    for cell in (nn.RNN, nn.GRU, nn.LSTM):
        layer = cell(5, 4, batch_first=True)
        before = copy.deepcopy(layer.state_dict())
        propagator = propagators.Loss(layer, torch.optim.SGD(layer.parameters(), 0.1), V9)
        labels = torch.tensor([0, 1, 0, 1])
        h, t = torch.randn(4, 7, 5), torch.randn(2, 7, 5)[labels]
        out = propagator((h, t, labels))
        assert out.h.shape == (4, 7, 4) and any(
            not torch.equal(v, before[k]) for k, v in layer.state_dict().items()
        )
    with pytest.raises(ValueError, match="batch_first=True"):
        propagators.Loss(nn.GRU(5, 4), None, V9)((torch.ones(4, 7, 5), torch.ones(4, 7, 5), labels))


def test_accelerated_float16_with_a_gradient_scaler(flow):
    layer = block().float()
    before = copy.deepcopy(layer.state_dict())
    propagator = propagators.Loss(
        layer, torch.optim.SGD(layer.parameters(), 0.1), V9, scaler=torch.amp.GradScaler("cpu")
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = propagator((flow.h.float(), flow.t.float(), flow.context))
    assert out.h.dtype == torch.bfloat16 and propagator.last_loss.dtype == torch.float32
    reference = block().float()
    V9(
        None,
        reference(flow.h.float()),
        reference(flow.t.float()),
        flow.h.float(),
        flow.t.float(),
        None,
    ).backward()
    for (k, v), p in zip(layer.state_dict().items(), reference.parameters()):
        assert not torch.equal(v, before[k]) and torch.allclose(
            v, before[k] - 0.1 * p.grad, atol=0.02
        )


class Mine(propagators.Learn):
    """Only the loss is given; train_ and eval_ come from the base."""

    def loss_(self, h1, t1, h0, t0, y_onehot):
        return (h1 - t1).square().mean()


def test_a_subclass_needs_only_a_loss(flow):
    layer, reference = block(), block()
    (reference(flow.h) - reference(flow.t)).square().mean().backward()
    Mine(layer, torch.optim.SGD(layer.parameters(), 0.5))(flow)
    for p, r in zip(layer.parameters(), reference.parameters()):
        assert torch.allclose(p, r - 0.5 * r.grad)
    with pytest.raises(NotImplementedError, match="neither loss_ nor train_"):
        propagators.Learn(block())(flow)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda f: propagators.Loss(block()), ValueError, "needs a loss"),
        (lambda f: propagators.Loss(block(), lambda m: None, V9), TypeError, "built optimiser"),
        (lambda f: propagators.Loss(block(), None, "v9"), TypeError, "loss must be callable"),
        (
            lambda f: propagators.Loss(block(), None, V9, fuse="yes"),
            ValueError,
            "fuse is True, False or 'auto'",
        ),
        (lambda f: propagators.Loss(V9, None, V9), TypeError, "wraps an nn.Module"),
        (
            lambda f: propagators.Loss(block(), None, V9)(f.h),
            TypeError,
            r"takes the triple \(h, t, context\)",
        ),
        (lambda f: propagators.Identity(block())((f.h, f.t)), TypeError, "got 2 entries"),
        (
            lambda f: propagators.Loss(block(), None, lambda *a: 3.0)(f),
            TypeError,
            "one number as a tensor, got float",
        ),
        (
            lambda f: propagators.Loss(block(), None, lambda *a: torch.ones(2))(f),
            TypeError,
            r"got a tensor of shape \[2\]",
        ),
        (
            lambda f: propagators.signals.Loss(nn.Identity(), None, V9)(f),
            TypeError,
            "there must come a generator",
        ),
    ],
)
def test_bad_input_is_named(flow, call, error, message):
    with pytest.raises(error, match=message):
        call(flow)
