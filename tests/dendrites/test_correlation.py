"""Cascade correlation: the gradient is that of S, nothing leaks out of the phase, and candidates do
learn to correlate."""

import pytest
import torch
from torch import nn

from pilimit_lib.dendrites import (
    DendriteConfig,
    DendriticLayer,
    Growth,
    Patience,
    dendritic,
    dendritic_layers,
)
from pilimit_lib.dendrites.layers.correlation import CorrelationStats, tap
from tests.dendrites.helpers import grow_all


def covariance(a, e):
    """S_i with means over positions, in float64, written as the formula."""
    a, e = (t.movedim(1, -1).reshape(-1, t.shape[1]) for t in (a, e))
    return ((a - a.mean(0)) * (e - e.mean(0))).sum(0)


def score(a, e):
    """|Cov(a, e)| / std(e), over samples and positions."""
    spread = e.movedim(1, -1).reshape(-1, e.shape[1]).std(0, correction=0)
    return covariance(a, e).abs() / (e.numel() / e.shape[1]) / spread


def test_backward_gives_minus_the_gradient_of_s_and_leaves_y_alone():
    torch.manual_seed(0)
    y = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    a = torch.rand(4, 3, 5, dtype=torch.float64, requires_grad=True)
    target = torch.randn(4, 3, 5, dtype=torch.float64)
    stats = CorrelationStats(3, y.detach())
    out = tap(y, a, stats, axis=1)
    assert torch.equal(out, y)
    (out - target).square().sum().backward()
    e = 2 * (y - target).detach()
    assert torch.equal(y.grad, e)
    (expected,) = torch.autograd.grad(covariance(a, e).abs().sum(), a)
    torch.testing.assert_close(a.grad, -expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(stats.take_scores(), score(a.detach(), e), atol=1e-12, rtol=0)
    assert not stats.take_scores().any()  # an epoch starts from nothing


def test_the_first_batches_only_gather_averages():
    a = torch.rand(4, 2, requires_grad=True)
    stats = CorrelationStats(2, a.detach())
    for learns in (False, False, True):
        a.grad = None
        (tap(torch.zeros(4, 2), a, stats, 1, warmup=2) * torch.randn(4, 2)).sum().backward()
        assert a.grad.any() == learns


def test_scores_over_an_epoch_are_those_of_all_batches_together():
    a, e = torch.rand(40, 3, dtype=torch.float64), torch.randn(40, 3, dtype=torch.float64)
    stats = CorrelationStats(3, a)
    for part in torch.arange(40).split(16):
        stats.update(a[part], e[part])
    torch.testing.assert_close(stats.take_scores(), score(a, e), atol=1e-10, rtol=0)


def test_a_candidate_adds_nothing_and_no_gradient_reaches_earlier_layers_through_dendrites():
    config = DendriteConfig(mode="correlation")
    torch.manual_seed(0)
    layer = DendriticLayer(nn.Linear(3, 2), config, "fc")
    plain = layer(torch.ones(2, 3))
    layer.grow(torch.Generator().manual_seed(0), candidate=True)
    assert torch.equal(layer(torch.ones(2, 3)), plain)
    x = torch.randn(4, 3, requires_grad=True)
    layer(x).square().sum().backward()
    (only_neurons,) = torch.autograd.grad(layer.neuron(x).square().sum(), x)
    torch.testing.assert_close(x.grad, only_neurons)
    assert layer.dendrites[0].body.weight.grad.abs().max() > 0
    layer.eval()
    assert torch.equal(layer(torch.ones(2, 3)), plain)


class Xor:
    """Two inputs whose product is the target: neurons alone cannot, a dendrite can."""

    def __init__(self, **settings):
        torch.manual_seed(0)
        self.config = DendriteConfig(
            switch=Patience(patience=3),
            mode="correlation",
            activation="tanh",
            init_scale=0.5,
            seed=0,
            maximize=False,
            candidate_patience=5,
            **settings,
        )
        self.net = dendritic(nn.Sequential(nn.Linear(2, 1)), self.config)
        self.scaler, self.unit = torch.amp.GradScaler("cpu", enabled=False), 1.0
        self.growth = Growth(self.net, optimizer=lambda ps: torch.optim.Adam(ps, 0.05))
        self.x = torch.tensor([[0.0, 0.0], [0, 1], [1, 0], [1, 1]]).repeat(8, 1) * 2 - 1
        self.y = self.x[:, :1] * self.x[:, 1:]

    def epoch(self):
        self.net.train()
        for _ in range(10):
            self.growth.optimizer.zero_grad()
            loss = (self.net(self.x) - self.y).square().mean()
            self.scaler.scale(loss * self.unit).backward()
            self.scaler.step(self.growth.optimizer)
            self.scaler.update()
        return self.growth.step(loss.item())


def test_candidates_learn_alone_then_neurons_learn_to_use_them():
    run = Xor()
    while run.growth.plateau.state.phase == "n":
        run.epoch()
    layer = run.net[0]
    neurons = {k: v.clone() for k, v in layer.neuron.state_dict().items()}
    born = layer.dendrites[0].body.weight.detach().clone()
    correlations = []
    while run.growth.plateau.state.phase == "p":
        run.epoch()
        correlations.append(run.growth.records.rows.epochs[-1]["correlation"])
    assert max(correlations) > 1.5 * correlations[0] > 0.001
    assert all(torch.equal(v, neurons[k]) for k, v in layer.neuron.state_dict().items())
    dendrite = layer.dendrites[0]
    assert (
        not dendrite.candidate
        and not dendrite.w.any()
        and not torch.equal(dendrite.body.weight, born)
    )
    best = dendrite.body.weight.detach().clone()
    while run.growth.plateau.state.phase == "n" and not run.growth.plateau.state.finished:
        run.epoch()
    assert torch.equal(run.net[0].dendrites[0].body.weight, best)  # mature dendrites are frozen
    # a line reaches 1.0, the variance of the target, and no less
    assert run.growth.plateau.state.best < 0.9


def test_cap_at_n_ends_the_phase_with_the_length_of_the_first():
    run = Xor(cap_at_n=True)
    actions = []
    while "mature" not in actions:
        actions.append(run.epoch().action)
    first = actions.index("grow") + 1
    assert actions.index("mature") + 1 <= 2 * first


def test_only_the_phase_s_parameters_require_gradients():
    run = Xor()
    run.net[0].neuron.bias.requires_grad_(False)
    run.growth.frozen = ["0.neuron.bias"]
    learning = lambda: {n for n, p in run.net.named_parameters() if p.requires_grad}  # noqa: E731
    while run.growth.plateau.state.phase == "n":
        run.epoch()
    assert learning() == {"0.dendrites.0.body.weight", "0.dendrites.0.body.bias"}
    while run.growth.plateau.state.phase == "p":
        run.epoch()
    assert learning() == {"0.neuron.weight", "0.dendrites.0.w"}


def test_candidates_reload_from_a_plain_state_dict():
    config = DendriteConfig(mode="correlation")
    build = lambda: dendritic(nn.Sequential(nn.Linear(2, 2)), config)  # noqa: E731
    net, other = build(), build()
    next(dendritic_layers(net))[1].grow(torch.Generator().manual_seed(0), candidate=True)
    other.load_state_dict(net.state_dict())
    assert other[0].dendrites[0].candidate
    grow_all(net := build())
    other = build()
    other.load_state_dict(net.state_dict())
    assert not other[0].dendrites[0].candidate


def scores_of_noise(batch_size, scale):
    """Scores of a candidate over 512 samples, the error of which is noise."""
    torch.manual_seed(0)
    x = torch.randn(512, 4)
    y = torch.randn(512, 2)  # nothing can be learnt
    layer = DendriticLayer(nn.Linear(4, 2), DendriteConfig(mode="correlation"), "fc")
    layer.neuron.requires_grad_(False).weight.zero_()
    dendrite = layer.grow(torch.Generator().manual_seed(0), candidate=True)
    for part in torch.arange(512).split(batch_size):
        loss = (layer(x[part]) - y[part]).square().mean()
        (loss * scale).backward()
    return dendrite.stats.take_scores()


def test_scores_do_not_depend_on_batch_size_nor_on_the_scale_of_the_loss():
    expected = scores_of_noise(512, 1.0)
    assert (expected < 1e-3).all()
    for batch_size, scale in ((8, 1.0), (64, 1.0), (64, 2.0**16), (512, 1e-6)):
        torch.testing.assert_close(scores_of_noise(batch_size, scale), expected, atol=0, rtol=1e-5)


def test_a_batch_that_is_not_finite_is_passed_over_and_the_scaler_sees_it():
    a, e = torch.rand(12, 2, dtype=torch.float64), torch.randn(12, 2, dtype=torch.float64)
    clean, hit = CorrelationStats(2, a), CorrelationStats(2, a)
    for bad in (float("nan"), float("inf")):
        for stats in (clean, hit):
            stats.update(a[:6], e[:6])
        hit.update(a[:6], torch.full_like(e[:6], bad))
        hit.update(torch.full_like(a[:6], bad), e[:6])
        for stats in (clean, hit):
            stats.update(a[6:], e[6:])
        for name, value in clean.named_buffers():
            assert torch.equal(value, getattr(hit, name)), name
    y, a = torch.zeros(3, 2), torch.rand(3, 2, requires_grad=True)
    (tap(y, a, CorrelationStats(2, y), 1) * float("inf")).sum().backward()
    assert not a.grad.isfinite().all()


@pytest.mark.parametrize("scaled", [True, False])
def test_correlation_training_survives_losses_that_are_not_finite(scaled):
    run = Xor()
    while run.growth.plateau.state.phase == "n":
        run.epoch()
    if scaled:
        run.scaler, run.unit = torch.amp.GradScaler("cpu", init_scale=2.0**127), 2.0**12
    else:  # every weight of the candidate becomes nan, as any network's would
        (run.net(run.x) * float("nan")).sum().backward()
        run.growth.optimizer.step()
        assert run.net[0].dendrites[0].body.weight.isnan().all()
    while run.growth.plateau.state.phase == "p":
        run.epoch()
    assert not scaled or run.scaler.get_scale() < 2.0**127
    best = max(r["correlation"] or 0.0 for r in run.growth.records.rows.epochs)
    assert best > 0.1 and run.net(run.x).isfinite().all()
    assert all(p.isfinite().all() for p in run.net.parameters())


def test_a_candidate_saved_before_the_score_was_free_of_units_still_loads():
    config = DendriteConfig(mode="correlation")
    build = lambda: dendritic(nn.Sequential(nn.Linear(2, 2)), config)  # noqa: E731
    net, other = build(), build()
    net[0].grow(torch.Generator().manual_seed(0), candidate=True)
    state = net.state_dict()
    del state["0.dendrites.0.stats.sum_ee"]
    other.load_state_dict(state)
    assert other[0].dendrites[0].candidate
