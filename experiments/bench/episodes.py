"""Batches of few-shot tasks per second: `Episodes`, against the same tasks built sample by sample
as a dataset and a collate do.

    # 8 tasks, 5-way 1-shot, images of random bytes
    python -m experiments.bench.episodes --rounds 5

The two take turns in one process and one thread. Images are random: what they show does not matter
here.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from ..meta.episodes import Batch, Classes, Episodes
from ..training.flags import plain_command_line
from .machine import describe

OMNIGLOT_CLASSES = 1028


class OneByOne:
    """The baseline: every class and sample drawn and converted on its own, then stacked, as
    torchmeta's datasets do."""

    def __init__(self, stream: Episodes) -> None:
        self.stream, self.generator = stream, np.random.default_rng(0)

    def draw(self) -> Batch:
        s, sides = self.stream, {"train": [], "test": []}
        for _ in range(s.batch_size):
            chosen = {"train": [], "test": []}
            for one in self.generator.choice(len(s.images), s.ways, replace=False):
                order = self.generator.permutation(s.images.shape[1])
                for side, picked in (
                    ("train", order[: s.shots]),
                    ("test", order[s.shots : s.shots + s.shots_test]),
                ):
                    chosen[side] += [
                        torch.from_numpy(s.images[one, sample]).float().div(255)
                        for sample in picked
                    ]
            for side, samples in chosen.items():
                sides[side].append(torch.stack(samples))
        return {side: (torch.stack(tasks), s.labels[side].clone()) for side, tasks in sides.items()}


def rate(draw: Callable[[], Batch], seconds: float) -> float:
    """Batches per second of processor time."""
    count, started = 0, time.process_time()
    while time.process_time() - started < seconds:
        draw()
        count += 1
    return count / (time.process_time() - started)


def main(argv: list[str] | None = None) -> list[tuple[float, float]]:
    arguments = plain_command_line("bench.episodes", __doc__)
    arguments.add_argument("--rounds", type=int, default=5, help="measurements of each (default 5)")
    arguments.add_argument(
        "--seconds",
        type=float,
        default=1.0,
        help="of processor time, per round and side (default 1)",
    )
    args = arguments.parse_args(argv)
    torch.set_num_threads(1)
    images = np.random.default_rng(0).integers(
        256, size=(OMNIGLOT_CLASSES, 20, 28, 28), dtype=np.uint8
    )
    ours = Episodes(Classes(images), ways=5, shots=1, shots_test=1, batch_size=8, seed=0)
    baseline = OneByOne(ours)
    ours.draw(), baseline.draw()
    rounds = [
        (rate(ours.draw, args.seconds), rate(baseline.draw, args.seconds))
        for _ in range(args.rounds)
    ]
    ratios = [a / b for a, b in rounds]
    print(describe())
    print(
        f"8 tasks of 5 ways, 1 shot: {statistics.median(a for a, _ in rounds):.0f} batches/s of "
        "processor time, one by one "
        f"{statistics.median(b for _, b in rounds):.0f}; ratio {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f} over {args.rounds} rounds)"
    )
    return rounds


if __name__ == "__main__":
    main()
