"""A fit on 1.2 million samples, whose kernel would take 5.8 TB in float32: time and peak memory.

    python -m experiments.tabular.million                 # samples lie in a file, fit reads batches
    python -m experiments.tabular.million --chunks        # never on the disk: partial_fit

Synthetic regression (`y` is a two-layer function of x plus noise of deviation .1), generated in
chunks.
"""

from __future__ import annotations

import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pilimit_lib.inf.estimators import PiRegressor

from ..training.flags import plain_command_line

D, CHUNK, NOISE = 32, 50_000, 0.1


def chunks(samples: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(x [b D], y [b]) in float32."""
    inner = np.random.RandomState(0).randn(D, 8) / D**0.5
    random = np.random.RandomState(seed)
    for start in range(0, samples, CHUNK):
        x = random.randn(min(CHUNK, samples - start), D)
        h = x @ inner
        y = np.maximum(h[:, :4], 0).sum(1) * 0.7 + np.sin(2 * h[:, 4]) + h[:, 5] * h[:, 6]
        yield x.astype(np.float32), (y + NOISE * random.randn(len(x))).astype(np.float32)


def in_files(folder: Path, samples: int) -> tuple[np.ndarray, np.ndarray]:
    X = np.lib.format.open_memmap(folder / "x.npy", "w+", np.float32, (samples, D))
    y = np.lib.format.open_memmap(folder / "y.npy", "w+", np.float32, (samples,))
    start = 0
    for some, targets in chunks(samples, 1):
        X[start : start + len(some)], y[start : start + len(some)] = some, targets
        start += len(some)
    return X, y


def main() -> None:
    parser = plain_command_line("tabular.million", __doc__)
    parser.add_argument("--samples", type=int, default=1_200_000, help="rows (default 1200000)")
    parser.add_argument("--epochs", type=int, default=2, help="passes (default 2)")
    parser.add_argument("--r", type=int, default=24, help="rank (default 24)")
    parser.add_argument("--chunks", action="store_true", help="partial_fit of chunks, one epoch")
    options = parser.parse_args()
    learner = PiRegressor(
        options.r,
        max_epochs=options.epochs,
        batch_size=512,
        learning_rate=0.01,
        random_state=0,
        verbose=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        before, began, used = _peak(), time.perf_counter(), time.process_time()
        if options.chunks:
            for X, y in chunks(options.samples, 1):
                learner.partial_fit(X, y)
        else:
            learner.fit(*in_files(Path(folder), options.samples))
        wall, processor, peak = time.perf_counter() - began, time.process_time() - used, _peak()
    X, y = next(chunks(20_000, 2))
    bound = 1 - NOISE**2 / y.var()
    how = "partial_fit" if options.chunks else f"fit, {options.epochs} epochs"
    print(
        f"{options.samples:,} samples x {D} ({how}, r={options.r}): {wall:.0f} s, of the processor "
        f"{processor:.0f} s; peak memory {peak:.0f} MB, {before:.0f} MB before; "
        f"R² {learner.score(X, y):.4f} of at most {bound:.4f}"
    )
    print(f"the kernel matrix alone would be {4 * options.samples**2 / 1e12:.1f} TB in float32")
    if not options.chunks:
        mean, std = learner.predict(X, return_std=True)
        inside = np.mean(np.abs(mean - y) < 2 * std)
        print(f"{100 * inside:.1f} % of new samples within 2 deviations")


def _peak() -> float:
    """MB of memory that this process has held at most. (Mapped pages of the files count.)"""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
