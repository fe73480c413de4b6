"""Batches of few-shot tasks from memory, in the form of torchmeta: {"train": (x [t b d], y [t b]),
"test": (x, y)}.

t tasks, b = ways · shots samples in the order of their classes. A batch is drawn with a few calls
of the generator and gathered from one array; torchmeta builds every task from Python objects. Any
loader that yields this form can take the place of `Episodes`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Batch = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Classes:
    """Images of many classes, uint8 [classes samples h w]; `rotations`: each turned by 90, 180 and
    270° is a class of its own."""

    images: np.ndarray
    rotations: bool = True

    @property
    def count(self) -> int:
        return len(self.images) * (4 if self.rotations else 1)

    @property
    def features(self) -> int:
        return int(np.prod(self.images.shape[2:]))

    def flat(self) -> np.ndarray:
        """All classes as vectors, uint8 [count samples d]."""
        turned = [np.rot90(self.images, k, (2, 3)) for k in range(4 if self.rotations else 1)]
        return np.concatenate(turned).reshape(self.count, self.images.shape[1], -1)


class Episodes:
    """An endless stream of batches of classification tasks; `state` and `load_state` resume it
    anywhere.

    Args:
        classes: what tasks are made of; ways, shots: classes of a task, and support samples of
        each; shots_test: query samples.
        batch_size: tasks in a batch. ink: pixels are how black they are (paper 0, ink 1) instead of
        how white.
    """

    def __init__(
        self,
        classes: Classes,
        ways: int,
        shots: int,
        shots_test: int,
        batch_size: int,
        seed: int,
        ink: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        samples = classes.images.shape[1]
        for name, value in (
            ("ways", ways),
            ("shots", shots),
            ("shots_test", shots_test),
            ("batch_size", batch_size),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if ways > classes.count:
            raise ValueError(
                f"tasks of {ways} ways were asked for, the data have {classes.count} classes only"
            )
        if shots + shots_test > samples:
            raise ValueError(
                f"{shots} support and {shots_test} query samples of a class were asked for, the "
                f"data have {samples}"
            )
        self.ways, self.shots, self.shots_test = ways, shots, shots_test
        self.batch_size, self.dtype = batch_size, dtype
        self.features, self.seed = classes.features, seed
        self.images = classes.flat()
        # A table of what a byte means: cheaper than arithmetic on every batch.
        values = np.arange(256, dtype=np.float32) / 255
        self.values = torch.from_numpy(1 - values if ink else values).to(dtype)
        labels = torch.arange(ways)
        self.labels = {
            "train": labels.repeat_interleave(shots).repeat(batch_size, 1),
            "test": labels.repeat_interleave(shots_test).repeat(batch_size, 1),
        }
        self.restart()

    def restart(self) -> None:
        """Begin again from the seed: the same tasks as the first time."""
        self.generator = np.random.default_rng(self.seed)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self.draw()

    def draw(self) -> Batch:
        """The next batch."""
        count, samples = self.images.shape[:2]
        # [t ways]
        chosen = self._without_repeats(count)
        # [t ways samples]
        order = self.generator.random(
            (self.batch_size, self.ways, samples), dtype=np.float32
        ).argsort(2)
        return {
            side: (self._gather(chosen, order[:, :, begin:end]), self.labels[side].clone())
            for side, begin, end in (
                ("train", 0, self.shots),
                ("test", self.shots, self.shots + self.shots_test),
            )
        }

    def _without_repeats(self, count: int) -> np.ndarray:
        """Classes of each task, all different: [t ways]."""
        chosen = self.generator.integers(count, size=(self.batch_size, self.ways))
        for task, row in enumerate(chosen):
            if len(set(row.tolist())) < self.ways:
                chosen[task] = self.generator.choice(count, self.ways, replace=False)
        return chosen

    def _gather(self, chosen: np.ndarray, samples: np.ndarray) -> Tensor:
        picked = torch.from_numpy(self.images[chosen[:, :, None], samples])  # [t ways shots d]
        return self.values[picked.int()].flatten(1, 2)

    def state(self) -> dict[str, Any]:
        return self.generator.bit_generator.state

    def load_state(self, state: dict[str, Any]) -> None:
        self.generator.bit_generator.state = state


class Sinusoids:
    """An endless stream of regression tasks y = a sin(x − φ): x ∈ [−5, 5], a ∈ [0.1, 5], φ ∈ [0,
    π].

    Source: Finn, Abbeel & Levine 2017, section 5.1.
    """

    features = 1

    def __init__(
        self,
        shots: int,
        shots_test: int,
        batch_size: int,
        seed: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        for name, value in (
            ("shots", shots),
            ("shots_test", shots_test),
            ("batch_size", batch_size),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.shots, self.shots_test = shots, shots_test
        self.batch_size, self.seed, self.dtype = batch_size, seed, dtype
        self.restart()

    def restart(self) -> None:
        """Begin again from the seed: the same tasks as the first time."""
        self.generator = np.random.default_rng(self.seed)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self.draw()

    def draw(self) -> Batch:
        """The next batch."""
        draw = self.generator.uniform
        amplitude, phase = (
            draw(0.1, 5, (self.batch_size, 1, 1)),
            draw(0, np.pi, (self.batch_size, 1, 1)),
        )
        batch = {}
        for side, count in (("train", self.shots), ("test", self.shots_test)):
            x = draw(-5, 5, (self.batch_size, count, 1))
            batch[side] = (
                torch.from_numpy(x).to(self.dtype),
                torch.from_numpy(amplitude * np.sin(x - phase)).to(self.dtype),
            )
        return batch

    state, load_state = Episodes.state, Episodes.load_state


class Epochs:
    """A stream of batches cut into epochs of `size`; after an interruption an epoch gives what is
    left of it.

    `same`: the stream begins again with every epoch. A loader of yours that ends early is an error.
    """

    def __init__(self, stream: Iterable[Batch], size: int, same: bool = False) -> None:
        self.stream, self.size, self.same = stream, size, same
        self.done = 0

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[tuple[Batch]]:
        if self.same and not self.done:
            self.stream.restart()
        for batch in self.stream:
            self.done += 1
            yield (batch,)
            if self.done >= self.size:
                break
        if self.done < self.size:
            raise ValueError(
                f"the loader ended after {self.done} batches, --num-batches is {self.size}"
            )
        self.done = 0

    def state(self) -> dict[str, Any] | None:
        """Where the stream stands; that of a foreign loader is not known."""
        return self.stream.state() if hasattr(self.stream, "state") else None

    def load_state(self, state: dict[str, Any] | None, done: int) -> None:
        self.done = done
        if state is not None:
            self.stream.load_state(state)
