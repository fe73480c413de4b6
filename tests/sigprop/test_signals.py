"""Signals: formatters, generators and the drawn digits, with and without a context."""

import pytest
import torch
from torch import nn

from pilimit_lib import sigprop
from pilimit_lib.sigprop import functional, propagators, signals


def test_formatters_and_their_functions():
    y, h = torch.tensor([2, 0, 1, 2]), torch.ones(4, 5)
    onehot = torch.eye(3)[y]
    cases = [
        (signals.LabelNumberToOnehot(3), functional.signals.label_number_to_onehot, y, onehot),
        (
            signals.LabelNumberToOnehot(3),
            functional.signals.label_number_to_onehot,
            y[:, None],
            onehot,
        ),
        (
            signals.DistinctBatchLabelsOnehot(),
            functional.signals.distinct_batch_labels_onehot,
            onehot,
            torch.eye(3),
        ),
        (
            signals.DistinctBatchLabels(),
            functional.signals.distinct_batch_labels,
            onehot,
            torch.tensor([0.0, 1, 2]),
        ),
        (
            signals.LabelVectorToNumber(),
            functional.signals.label_vector_to_number,
            onehot,
            y[:, None].float(),
        ),
    ]
    for module, function, t, expected in cases:
        out_h, out = module((h, t))
        assert (
            out_h is h
            and torch.equal(out, expected)
            and out.dtype == expected.dtype
            and torch.equal(function(t), expected)
        )
        assert module((h, None))[1] is None and function(None) is None


def test_number_of_classes_may_follow_from_the_labels():
    assert signals.LabelNumberToOnehot()((None, torch.tensor([0, 4])))[1].shape == (2, 5)
    assert torch.equal(
        functional.signals.label_number_to_onehot(torch.tensor([0, 2])), torch.eye(3)[[0, 2]]
    )


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: signals.LabelNumberToOnehot(3)((None, torch.tensor([0, 3]))),
            "0 .. 2 for 3 classes, got values from 0 to 3",
        ),
        (
            lambda: signals.LabelNumberToOnehot(3)((None, torch.eye(4))),
            r"rows \[b 3\] for 3 classes, got \[4, 4\]",
        ),
        (
            lambda: signals.LabelNumberToOnehot(3)((None, torch.ones(2, 3, 1))),
            "must be class numbers",
        ),
        (
            lambda: signals.DistinctBatchLabelsOnehot()((None, torch.arange(3))),
            "put LabelNumberToOnehot before",
        ),
        (
            lambda: signals.ProjectionContext(nn.Linear(3, 4), (3,), (4,))(
                (None, torch.tensor([0, 1]))
            ),
            "has 1 numbers",
        ),
        (
            lambda: signals.ProjectionContext(nn.Linear(3, 5), (3,), (4,))((None, torch.eye(3))),
            "do not fit output_shape",
        ),
        (lambda: signals.FixedDrawContext(0), "at least one digit"),
        (
            lambda: signals.FixedDrawContext(2)((torch.ones(1, 1, 7, 13), torch.tensor([1]))),
            "2 digits of 7 x 7 do not fit",
        ),
        (
            lambda: signals.FixedDrawContext()((torch.ones(1, 1, 7, 7), torch.tensor([10]))),
            "digits show 0 .. 9, got numbers from 10",
        ),
        (
            lambda: signals.FixedDrawContext(1)((torch.ones(2, 5), torch.tensor([1, 2]))),
            "drawn into images",
        ),
        (
            lambda: signals.FixedDrawContext(1)((torch.ones(2, 1, 7, 7), torch.eye(2))),
            "put LabelVectorToNumber before",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_projections_with_and_without_context():
    context, image = nn.Linear(3, 8), nn.Conv2d(1, 2, 3, padding=1)
    both = signals.ProjectionContextInput(context, image, (3,), (2, 2, 2))
    x, t = torch.randn(4, 1, 2, 2), torch.eye(3)[[0, 1, 2, 0]]
    h1, t1, h0, t0 = both((x, t))
    assert (
        torch.equal(h1, image(x))
        and torch.equal(t1, context(t).view(4, 2, 2, 2))
        and h0 is x
        and t0 is t
    )
    assert both((x, None))[1] is None and torch.equal(both((x, None))[0], h1)
    one = signals.ProjectionContext(context, (3,), (8,))
    h1, t1, h0, t0 = one((x, t))
    assert h1 is x and torch.equal(t1, context(t)) and one((x, None))[1] is None
    # as DistinctBatchLabels gives them
    numbers = signals.ProjectionContext(nn.Linear(1, 8), (1,), (8,))
    assert numbers((x, torch.arange(3.0)))[1].shape == (3, 8)


@pytest.mark.parametrize(
    "cls, modules", [(signals.ProjectionContext, 1), (signals.ProjectionContextInput, 2)]
)
def test_fixed_projections_do_not_train(cls, modules):
    for fixed in (True, False):
        signal = cls(*[nn.Linear(3, 8) for _ in range(modules)], (3,), (8,), fixed=fixed)
        assert (
            all(p.requires_grad != fixed for p in signal.parameters())
            and len(list(signal.parameters())) == 2 * modules
        )


def test_every_digit_is_drawn_and_differs():
    for size in (7, 28):
        image = signals.FixedDrawContext()((torch.zeros(10, 1, size, size), torch.arange(10)))[1]
        assert image.shape == (10, 1, size, size)
        assert (image == 1).sum((1, 2, 3)).min() >= 7 and set(image.unique().tolist()) <= {
            -1.0,
            0.0,
            1.0,
        }
        assert len(image.flatten(1).unique(dim=0)) == 10
        assert (
            (image[:, :, :7, :7] != 0).all()
            and (image[:, :, 7:] == 0).all()
            and (image[..., 7:] == 0).all()
        )


def test_numbers_are_drawn_digit_by_digit_and_wrap_to_the_next_line():
    draw, single = signals.FixedDrawContext(3), signals.FixedDrawContext(1)
    cell = {d: single((torch.zeros(1, 1, 7, 7), torch.tensor([d])))[1][0, 0] for d in range(10)}
    image = draw((torch.zeros(1, 3, 14, 14), torch.tensor([[407.0]])))[1][0]
    for channel in image:
        assert torch.equal(channel[:7, :7], cell[4]) and torch.equal(channel[:7, 7:], cell[0])
        assert torch.equal(channel[7:, :7], cell[7]) and (channel[7:, 7:] == 0).all()
    # leading zeros, and exactly fitting
    line = draw((torch.zeros(1, 1, 7, 21), torch.tensor([5])))[1][0, 0]
    assert torch.equal(line, torch.cat([cell[0], cell[0], cell[5]], 1))
    assert draw((torch.zeros(1, 1, 7, 21), None))[1] is None


def test_a_network_learns_from_drawn_labels():
    net = sigprop.wrap(
        nn.Sequential(nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU()), nn.Linear(16, 3)),
        signal=signals.FixedDrawContext(),
        optimizer=lambda m: torch.optim.Adam(m.parameters(), 0.01),
    )
    assert isinstance(net.signal, propagators.signals.Fixed) and list(net.learners()) == ["model.0"]
    y = torch.arange(60) % 3
    x = torch.randn(3, 1, 8, 8)[y] + 0.3 * torch.randn(60, 1, 8, 8)
    for _ in range(60):
        net(x, y)
    assert (net.exits(x, num_classes=3)["model.0"].argmax(1) == y).float().mean() > 0.9


class NeedsContext(signals.Generator):
    def forward(self, input):
        h0, t0 = input
        return h0, t0.flatten(1), h0, t0


def test_a_generator_without_a_word_on_inference_says_what_to_do():
    with pytest.raises(
        ValueError, match="NeedsContext was called without a context.*context_optional = True"
    ):
        NeedsContext()((torch.ones(2, 3), None))
    named = NeedsContext()
    named.input_shape = (3,)
    h, t, h0, t0 = named((torch.ones(2, 3), None))
    assert torch.equal(h, torch.ones(2, 3)) and t is None and t0 is None


def test_usual_signal_in_one_call():
    x, y = torch.randn(6, 1, 4, 4), torch.arange(6) % 3
    sample = signals.project_labels(3, (2, 4, 4), nn.Conv2d(1, 2, 3, padding=1))
    assert [s.shape for s in sample((x, y))[:2]] == [(6, 2, 4, 4), (6, 2, 4, 4)]
    per_class = signals.project_labels(3, (1, 4, 4), per_class=True)
    assert per_class((x, y))[1].shape == (3, 1, 4, 4) and per_class((x, y))[0] is x
    assert not any(
        p.requires_grad for p in signals.project_labels(3, (4,), fixed=True).parameters()
    )
