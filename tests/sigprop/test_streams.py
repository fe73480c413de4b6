"""Two streams in one block: one call equals two, and statistics of one stream never enter the
other."""

import pytest
import torch
from torch import nn

from pilimit_lib import core
from pilimit_lib.sigprop import streams


def conv():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)
    ).double()


def images(rows):
    return torch.randn(rows, 3, 6, 6).double()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("targets", [8, 3])
def test_one_call_equals_two(training, targets):
    h, t = images(8), 5 + images(targets)
    results, norms = [], []
    for fuse in (True, False):
        module = conv().train(training)
        results.append(streams.run_both(module, h, t, fuse))
        norms.append(module[1].state_dict())
    for a, b in zip(*results):
        assert torch.allclose(a, b, rtol=1e-10)
    assert all(torch.allclose(norms[0][k].double(), norms[1][k].double()) for k in norms[0])


def test_gradients_of_one_call_equal_two():
    h, t = images(8), 5 + images(3)
    gradients = []
    for fuse in (True, False):
        module = conv()
        h1, t1 = streams.run_both(module, h, t, fuse)
        (h1.square().sum() + (t1**3).sum()).backward()
        gradients.append([p.grad for p in module.parameters()])
    for a, b in zip(*gradients):
        assert torch.allclose(a, b, rtol=1e-8)


@pytest.mark.parametrize("fuse", [True, False])
def test_running_statistics_belong_to_the_input_stream(fuse):
    norm = nn.BatchNorm1d(2)
    h1, t1 = streams.run_both(norm, torch.zeros(6, 2), 10 + torch.randn(6, 2), fuse)
    assert torch.equal(norm.running_mean, torch.zeros(2)) and norm.num_batches_tracked == 1
    assert t1.mean(0).abs().max() < 1e-5  # normalised by its own rows
    assert norm.training and norm.track_running_stats and "forward" not in norm.__dict__


def test_targets_are_normalised_alike_in_training_and_evaluation():
    norm, t = nn.BatchNorm1d(2), 10 + torch.randn(6, 2)
    for fuse in (True, False):
        outs = [
            streams.run_both(norm.train(mode), torch.zeros(4, 2), t, fuse)[1]
            for mode in (True, False)
        ]
        assert torch.allclose(*outs)


def test_what_counts_as_rowwise():
    assert streams.rowwise(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.LSTM(2, 3, batch_first=True))
    )

    class AcrossRows(nn.Module):
        def forward(self, x):
            return x - x.mean(0)

    module = nn.Sequential(nn.Linear(3, 3), AcrossRows())
    assert (
        not streams.rowwise(module)
        and not streams.rowwise(nn.Softmax(dim=0))
        and not streams.rowwise(conv())
    )
    h, t = torch.randn(5, 3), 9 + torch.randn(4, 3)
    h1, t1 = streams.run_both(module, h, t)  # "auto" must not join them
    assert torch.allclose(h1, module(h)) and torch.allclose(t1, module(t))


def test_rows_must_stay_rows():
    with pytest.raises(ValueError, match="dimension 0 must stay the rows"):
        streams.run_both(nn.Flatten(0), torch.ones(2, 3), torch.ones(2, 3), True)
    with pytest.raises(TypeError, match="returned tuple"):
        streams.run(nn.Sequential(nn.LSTM(2, 2, batch_first=True)), torch.ones(1, 2, 2))


class WhoIsThere(nn.Module):
    """Remembers which samples it was told of."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(core.current_ids(len(x)))
        return x


@pytest.mark.parametrize("fuse", [True, False])
def test_target_rows_of_samples_carry_their_ids_and_rows_of_classes_none(fuse):
    ids = torch.tensor([7, 3, 5, 9])
    with core.batch(ids):
        module = WhoIsThere()
        streams.run_both(module, torch.ones(4, 2), torch.ones(4, 2), fuse)
        assert torch.cat(module.seen).tolist() == [7, 3, 5, 9] * 2
        module = WhoIsThere()
        streams.run_both(module, torch.ones(4, 2), torch.ones(3, 2), fuse)
        assert [s if s is None else s.tolist() for s in module.seen] == (
            [None] if fuse else [[7, 3, 5, 9], None]
        )
        assert core.current_ids().tolist() == ids.tolist()


@pytest.mark.parametrize("fuse", [True, False])
def test_one_target_row_is_evaluated_by_the_running_statistics(fuse):
    norm = nn.BatchNorm1d(2)
    norm(3 + torch.randn(50, 2))
    t = torch.randn(1, 2)
    _, t1 = streams.run_both(norm.eval(), torch.randn(4, 2), t, fuse)
    assert torch.allclose(t1, norm(t))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        streams.run_both(norm.train(), torch.randn(4, 2), t, fuse)
