"""Derivatives through training, compared with central differences of whole replays in float64."""

import copy

import pytest
import torch
from torch.nn import functional as F

from pilimit_lib.inf.gp import KernelMLP, ReLUKernel
from pilimit_lib.inf.replay import Recorder, influence, replay
from pilimit_lib.inf.replay.retrain import cross_entropy_each, retrain_step, started

from .runs import RUNS, SAMPLES, data, fresh, named, optimizer_of, order, recorded, train

SHORT = order(epochs=1) + order(epochs=1, size=5, seed=7)


def questions():
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    return x, torch.tensor([0, 2, 1])


def trained_with(record, net, weights, average):
    work = copy.deepcopy(net)
    optimizer = started(record, work)
    for step in range(len(record)):
        retrain_step(record, step, work, optimizer, *data(), weights, cross_entropy_each, average)
    return work


@pytest.mark.parametrize(("kind", "how"), RUNS, ids=named)
def test_it_is_the_derivative_of_the_replay(kind, how):
    net, record = recorded(kind, SHORT, **how)
    average = "batch" if kind == "rows" and how.get("momentum") else "kept"
    q, t = questions()
    found = influence(record, net, *data(), q, t, average=average)
    assert found.ids.tolist() == list(range(SAMPLES)) and found.values.shape == (SAMPLES, 3)
    eps = 1e-5
    for sample in (0, 6, 11):
        values = []
        for shift in (eps, -eps):
            weights = torch.ones(SAMPLES, dtype=torch.float64)
            weights[sample] += shift
            with torch.no_grad():
                values.append(cross_entropy_each(trained_with(record, net, weights, average)(q), t))
        expected = -(values[0] - values[1]) / (2 * eps)
        torch.testing.assert_close(found.values[sample], expected, rtol=1e-5, atol=1e-8)


def test_it_predicts_what_leaving_one_out_does():
    net, record = recorded("rows")
    x, y = data()
    q, t = questions()
    found = influence(record, net, x, y, q, t)
    with torch.no_grad():
        before = cross_entropy_each(net(q), t)
        true = torch.stack(
            [
                cross_entropy_each(replay(record, net, x, y, without=[i])(q), t) - before
                for i in range(SAMPLES)
            ]
        )
    both = torch.stack([found.values.flatten(), true.flatten()])
    assert torch.corrcoef(both)[0, 1] > 0.9
    torch.testing.assert_close(
        found.without(torch.tensor([2, 5])), found.values[2] + found.values[5]
    )


def test_other_queries_and_losses_and_only_those_of_the_run():
    net = fresh("moments")
    optimizer, (x, y), (q, t) = optimizer_of(net), data(), questions()
    goal = F.one_hot(y, 3).double()

    def squares(out, target):
        return (out - target).square().sum(1)

    with Recorder(net, optimizer) as recorder:
        train(net, optimizer, SHORT, x, goal, loss=lambda out, target: squares(out, target).mean())
    record = recorder.record
    found = influence(record, net, x, goal, q, t, query=lambda out, t: out[:, 0], loss=squares)
    gone = replay(record, net, x, goal, without=[4], loss=squares)
    with torch.no_grad():
        true = (gone(q) - net(q))[:, 0]
    assert torch.corrcoef(torch.stack([found.values[4], true]))[0, 1] > 0.9
    with pytest.raises(ValueError, match="the replay is not the network"):
        influence(record, net, x, y, q, t)  # of the cross entropy, which the run did not lower
    with pytest.raises(ValueError, match="the replay is not the network"):
        influence(record, net, x + 0.1, goal, q, t, loss=squares)


def test_frozen_layers_carry_no_influence():
    net = fresh("rows")
    for layer in net.layers[:-1]:
        layer.requires_grad_(False)
    x, y = data()
    optimizer = optimizer_of(net)
    with Recorder(net, optimizer) as recorder:
        train(net, optimizer, SHORT, x, y)
    q, t = questions()
    found = influence(recorder.record, net, x, y, q, t)
    weights = torch.ones(SAMPLES, dtype=torch.float64)
    values = []
    for shift in (1e-5, -1e-5):
        weights[4] = 1 + shift
        with torch.no_grad():
            out = trained_with(recorder.record, net, weights, "kept")(q)
        values.append(cross_entropy_each(out, t))
    expected = -(values[0] - values[1]) / 2e-5
    torch.testing.assert_close(found.values[4], expected, rtol=1e-5, atol=1e-8)


def test_refusals():
    net, record = recorded("rows", SHORT)
    x, y = data()
    q, t = questions()
    net.layers[1].limits = torch.nn.Identity()
    with pytest.raises(ValueError, match="layers.1 merges, folds or shards"):
        influence(record, net, x, y, q, t)
    learner = KernelMLP(5, 3, ReLUKernel(depth=1), dtype=torch.float64)
    with pytest.raises(ValueError, match="its kernel is fixed"):
        influence(record, learner, x, y, q, t)
