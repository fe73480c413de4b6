"""Who is served: ids under shuffling and workers, denial in the middle of an epoch, positions to
come back to."""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset, WeightedRandomSampler

from pilimit_lib.lab import LabLoader, TrackedDataset


class Jittered(Dataset):
    """Item i is i and three random draws, one from each generator that transforms use."""

    def __len__(self):
        return 50

    def __getitem__(self, i):
        return torch.tensor(
            [float(i), float(torch.rand(1)), random.random(), np.random.rand()], dtype=torch.float64
        )


def loader(workers=0, **options):
    return LabLoader(
        TrackedDataset(Jittered()),
        8,
        num_workers=workers,
        **{"shuffle": True, "seed": 3, **options},
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_ids_name_the_samples_and_an_epoch_serves_each_once(workers):
    source = loader(workers)
    orders = []
    for _ in range(2):
        served = []
        for batch in source:
            assert batch[:, 0].long().tolist() == source.ids.tolist()
            served.extend(source.ids.tolist())
        assert sorted(served) == list(range(50))
        orders.append(served)
    assert orders[0] != orders[1] and len(source) == 7


@pytest.mark.parametrize("workers", [0, 2])
def test_denied_samples_are_never_served_in_the_middle_of_an_epoch_either(workers):
    source = loader(workers)
    rest = source.order().tolist()
    batches = iter(source)
    first = next(batches)[:, 0].long().tolist()
    denied = rest[8:20] + rest[:3]  # among them what workers have fetched already
    source.dataset.denylist_samples(denied)
    served = [i for batch in batches for i in batch[:, 0].long().tolist()]
    assert first == rest[:8] and served == [i for i in rest[8:] if i not in denied]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_stay_full_after_a_denial(workers):
    source = loader(workers)
    batches = iter(source)
    next(batches)
    source.dataset.denylist_samples(source.order()[9:12])
    assert [len(batch) for batch in batches] == [8, 8, 8, 8, 7]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shuffle", [True, False])
def test_going_on_from_a_position_equals_never_having_stopped(workers, shuffle):
    whole, twin = loader(workers, shuffle=shuffle), loader(workers, shuffle=shuffle, seed=99)
    for source in (whole,):
        for _ in range(10):
            source.next_batch()
    state, generators = (
        whole.state(),
        (torch.get_rng_state(), random.getstate(), np.random.get_state()),
    )
    expected = [whole.next_batch() for _ in range(9)]
    twin.load_state(state)
    (
        torch.set_rng_state(generators[0]),
        random.setstate(generators[1]),
        np.random.set_state(generators[2]),
    )
    for batch in expected:
        assert torch.equal(batch, twin.next_batch())


def test_serving_spends_no_randomness_of_the_model():
    before = torch.get_rng_state()
    source = LabLoader(
        TrackedDataset(TensorDataset(torch.arange(20.0))), 4, shuffle=True, num_workers=2
    )
    list(source)
    assert torch.equal(before, torch.get_rng_state())


def test_a_users_loader_keeps_its_batches():
    torch.manual_seed(0)
    data = TensorDataset(torch.arange(30.0))
    collate = lambda items: torch.stack([item[0] for item in items]) * 2  # noqa: E731
    plain = DataLoader(data, batch_size=7, collate_fn=collate)
    ours = LabLoader.of(plain)
    assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))
    assert LabLoader.of(DataLoader(data, 7, shuffle=True)).shuffle
    weighted = LabLoader.of(
        DataLoader(data, 7, sampler=WeightedRandomSampler([1.0] * 10 + [0.0] * 20, 25))
    )
    first = weighted.next_batch()
    state = weighted.state()
    rest = [batch[0] for batch in weighted]
    assert len(rest) == 3 and all(int(x) < 10 for batch in [first[0], *rest] for x in batch)
    weighted.load_state(state)
    assert all(torch.equal(a, b[0]) for a, b in zip(rest, weighted, strict=True))


def test_loaders_that_cannot_be_watched_are_refused():
    data = TensorDataset(torch.arange(30.0))
    with pytest.raises(TypeError, match="DataLoader was expected"):
        LabLoader.of([1, 2])
    with pytest.raises(TypeError, match="batch_sampler"):
        LabLoader.of(DataLoader(data, batch_sampler=[[1, 2]]))
    for size in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="batch_size"):
            LabLoader(TrackedDataset(data), size)


def test_an_epoch_whose_rest_is_denied_ends():
    source = loader()
    source.next_batch()
    source.dataset.denylist_samples(source.order()[8:])
    assert source.next_batch()[:, 0].long().tolist() != [] and source.epoch == 1
    few = LabLoader(TrackedDataset(TensorDataset(torch.arange(5.0))), 8, drop_last=True)
    with pytest.raises(RuntimeError, match="no batch to serve"):
        few.next_batch()


def test_lengths_when_samples_are_denied():
    """As documented: ids are positions, so the data set keeps its length and the loader shrinks."""
    data = TrackedDataset(TensorDataset(torch.arange(100)))
    loader = LabLoader(data, 10)
    data.denylist_samples(range(35))
    assert (len(data), data.allowed, len(loader)) == (100, 65, 7)
    assert len(list(loader)) == 7
    data.allowlist_samples(None)
    assert (len(data), data.allowed, len(loader)) == (100, 100, 10)
