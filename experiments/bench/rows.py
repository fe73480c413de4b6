"""A full training step on exact rows, against the same step with rows appended by `torch.cat`
(pilimit_orig).

    # about 15 minutes on one core
    python -m experiments.bench.rows --save-dir output/bench_rows
    # one cell
    python -m experiments.bench.rows --sizes 20000 --ranks 100 --batches 8
    # twin:storage of rows
    python -m experiments.bench.rows --variants chunked:float32 native:bfloat16

Every cell is measured in a process of its own: memory that an allocator kept from earlier work
makes the baseline up to twice as fast as it is in a training run. There the networks hold the same
rows and take turns on the same batch; reported is the median of the ratios paired by round, so that
whatever else the machine does hits all. Times are CPU seconds of the process with one thread, wall
seconds otherwise. Beside them: the rate at which stored rows are read (each once forward and once
backward) as a fraction of the machine's measured copy bandwidth, the memory a step takes beyond its
rows, and errors of one π-layer against float64. Writes steps.csv, table.md and steps.png; finished
cells are kept, so that an interrupted run goes on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from pilimit_lib.core import write_text
from pilimit_lib.inf import InfMLP, InfPiLinearReLU, PiSGD, clip_grad_norm_
from pilimit_lib.inf.dual.relu import relu_k, relu_k_prime
from pilimit_lib.inf.implementation import implementation
from pilimit_orig.inf.pimlp import InfPiMLP

from ..training.flags import add_out, plain_command_line
from ..training.process import shows_bars
from .machine import describe

LR, DECAY, CLIP = 1e-3, 1e-5, 0.4
CLASSES = 10
VARIANTS = (
    "plain:float32",
    "chunked:float32",
    "chunked:bfloat16",
    "chunked:float16",
    "chunked:int8",
)
PROBES = 16  # samples whose outputs and gradients are compared with float64


@dataclass(frozen=True)
class Cell:
    """Rows in the hidden layer and in the readout, their rank, and the size of the batch."""

    rows: int
    rank: int
    batch: int


def baseline(cell: Cell, x: Tensor, y: Tensor) -> Callable[[], None]:
    """The original's step on rows drawn from a fixed seed."""
    # counts the stages of ReLU units, so its 2 is our 1
    theirs = InfPiMLP(cell.rank, CLASSES, 2, cell.rank)
    torch.manual_seed(1)
    for number, o in ((2, cell.rank), (3, CLASSES)):
        theirs.As[number], theirs.Amult[number], theirs.Bs[number] = drawn(cell, o)

    def step() -> None:
        theirs.zero_grad()
        output = theirs(x)
        theirs.backward((output.softmax(1) - F.one_hot(y, CLASSES)) / len(y))
        theirs.gclip(CLIP, per_param=True)
        theirs.step(LR, DECAY)

    return step


def ours(cell: Cell, x: Tensor, y: Tensor, variant: str) -> tuple[Callable[[], None], InfMLP]:
    """Our step on the same rows in the given storage, with the given twin; and the network."""
    twin, storage = variant.split(":")
    net = InfMLP(cell.rank, CLASSES, cell.rank, 1, bias_alpha=0, row_dtype=getattr(torch, storage))
    torch.manual_seed(1)
    for layer in net.layers[1:]:
        layer.set_rows(*drawn(cell, layer.r_out))
    optimizer = PiSGD(net.parameters(), lr=LR, weight_decay=DECAY)

    def step() -> None:
        optimizer.zero_grad()
        with implementation(rows=twin):
            F.cross_entropy(net(x), y).backward()
        clip_grad_norm_(net, CLIP, per_param=True)
        optimizer.step()

    return step, net


def drawn(cell: Cell, o: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(cell.rows, o),
        torch.randn(cell.rows) * LR,
        F.normalize(torch.randn(cell.rows, cell.rank)),
    )


def measure(cell: Cell, variants: list[str], rounds: int, clock: Callable[[], float]) -> list[dict]:
    """One record per variant: medians of times in ms, of paired ratios, and what else the head of
    this file names."""
    torch.manual_seed(0)
    x, y = torch.randn(cell.batch, cell.rank), torch.randint(CLASSES, (cell.batch,))
    nets = {variant: ours(cell, x, y, variant) for variant in variants}
    steps = {
        "pilimit_orig": baseline(cell, x, y),
        **{variant: step for variant, (step, _) in nets.items()},
    }
    # the first step also warms up
    extra = {name: extra_memory(step) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds):
        for name in steps if turn % 2 else reversed(steps):
            started = clock()
            steps[name]()
            times[name].append(1000 * (clock() - started))
    frame, bandwidth, records = pd.DataFrame(times), copy_bandwidth(clock), []
    for variant in variants:
        ratio, net = frame["pilimit_orig"] / frame[variant], nets[variant][1]
        seconds = frame[variant].median() / 1000
        out, grad = errors(cell, variant)
        records.append(
            {
                **asdict(cell),
                "variant": variant,
                "ours_ms": 1000 * seconds,
                "theirs_ms": frame["pilimit_orig"].median(),
                "ratio": ratio.median(),
                "ratio_low": ratio.min(),
                "ratio_high": ratio.max(),
                "row_MB": net.row_bytes / 1e6,
                "read_GB_per_s": 2 * net.row_bytes / seconds / 1e9,
                "copy_GB_per_s": bandwidth,
                "extra_share": extra[variant] / net.row_bytes,
                "theirs_extra_share": extra["pilimit_orig"] / net.row_bytes,
                "output_error": out,
                "gradient_error": grad,
            }
        )
    return records


def copy_bandwidth(clock: Callable[[], float]) -> float:
    """Bytes read and written per second, in GB, by copying a tensor far larger than any cache."""
    source = torch.ones(1 << 26)
    target = torch.empty_like(source)
    target.copy_(source)
    rates = []
    for _ in range(5):
        started = clock()
        target.copy_(source)
        rates.append(2 * source.numel() * source.element_size() / (clock() - started) / 1e9)
    return float(pd.Series(rates).median())


def extra_memory(step: Callable[[], None]) -> float:
    """By how many bytes the resident memory of the process rose at most during `step`; nan where
    the system does not tell."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        step()
        return float("nan")

    def resident(field: str) -> int:
        return 1024 * int(status.read_text().split(f"{field}:")[1].split()[0])

    reset.write_text("5")  # the peak becomes the present size
    before = resident("VmRSS")
    step()
    return max(0, resident("VmHWM") - before)


def measure_apart(cell: Cell, variants: list[str], rounds: int, threads: int) -> list[dict]:
    """`measure` in a fresh process."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_measure_with, cell, variants, rounds, threads).result()


def _measure_with(cell: Cell, variants: list[str], rounds: int, threads: int) -> list[dict]:
    torch.set_num_threads(threads)
    return measure(cell, variants, rounds, time.process_time if threads == 1 else time.perf_counter)


@torch.no_grad()
def errors(cell: Cell, variant: str) -> tuple[float, float]:
    """Relative errors of the output and of ∂g of one π-layer, against float64 on rows that were not
    rounded."""
    twin, storage = variant.split(":")
    torch.manual_seed(2)
    A, amult, B = drawn(cell, cell.rank)
    layer = InfPiLinearReLU(cell.rank, bias_alpha=0, row_dtype=getattr(torch, storage))
    layer.set_rows(A, amult, B)
    g, weights = torch.randn(2, min(cell.batch, PROBES), cell.rank)
    found = g.clone().requires_grad_()
    with torch.enable_grad(), implementation(rows=twin):
        out = layer(found)
        out.backward(weights)
    g, weights = g.double(), weights.double()
    s = g.norm(dim=1, keepdim=True)
    expected, along = torch.zeros_like(g), torch.zeros_like(g)
    radial = g.new_zeros(len(g), 1)
    for part in zip(*(tensor.split(4096) for tensor in (A, amult, B))):
        part_A, part_amult, part_B = (tensor.double() for tensor in part)
        q = (g / s) @ part_B.T
        expected += s * ((relu_k(q) * part_amult) @ part_A)
        dgamma = (weights @ part_A.T) * part_amult
        along += (dgamma * relu_k_prime(q)) @ part_B
        radial += (dgamma * (relu_k(q) - q * relu_k_prime(q))).sum(1, keepdim=True)
    gradient = along + radial * g / s
    return (
        float((out.double() - expected).norm() / expected.norm()),
        float((found.grad.double() - gradient).norm() / gradient.norm()),
    )


def table(frame: pd.DataFrame) -> str:
    """The measurements as a Markdown table."""
    lines = [
        "| rows | r | b | twin:storage | pilimit_orig ms | ours ms | ratio (lowest – highest) | of "
        "copy bandwidth "
        "| extra memory (orig) | error of output, gradient |",
        "|" + "---|" * 10,
    ]
    for cell in frame.itertuples():
        lines.append(
            f"| {cell.rows:,} | {cell.rank} | {cell.batch} | {cell.variant} | {cell.theirs_ms:.1f} "
            "| "
            f"{cell.ours_ms:.1f} | {cell.ratio:.2f} ({cell.ratio_low:.2f} – {cell.ratio_high:.2f}) "
            "| "
            f"{cell.read_GB_per_s / cell.copy_GB_per_s:.0%} | {cell.extra_share:.1%} "
            f"({cell.theirs_extra_share:.0%}) | "
            f"{cell.output_error:.1e}, {cell.gradient_error:.1e} |"
        )
    return "\n".join(lines) + "\n"


def draw(frame: pd.DataFrame, path: Path) -> None:
    """Ratios at the largest number of rows, a panel per rank."""
    import seaborn as sns
    from matplotlib.figure import Figure

    frame = frame[frame["rows"] == frame["rows"].max()]
    ranks = sorted(frame["rank"].unique())
    with sns.axes_style("whitegrid"):
        figure = Figure(figsize=(4.4 * len(ranks) + 1.6, 3.6), layout="constrained")
        for axis, rank in zip(figure.subplots(1, len(ranks), squeeze=False, sharey=True)[0], ranks):
            sns.barplot(
                frame[frame["rank"] == rank],
                x="batch",
                y="ratio",
                hue="variant",
                palette="crest",
                ax=axis,
                legend=rank == ranks[-1],
            )
            axis.axhline(1, color="0.3", linewidth=1)
            axis.set(
                title=f"{frame['rows'].max() // 1000}k rows, r = {rank}",
                ylabel="times faster than torch.cat rows",
            )
        sns.move_legend(axis, "upper left", bbox_to_anchor=(1, 1), title=None)
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> pd.DataFrame:
    parser = plain_command_line("bench.rows", __doc__)
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        default=[20_000, 200_000],
        help="numbers of rows (default 20000 200000)",
    )
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[100, 400], help="ranks (default 100 400)"
    )
    parser.add_argument(
        "--batches",
        type=int,
        nargs="+",
        default=[8, 32, 128],
        help="batch sizes (default 8 32 128)",
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        default=list(VARIANTS),
        help="implementation:storage, such as chunked:bfloat16 (default all)",
    )
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each (default 5)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default 1)")
    add_out(parser, "output/bench_rows", "folder of table, figure and what is measured so far")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    settings = {
        "variants": args.variants,
        "rounds": args.rounds,
        "threads": args.threads,
        "torch": torch.__version__,
    }
    kept, done = args.out / "cells.jsonl", []
    if kept.exists():
        first, *done = [json.loads(line) for line in kept.read_text().splitlines()]
        if first != settings:
            raise FileExistsError(
                f"{args.out} holds measurements with other settings ({first}); choose another "
                "--save-dir"
            )
    cells = [
        Cell(*cell)
        for cell in ((m, r, b) for m in args.sizes for r in args.ranks for b in args.batches)
    ]
    records = [
        record for record in done if Cell(record["rows"], record["rank"], record["batch"]) in cells
    ]
    finished = {(record["rows"], record["rank"], record["batch"]) for record in done}
    left = [cell for cell in cells if (cell.rows, cell.rank, cell.batch) not in finished]
    for cell in tqdm(left, desc="cells", disable=not shows_bars()):
        fresh = measure_apart(cell, args.variants, args.rounds, args.threads)
        records, done = records + fresh, done + fresh
        write_text(kept, "".join(json.dumps(entry) + "\n" for entry in (settings, *done)))
    frame = pd.DataFrame(records)
    machine = f"{describe(args.threads)}\n\n"
    write_text(args.out / "steps.csv", frame.to_csv(index=False))
    write_text(args.out / "table.md", machine + table(frame))
    draw(frame, args.out / "steps.png")
    print(machine + table(frame))
    return frame


if __name__ == "__main__":
    main()
