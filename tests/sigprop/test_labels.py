"""Labels of every kind: soft, ignored, broken, none at all."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pilimit_lib import sigprop
from pilimit_lib.sigprop.functional import labels_of
from pilimit_lib.sigprop.functional.contrast import not_ignored
from pilimit_lib.sigprop.loss import Contrast

V1 = sigprop.loss.v1_input_label_direct
CLASS_LOSSES = {
    "v1": V1,
    "v9": sigprop.loss.v9_input_target_max_all,
    "by label": Contrast(by="label", temperature=0.5),
    "counts": Contrast(counts=True),
}


def same(a, b):
    return all(
        torch.equal(p, q) for (_, p), (_, q) in zip(a.named_parameters(), b.named_parameters())
    )


def close(a, b):
    pairs = zip(a.named_parameters(), b.named_parameters())
    return all(torch.allclose(p, q, atol=1e-6) for (_, p), (_, q) in pairs)


class Owner:
    class_rows = True


@pytest.mark.parametrize("name", ["v1", "v9", "by label"])
def test_soft_labels_of_classes_mix_the_losses_of_the_labels(name):
    """Where targets stand for classes, the loss is linear in the shares (without `counts`)."""
    loss = CLASS_LOSSES[name]
    h1, t1, t0 = torch.randn(6, 5), torch.randn(4, 5), torch.eye(4)
    a, b, share = torch.tensor([0, 1, 2, 3, 0, 1]), torch.tensor([3, 3, 1, 1, 2, 0]), 0.3
    soft = share * F.one_hot(a, 4) + (1 - share) * F.one_hot(b, 4)
    value = lambda y: loss(Owner(), h1, t1, None, t0, y)  # noqa: E731
    assert torch.allclose(value(soft), share * value(a) + (1 - share) * value(b))


@pytest.mark.parametrize("name", CLASS_LOSSES)
def test_onehot_rows_are_the_labels(name):
    h1, t1, t0 = torch.randn(6, 5), torch.randn(4, 5), torch.eye(4)
    y = torch.tensor([0, 1, 2, 3, 0, 1])
    loss = CLASS_LOSSES[name]
    value = loss(Owner(), h1, t1, None, t0, F.one_hot(y, 4).float())
    assert torch.allclose(value, loss(Owner(), h1, t1, None, t0, y))
    with pytest.raises(ValueError, match="soft labels have 3 classes but there are 4"):
        loss(Owner(), h1, t1, None, t0, torch.full((6, 3), 1 / 3))


@pytest.mark.parametrize("per_class", [True, False])
def test_a_network_learns_from_soft_labels(make, data, per_class):
    x, y = data
    net, twin = (n := make(per_class=per_class)), copy.deepcopy(n)
    hard = F.one_hot(y, 3).float()
    net(x, hard), twin(x, y)
    assert close(net, twin)
    before = copy.deepcopy(net)
    out = net(x, 0.9 * hard + 0.1 / 3)
    F.cross_entropy(out, 0.9 * hard + 0.1 / 3).backward()
    assert not same(net, before)


@pytest.mark.parametrize("per_class", [True, False])
@pytest.mark.parametrize("loss", ["v9", "v14", "v15", "label"])
@pytest.mark.parametrize("shape", [(24,), (24, 1)])
def test_no_layer_learns_from_ignored_samples(make, data, per_class, loss, shape):
    x, y = data
    losses = {
        "v9": sigprop.loss.v9_input_target_max_all,
        "v14": Contrast("max_first"),
        "v15": sigprop.loss.v15_input_target_topk(3),
        "label": Contrast(by="label"),
    }
    ignored = y.clone()
    ignored[[0, 7, 8, 23]] = -100
    kept = ignored != -100
    net, twin = (n := make(per_class=per_class, loss=losses[loss])), copy.deepcopy(n)
    out = net(x, ignored.view(shape))
    assert torch.allclose(out[kept], twin(x[kept], y[kept]), atol=1e-6) and len(out) == 24
    assert close(net, twin)
    F.cross_entropy(out, ignored).backward()
    net.eval()(x, ignored.view(shape))
    # and the next batch, whose labels all count, is whole again
    net.train(), net(x, y), twin(x, y)
    assert close(net, twin)


def test_a_batch_of_ignored_samples_teaches_nothing(make, data):
    x, y = data
    net = make(norm=True)
    before = copy.deepcopy(net)
    assert net(x, torch.full_like(y, -100)).shape == (24, 3) and same(net, before)
    fixed = sigprop.signals.project_labels(3, (12,), fixed=True)
    net = sigprop.wrap([nn.Linear(12, 8), nn.Linear(8, 3)], signal=fixed, optimizer=lambda m: None)
    assert net(x, torch.full_like(y, -100)).shape == (24, 3)


def test_who_was_ignored_is_forgotten_after_the_call(make, data):
    x, y = data
    net = make(lr=0.0)
    expected = net.exits(x)["model.0"]
    net(x[:3], torch.tensor([0, -100, 1]))  # as many samples as classes
    assert torch.equal(net.exits(x)["model.0"], expected)
    with pytest.raises(ValueError, match="labels must lie in"):
        net(x[:3], torch.tensor([0, -100, 7]))
    assert torch.equal(net.exits(x)["model.0"], expected)


def test_monitors_count_samples_that_are_not_ignored(make, data):
    x, y = data
    group = sigprop.monitors.Group()
    net = make(monitor=sigprop.monitors.loss.LabelMetrics, monitors=group)
    net(x, torch.where(torch.arange(24) < 5, -100, y))
    assert {m["count"] for m in group.as_dict().values()} == {19}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("signal", ["onehot", "drawn"])
def test_class_numbers_between_two_classes_are_refused(make, data, training, signal):
    x, y = data
    x = x[:, None, None].expand(-1, 1, 7, -1)
    drawn = signal == "drawn"
    start = (
        sigprop.signals.FixedDrawContext()
        if drawn
        else nn.Sequential(
            sigprop.signals.LabelNumberToOnehot(3),
            sigprop.signals.ProjectionContext(nn.Linear(3, 84), (3,), (1, 7, 12)),
        )
    )
    net = sigprop.wrap(
        [nn.Sequential(nn.Flatten(), nn.Linear(84, 8)), nn.Linear(8, 3)],
        signal=start,
        optimizer=lambda m: torch.optim.SGD(m.parameters(), 0.1),
    ).train(training)
    broken = y.float()
    broken[3] = 1.5
    before = copy.deepcopy(net)
    with pytest.raises(ValueError, match=r"must be whole, got 1.5; .*rows \[b classes\]"):
        net(x, broken)
    assert same(net, before)
    net(x, y.float())


def test_an_empty_batch_is_named(make, data):
    x, y = data
    net = make(norm=True)
    for mode in (True, False):
        with pytest.raises(ValueError, match="the batch is empty"):
            net.train(mode)(x[:0], y[:0])
    assert net.eval()(x[:0]).shape == (0, 3)


def test_labels_read_from_soft_rows():
    assert labels_of(torch.tensor([[0.2, 0.8], [0.6, 0.4]])).tolist() == [1, 0]


def test_unsigned_labels_ignore_nobody():
    # -100 would be 156 there
    assert not_ignored(torch.tensor([156, 1], dtype=torch.uint8)) is None
    assert not_ignored(torch.tensor([True, False])) is None
    assert not_ignored(torch.tensor([-100.0, 1.0])) is None
    assert not_ignored(torch.tensor([-100, 1], dtype=torch.int16)).tolist() == [False, True]
