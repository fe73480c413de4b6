"""A loader that knows where in the epoch it stands, and never serves a denied sample.

The order of an epoch is a function of seed and epoch, so a position is one number: what continues
from it is what would have come. Batches that workers fetched ahead are dropped when the deny list
changes, and fetched again from that position.
"""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    RandomSampler,
    SequentialSampler,
    default_collate,
    get_worker_info,
)

from .dataset import TrackedDataset


class LabLoader:
    """Batches of a `TrackedDataset`, as the user's collate function makes them; `ids` names the
    samples of the last one.

    Iterating continues the epoch where it stands (at its start, unless a loop was left early or a
    checkpoint was loaded) and ends with it; `next_batch` goes on for ever. With workers, random
    transforms are seeded by sample and epoch.
    """

    def __init__(
        self,
        dataset: TrackedDataset,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        num_workers: int = 0,
        collate_fn: Callable | None = None,
        drop_last: bool = False,
        pin_memory: bool = False,
        sampler: Any = None,
    ) -> None:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r}: a positive integer was expected")
        if sampler is not None and not hasattr(sampler, "__len__"):
            raise TypeError(
                "the sampler has no length, so the loader could not know where in the epoch it "
                "stands"
            )
        self.dataset, self.batch_size = dataset, batch_size
        self.shuffle, self.seed = shuffle, seed
        self.num_workers, self.pin_memory = num_workers, pin_memory
        self.drop_last = drop_last
        self.collate = collate_fn or default_collate
        self.sampler = sampler
        self.epoch = 0
        self.position = 0  # how much of the epoch's order was served or passed over
        self.ids: Tensor | None = None
        self.on_batch: Callable[[bool], None] | None = None  # a batch is out (True), or done with
        self._order: np.ndarray | None = None
        self._stream: _Stream | None = None

    @classmethod
    def of(cls, loader: DataLoader, *, seed: int = 0) -> LabLoader:
        """The same batches as a user's DataLoader, with ids. A sampler of the user's is asked for
        its order once an epoch."""
        if not isinstance(loader, DataLoader):
            raise TypeError(f"a torch DataLoader was expected, got {type(loader).__name__}")
        if loader.batch_size is None or type(loader.batch_sampler).__name__ != "BatchSampler":
            raise TypeError(
                "a DataLoader with its own batch_sampler fixes its batches, so denied samples "
                "could not be left out; "
                "pass batch_size and sampler instead"
            )
        plain = (
            isinstance(loader.sampler, RandomSampler)
            and not loader.sampler.replacement
            and loader.sampler.num_samples == len(loader.dataset)
        )
        own = None if plain or isinstance(loader.sampler, SequentialSampler) else loader.sampler
        data = (
            loader.dataset
            if isinstance(loader.dataset, TrackedDataset)
            else TrackedDataset(loader.dataset)
        )
        return cls(
            data,
            loader.batch_size,
            shuffle=plain,
            seed=seed,
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            drop_last=loader.drop_last,
            pin_memory=loader.pin_memory,
            sampler=own,
        )

    def __len__(self) -> int:
        """Batches in a whole epoch, with the present deny list: it shrinks when samples are denied,
        while `len(loader.dataset)` stays, since ids are positions."""
        samples = self.dataset.allowed if self.sampler is None else len(self.sampler)
        return samples // self.batch_size if self.drop_last else -(-samples // self.batch_size)

    def order(self) -> np.ndarray:
        """Sample ids in the order of the current epoch, denied ones included."""
        if self._order is None:
            if self.sampler is not None:
                self._order = self.dataset.ledger.ids(list(self.sampler))
            elif self.shuffle:
                generator = torch.Generator().manual_seed(_mix(self.seed, self.epoch))
                self._order = torch.randperm(len(self.dataset), generator=generator).numpy()
            else:
                self._order = np.arange(len(self.dataset))
        return self._order

    def take(self, position: int) -> tuple[np.ndarray, int]:
        """The next allowed ids from `position` on, at most a batch of them, and the position behind
        them."""
        order, denied = self.order(), self.dataset.ledger["denied"]
        chosen: list[int] = []
        while position < len(order) and len(chosen) < self.batch_size:
            window = order[position : position + self.batch_size - len(chosen)]
            chosen.extend(window[~denied[window]].tolist())
            position += len(window)
        if self.drop_last and len(chosen) < self.batch_size:
            chosen = []
        return np.asarray(chosen, np.int64), position

    def __iter__(self) -> Iterator[Any]:
        while True:
            batch = self._advance()
            if batch is None:
                return
            self._tell(True)
            try:
                yield batch
            finally:
                self._tell(False)

    def _tell(self, served: bool) -> None:
        if self.on_batch is not None:
            self.on_batch(served)

    def next_batch(self) -> Any:
        """The next batch, in the next epoch if this one is over."""
        batch = self._advance()
        for _ in range(2):  # an epoch may end without a batch, if all that was left of it is denied
            if batch is None:
                batch = self._advance()
        if batch is None:
            raise RuntimeError(
                f"the loader has no batch to serve: {self.dataset.allowed} samples are allowed, "
                f"batch_size is {self.batch_size}, drop_last is {self.drop_last}"
            )
        self._tell(True)
        return batch

    def _advance(self) -> Any:
        if self.num_workers:
            if self._stream is None or self._stream.stale(self):
                self._stream = _Stream(self)
            ids, position, batch = self._stream.next() or (None, None, None)
        else:
            ids, position = self.take(self.position)
            batch = self.fetch(ids) if len(ids) else None
        if batch is None:
            self.reset(self.epoch + 1)
            return None
        self.position = position
        if self._stream is not None:
            self._stream.position = position
        self.ids = torch.from_numpy(ids)
        return batch

    def fetch(self, ids: np.ndarray) -> Any:
        """The batch of these samples, collated, in this process."""
        data, wanted = self.dataset.wrapped, [int(i) for i in ids]
        return self.collate(
            data.__getitems__(wanted)
            if hasattr(data, "__getitems__")
            else [data[i] for i in wanted]
        )

    def reset(self, epoch: int | None = None) -> None:
        """Go to the start of the current epoch, or of another one."""
        self.epoch = self.epoch if epoch is None else epoch
        self.position, self._order, self._stream = 0, None, None

    def state(self) -> dict:
        """Where it stands. A user's sampler cannot be asked for the same order twice, so its order
        is kept."""
        order = (
            torch.from_numpy(self._order.copy())
            if self.sampler is not None and self._order is not None
            else None
        )
        return {"epoch": self.epoch, "position": self.position, "seed": self.seed, "order": order}

    def check_state(self, state: dict) -> None:
        """Raise unless `state` is a place in an epoch of this loader."""
        numbers = [state["epoch"], state["position"], state["seed"]]
        order = range(len(self.dataset)) if state["order"] is None else state["order"].tolist()
        if any(type(number) is not int for number in numbers) or not 0 <= numbers[1] <= len(order):
            raise ValueError(
                f"epoch, position and seed of the loader are {numbers}, which is no place in an "
                f"order of {len(order)} samples"
            )
        self.dataset.ledger.ids(order)

    def load_state(self, state: dict) -> None:
        """Go to where `state` stood."""
        self.reset(state["epoch"])
        self.seed, self.position = state["seed"], state["position"]
        self._order = None if state["order"] is None else state["order"].numpy().copy()


class _Stream:
    """The rest of one epoch, fetched ahead by worker processes."""

    def __init__(self, loader: LabLoader) -> None:
        self.version, self.position = loader.dataset.ledger.version, loader.position
        self.plans: list[tuple[np.ndarray, int]] = []
        data = _Seeded(loader.dataset.wrapped, loader.seed)
        # An own generator: a new iterator draws a seed, which would otherwise come out of the
        # model's dropout.
        self.fetching = [
            iter(
                DataLoader(
                    data,
                    batch_sampler=_Ahead(weakref.ref(loader), self.plans),
                    collate_fn=loader.collate,
                    num_workers=loader.num_workers,
                    pin_memory=loader.pin_memory,
                    generator=torch.Generator(),
                )
            )
        ]
        # Collected as part of a cycle, torch's iterator waits five seconds for each worker; let go
        # of first, it does not.
        weakref.finalize(self, self.fetching.clear)

    def next(self) -> tuple[np.ndarray, int, Any] | None:
        batch = next(self.fetching[0], None)
        return None if batch is None else (*self.plans.pop(0), batch)

    def stale(self, loader: LabLoader) -> bool:
        return self.version != loader.dataset.ledger.version or self.position != loader.position


class _Ahead:
    """What the workers are to fetch next. It must not keep the loader alive, see above."""

    def __init__(self, loader: weakref.ref[LabLoader], plans: list) -> None:
        self.loader, self.plans = loader, plans

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        position = self.loader().position
        while (loader := self.loader()) is not None:
            ids, position = loader.take(position)
            if not len(ids):
                return
            self.plans.append((ids, position))
            keys = [(loader.epoch, int(i)) for i in ids]
            del loader
            yield keys


class _Seeded(Dataset):
    """Random transforms become a function of sample and epoch, so that neither workers nor
    prefetching decide them."""

    def __init__(self, wrapped: Dataset, seed: int) -> None:
        self.wrapped, self.seed = wrapped, seed

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        if get_worker_info() is not None:
            seed = _mix(self.seed, epoch, index)
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
        return self.wrapped[index]


def _mix(*parts: int) -> int:
    return int(
        np.random.SeedSequence([abs(int(part)) for part in parts]).generate_state(1, np.uint64)[0]
        >> np.uint64(1)
    )
