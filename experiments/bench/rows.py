"""A full training step on exact rows, against the same step with rows appended by `torch.cat` (pilimit_orig).

    python -m experiments.bench.rows --save-dir output/bench_rows                     # about 10 minutes on 2 idle cores
    python -m experiments.bench.rows --sizes 20000 --ranks 100 --batches 8            # one cell

Both networks hold the same rows and take turns on the same batch in one process; reported is the median of the paired ratios of
wall times, so that whatever else the machine does hits both. Writes steps.csv, table.md and steps.png.
"""
from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from experiments.common import write_text
from pilimit_lib.inf import InfMLP, PiSGD, clip_grad_norm_
from pilimit_orig.inf.pimlp import InfPiMLP

LR, DECAY, CLIP, CLASSES = 1e-3, 1e-5, .4, 10


def pair(rows: int, rank: int, batch: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """(our step, the original's step) on networks that hold the same `rows` in a hidden layer and in the readout."""
    torch.manual_seed(0)
    ours = InfMLP(rank, CLASSES, rank, 1, bias_alpha=0)
    for layer in ours.layers[1:]:
        layer.set_rows(torch.randn(rows, layer.r_out), torch.randn(rows) * LR, F.normalize(torch.randn(rows, rank)))
    theirs = InfPiMLP(rank, CLASSES, 2, rank)  # counts the stages of ReLU units, so its 2 is our 1
    theirs.As[1] = ours.layers[0].A.detach().clone()
    for number, layer in enumerate(ours.layers[1:], 2):
        theirs.As[number], theirs.Bs[number], theirs.Amult[number] = (
            getattr(layer, name).blocks.dense() for name in ("A", "B", "Amult"))
    x, y = torch.randn(batch, rank), torch.randint(CLASSES, (batch,))
    optimizer = PiSGD(ours.parameters(), lr=LR, weight_decay=DECAY)

    def our_step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(ours(x), y).backward()
        clip_grad_norm_(ours, CLIP, per_param=True)
        optimizer.step()

    def their_step() -> None:
        theirs.zero_grad()
        theirs.backward(_delta(theirs(x), y))
        theirs.gclip(CLIP, per_param=True)
        theirs.step(LR, DECAY)

    return our_step, their_step


def _delta(output: Tensor, y: Tensor) -> Tensor:
    """∂(mean cross entropy)/∂output."""
    return (output.softmax(1) - F.one_hot(y, output.shape[1])) / len(y)


def measure(rows: int, rank: int, batch: int, rounds: int) -> dict[str, float]:
    """Wall times of `rounds` alternating steps after one to warm up: medians in ms, and the median of the paired ratios."""
    steps = pair(rows, rank, batch)
    times: list[list[float]] = []
    for turn in range(rounds + 1):
        times.append([])
        for step in (steps if turn % 2 else steps[::-1]):
            started = time.perf_counter()
            step()
            times[-1].append(1000 * (time.perf_counter() - started))
        if turn % 2 == 0:
            times[-1].reverse()
    frame = pd.DataFrame(times[1:], columns=["ours", "theirs"])
    ratio = frame["theirs"] / frame["ours"]
    return {"rows": rows, "rank": rank, "batch": batch, "ours_ms": frame["ours"].median(), "theirs_ms": frame["theirs"].median(),
            "ratio": ratio.median(), "ratio_low": ratio.min(), "ratio_high": ratio.max()}


def table(frame: pd.DataFrame) -> str:
    """The measurements as a Markdown table."""
    lines = ["| rows | r | b | pilimit_orig ms | ours ms | ratio (lowest – highest) |", "|---|---|---|---|---|---|"]
    for cell in frame.itertuples():
        lines.append(f"| {cell.rows:,} | {cell.rank} | {cell.batch} | {cell.theirs_ms:.1f} | {cell.ours_ms:.1f} | "
                     f"{cell.ratio:.2f} ({cell.ratio_low:.2f} – {cell.ratio_high:.2f}) |")
    return "\n".join(lines) + "\n"


def draw(frame: pd.DataFrame, path: Path) -> None:
    import seaborn as sns
    from matplotlib.figure import Figure
    frame = frame.assign(network=[f"{cell.rows // 1000}k rows\nr = {cell.rank}" for cell in frame.itertuples()])
    with sns.axes_style("whitegrid"):
        figure = Figure(figsize=(5.6, 3.4), layout="constrained")
        axis = figure.subplots()
        sns.barplot(frame, x="network", y="ratio", hue="batch", palette="crest", ax=axis)
        axis.axhline(1, color="0.3", linewidth=1)
        axis.set(xlabel=None, ylabel="times faster than torch.cat rows")
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> pd.DataFrame:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[20_000, 200_000], help="numbers of rows")
    parser.add_argument("--ranks", type=int, nargs="+", default=[100, 400])
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 128])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save-dir", type=Path, default=Path("output/bench_rows"))
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    cells = [(m, r, b) for m in args.sizes for r in args.ranks for b in args.batches]
    frame = pd.DataFrame([measure(*cell, args.rounds) for cell in tqdm(cells, desc="cells")])
    args.save_dir.mkdir(parents=True, exist_ok=True)
    machine = f"torch {torch.__version__}, {args.threads} thread(s), {platform.machine()}\n\n"
    write_text(args.save_dir / "steps.csv", frame.to_csv(index=False))
    write_text(args.save_dir / "table.md", machine + table(frame))
    draw(frame, args.save_dir / "steps.png")
    print(machine + table(frame))
    return frame


if __name__ == "__main__":
    main()
