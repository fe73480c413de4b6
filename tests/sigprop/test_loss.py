"""Losses: values and gradients against float64 loops and finite differences; which rows count as
partners; what is refused."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pilimit_lib import sigprop
from pilimit_lib.sigprop.functional import contrast, labels_of, partners, similarity
from pilimit_lib.sigprop.loss import Contrast

from . import oracle

SHAPES = [(5,), (3, 4), (3, 2, 3)]


def streams(shape, rows=7, targets=None, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda n: rng.normal(size=(n, *shape))  # noqa: E731
    return draw(rows), draw(targets or rows), draw(targets or rows)


CASES = {
    "v9": (sigprop.loss.v9_input_target_max_all, oracle.v9),
    "v14 first": (Contrast("max_first"), oracle.v14_first),
    # without ties the lot has one ticket
    "v14": (sigprop.loss.v14_input_target_max_rand, oracle.v14_first),
    "v15": (sigprop.loss.v15_input_target_topk(topk=3), lambda h, t, t0: oracle.v15(h, t, t0, 3)),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_equal_float64(name, shape):
    loss, expected = CASES[name]
    h1, t1, t0 = streams(shape)
    H, T = torch.tensor(h1, requires_grad=True), torch.tensor(t1, requires_grad=True)
    value = loss(None, H, T, None, torch.tensor(t0), torch.zeros(7))
    assert value.item() == pytest.approx(expected(h1, t1, t0), rel=1e-12)
    value.backward()
    rng = np.random.default_rng(1)
    for gradient, f, x in (
        (H.grad, lambda z: expected(z, t1, t0), h1),
        (T.grad, lambda z: expected(h1, z, t0), t1),
    ):
        direction = rng.normal(size=x.shape)
        assert (gradient.numpy() * direction).sum() == pytest.approx(
            oracle.slope(f, x, direction), rel=1e-6
        )


@pytest.mark.parametrize("shape", SHAPES)
def test_v1_classifies_by_targets_of_classes(shape):
    h1, t1, _ = streams(shape, rows=9, targets=4)
    labels = np.array([0, 1, 2, 3, 0, 1, 2, 3, 3])
    value = sigprop.loss.v1_input_label_direct(
        None, torch.tensor(h1), torch.tensor(t1), None, None, torch.tensor(labels)
    )
    assert value.item() == pytest.approx(oracle.v1(h1, t1, labels), rel=1e-12)


def test_v9_minimum_is_the_mean_of_m_log_m():
    # 64 samples of 10 classes, perfectly told apart: what is left is the entropy among m equal
    # partners.
    labels = torch.arange(64) % 10
    onehot = torch.nn.functional.one_hot(labels, 10).double()
    m = torch.bincount(labels)[labels].double()
    value = sigprop.loss.v9_input_target_max_all(None, 1e3 * onehot, onehot, None, onehot, labels)
    assert value.item() == pytest.approx((m * m.log()).mean().item(), rel=1e-9)
    normalised = Contrast(normalize=True)(None, 1e3 * onehot, onehot, None, onehot, labels)
    assert normalised.item() == pytest.approx(m.log().mean().item(), rel=1e-9)


def test_v14_draws_among_equal_partners_at_random():
    onehot = torch.eye(2)[[0, 0, 0, 1]]
    drawn = torch.stack([partners(onehot, "max_rand") for _ in range(300)])
    assert (drawn.sum(2) == 1).all()
    frequency = drawn.mean(0)
    assert (
        torch.allclose(frequency[0, :3], torch.full((3,), 1 / 3), atol=0.12)
        and frequency[0, 3] == 0
    )
    assert (frequency[3] == torch.tensor([0.0, 0, 0, 1])).all()
    a, b = (
        partners(onehot, "max_rand", generator=torch.Generator().manual_seed(5)) for _ in range(2)
    )
    assert torch.equal(a, b)


def test_ties_survive_rounding():
    # Rows that are equal but for their last bits: all of a class must stay partners.
    labels = torch.arange(60) % 3
    t0 = torch.nn.functional.normalize(torch.randn(3, 50), dim=1)[labels]
    noisy = t0 * (1 + 5e-7 * torch.randn(60, 1))
    g = similarity(noisy, noisy)
    assert (g == g.amax(1, keepdim=True)).sum() < 60 * 20  # equality alone would lose them
    assert torch.equal(partners(noisy).bool(), labels[:, None] == labels)


def hub_streams():
    """Targets of deep layers: the rows of class 0 have a large norm."""
    torch.manual_seed(0)
    labels = torch.arange(40) % 4
    t0 = (torch.randn(4, 16).relu() * torch.tensor([9.0, 1, 1, 1])[:, None])[labels]
    return t0, labels, labels[:, None] == labels[None]


def test_partners_by_label_do_not_drift_to_wrong_classes():
    t0, labels, same = hub_streams()
    wrong = lambda w: (w.bool() & ~same).sum().item()  # noqa: E731
    assert wrong(partners(t0)) > 0
    assert wrong(partners(t0, by="cosine")) == 0
    assert torch.equal(partners(t0, by="label", labels=labels).bool(), same)
    for mode in ("max_rand", "max_first"):
        w = partners(t0, mode, by="label", labels=labels)
        assert wrong(w) == 0 and (w.sum(1) == 1).all()


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_partners_behind_random_layers(dropout):
    """Where the paper's rule drifts (random ReLU layers) or loses its ties (dropout), the label's
    does not."""
    labels = torch.arange(100) % 10
    same = labels[:, None] == labels[None]
    t = torch.randn(10, 64)[labels]
    for _ in range(2):
        t = torch.nn.functional.dropout(torch.nn.Linear(64, 64)(t).relu().detach(), dropout)
    product = partners(t).bool()
    assert (product & ~same).any()
    assert (product.sum(1).float().mean() < 2) == (dropout > 0), (
        "ten partners each without dropout, one or two with it"
    )
    assert torch.equal(partners(t, by="label", labels=labels).bool(), same)


def test_topk_by_label_takes_no_wrong_class_to_fill_up():
    t0, labels, same = hub_streams()
    w = partners(t0, "topk", k=15, by="label", labels=labels)
    assert torch.equal(w.bool(), same)  # ten of a class, fifteen wanted
    assert (partners(t0, "topk", k=15).sum(1) == 15).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 6), st.integers(6, 20), st.integers(0, 1000))
def test_one_target_per_class_with_counts_equals_one_per_sample(classes, rows, seed):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (rows,), generator=g)
    h1, t1, t0 = (
        torch.randn(n, 5, dtype=torch.double, generator=g) for n in (rows, classes, classes)
    )
    per_class = Contrast(counts=True)
    owner = type("Owner", (), {"class_rows": True})()
    a = per_class(owner, h1, t1, None, t0, labels)
    b = sigprop.loss.v9_input_target_max_all(None, h1, t1[labels], None, t0[labels], labels)
    assert torch.allclose(a, b)


def test_class_rows_are_told_apart_from_samples_when_both_are_as_many():
    # Four samples, four classes: only the signal can say what the target rows are.
    h1, t1, t0 = torch.randn(4, 5), torch.randn(4, 5), torch.eye(4)
    labels = torch.tensor([3, 3, 0, 1])
    owner = type("Owner", (), {"class_rows": True})()
    loss = sigprop.loss.v9_input_target_max_all
    expected = torch.nn.functional.cross_entropy(h1 @ t1.T, labels)
    assert torch.allclose(loss(owner, h1, t1, None, t0, labels), expected)
    assert not torch.allclose(loss(None, h1, t1, None, t0, labels), expected)


def test_classes_as_partners_by_label_are_cross_entropy():
    h1, t1, t0 = map(torch.tensor, streams((6,), targets=3))
    labels = torch.arange(7) % 3
    expected = torch.nn.functional.cross_entropy(2 * h1 @ t1.T, labels)
    for mode in ("max_all", "max_first", "max_rand"):
        assert torch.allclose(
            Contrast(mode, by="label", temperature=0.5)(None, h1, t1, None, t0, labels), expected
        )
    present = torch.bincount(labels)
    counted = Contrast(by="label", counts=True)(None, h1, t1, None, t0, labels)
    assert torch.allclose(
        counted,
        sigprop.loss.v9_input_target_max_all(
            None, h1, t1[labels], None, torch.eye(3)[labels], labels
        ),
    )
    assert present.sum() == 7


def test_options_temperature_and_cosine():
    h1, t1, t0 = map(torch.tensor, streams((6,)))
    value = Contrast(cosine=True, temperature=0.1)(None, h1, t1, None, t0, None)
    unit = [torch.nn.functional.normalize(x, dim=1) for x in (h1, t1)]
    expected = sigprop.loss.v9_input_target_max_all(None, 10 * unit[0], unit[1], None, t0, None)
    assert torch.allclose(value, expected)


def test_keep_permutation_leaves_the_loss():
    h1, t1, t0 = map(torch.tensor, streams((3, 4)))
    order = torch.randperm(7)
    for loss, _ in CASES.values():
        assert torch.allclose(
            loss(None, h1, t1, None, t0, None),
            loss(None, h1[order], t1[order], None, t0[order], None),
        )


def test_sums_do_not_overflow_half_precision():
    h = torch.full((2, 300), 30.0, dtype=torch.float16)
    assert similarity(h, h).dtype == torch.float32 and similarity(h, h).isfinite().all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert similarity(h.float(), h.float()).dtype == torch.float32


def test_labels_in_every_form():
    y = torch.tensor([2, 0, 1])
    for form in (y, y[:, None], y.float()[:, None], torch.eye(3)[y]):
        assert torch.equal(labels_of(form), y)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: partners(torch.eye(4), "topk", k=5), "k=5 partners but there are only 4"),
        (lambda: partners(torch.eye(4), "topk", k=0), "k >= 1"),
        (lambda: partners(torch.eye(4), "nearest"), "mode is one of"),
        (lambda: partners(torch.eye(4), by="label"), "pass labels="),
        (
            lambda: similarity(torch.ones(2, 3), torch.ones(2, 4)),
            r"input rows have shape \[3\], target rows \[4\]",
        ),
        (lambda: contrast(torch.ones(2, 3), torch.ones(3, 2)), "same shape"),
        (lambda: labels_of(None), "context is None"),
        (lambda: labels_of(torch.ones(2, 3, 4)), "expected class numbers"),
        (lambda: labels_of(torch.ones(2), 3), "3 input rows but 2 labels"),
        (lambda: Contrast("topk"), "k belongs to mode"),
        (lambda: Contrast("max_all", k=3), "k belongs to mode"),
        (lambda: Contrast(temperature=0.0), "temperature must be positive"),
        (lambda: Contrast("max_rand", counts=True), "counts stands for"),
        (lambda: sigprop.loss.v15_input_target_topk(2.5), "whole number"),
        (lambda: sigprop.loss.v15_input_target_topk(), "say once how many partners"),
        (lambda: sigprop.loss.v15_input_target_topk(3, topk=3), "got k=3 and topk=3"),
        (
            lambda: sigprop.loss.v1_input_label_direct(
                None, torch.ones(2, 3), torch.ones(4, 3), None, None, torch.tensor([0, 4])
            ),
            "do not index the 4 target rows",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
