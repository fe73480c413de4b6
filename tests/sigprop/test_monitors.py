"""Monitors: what they count, against numbers counted by hand."""

import pytest
import torch
from torch import nn

from pilimit_lib import sigprop
from pilimit_lib.sigprop import monitors

V9 = sigprop.loss.v9_input_target_max_all


def test_label_metrics_count_samples_and_right_answers():
    metrics = monitors.loss.LabelMetrics("layer", V9)
    h, t, y = torch.eye(3)[[0, 1, 2, 0]], torch.eye(3)[[0, 1, 1, 0]], torch.tensor([0, 1, 2, 0])
    assert torch.equal(metrics(None, h, t, h, t, y), V9(None, h, t, h, t, y))
    # sample 2 finds no target of its class
    assert metrics.as_dict()["accuracy"] == pytest.approx(0.75)
    metrics(None, h[:1], t[:1], h[:1], t[:1], y[:1])
    seen = metrics.as_dict()
    assert (seen["count"], seen["accuracy"], seen["accuracy_last"]) == (5, pytest.approx(0.8), 1.0)
    expected = (4 * V9(None, h, t, h, t, y) + V9(None, h[:1], t[:1], h[:1], t[:1], y[:1])) / 5
    assert (
        seen["loss"] == pytest.approx(expected.item(), abs=1e-6)
        and "accuracy 0.8000" in metrics.metrics()
    )
    metrics.reset()
    assert metrics.as_dict() == {
        "loss": 0.0,
        "accuracy": 0.0,
        "loss_last": 0.0,
        "accuracy_last": 0.0,
        "count": 0,
    }


def test_label_metrics_with_targets_of_classes():
    metrics = monitors.loss.LabelMetrics("layer", sigprop.loss.v1_input_label_direct)
    metrics(None, torch.eye(3)[[0, 1, 2, 0]], torch.eye(3), None, None, torch.tensor([0, 1, 2, 1]))
    assert metrics.as_dict()["accuracy"] == pytest.approx(0.75)


def test_label_metrics_pass_on_what_the_loss_refuses():
    metrics = monitors.loss.LabelMetrics("layer", sigprop.loss.v15_input_target_topk(6))
    with pytest.raises(ValueError, match="k=6"):
        metrics.check(None, 4, torch.zeros(4))


def test_group_refuses_a_name_twice():
    group = monitors.Group(monitors.loss.LabelMetrics("a", V9))
    with pytest.raises(ValueError, match="'a' already"):
        group.add(monitors.loss.LabelMetrics("a", V9))


def test_memory_counts_the_saved_bytes_of_a_linear_chain():
    layers = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).double()
    x = torch.randn(10, 4).double()
    with monitors.Memory(layers) as memory:
        out = layers(x)
        # The input, and the output of the ReLU, which ReLU and the second layer share; weights
        # exist anyway.
        assert memory.held == 2 * 10 * 4 * 8
        out.sum().backward()
        assert memory.held == 0 and memory.peak == 2 * 10 * 4 * 8 == memory.total
    with monitors.Memory() as all_of_it:
        layers(x)
    assert all_of_it.total == memory.total + 16 * 8 and "MiB" in memory.metrics()


def test_saved_bytes_do_not_grow_with_depth(make, data):
    peaks = {}
    for depth in (3, 12):
        net = make(depth=depth)
        with monitors.Memory(net) as memory:
            net(*data).sum().backward()
        peaks[depth] = memory.peak
    assert peaks[3] == peaks[12] > 0


def test_time_adds_up_by_layer(make, data):
    net, ticks = make(), iter(range(100))
    net(*data)  # the first call tries the network out before
    with monitors.Time(net, clock=lambda: float(next(ticks))) as times:
        net(*data), net(*data)
    assert times.as_dict() == {"signal": 2.0, "model.0": 2.0, "model.1": 2.0, "model.2": 2.0}
    net(*data)
    assert times.calls["model.0"] == 2 and "model.1: 2.0000 s in 2 calls" in times.metrics()
