"""A whole SGD step on moments: the sums of torch against those in C++, and against what the machine
could do at most.

    # two minutes
    python -m experiments.bench.moments_step --out output/moments_step
    python -m experiments.bench.moments_step --ranks 100 --batches 8 --rounds 15

A step is zero_grad, forward, cross entropy, backward, clipping per parameter and SGD with weight
decay, whose pass over the input layer is torch's fused one beside C++. Both networks hold the same
numbers and take turns on the same batch; times are processor seconds, medians over rounds, and
ratios medians of paired rounds, so that what else the machine does hits both. The floor of a step
is the larger of two: its products, 6·P·b·o FLOPs of each layer and 4·d·b·r of the input layer, at
the rate of a 1024³ product; and what has to be moved, V three times read and once written, the
input layer twice read and once written, at the rate of a copy. Both rates are the best of the same
rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F

from pilimit_lib.core import write_text
from pilimit_lib.inf import InfMLP, PiSGD, clip_grad_norm_, implementation, param_groups

from ..training.flags import plain_command_line
from .machine import Limits, describe

CLASSES = 10
HEAD = (
    "| r | b | torch ms | C++ ms | ratio (quartiles) | floor ms | share of it, torch | C++ |\n"
    "|---|---|---|---|---|---|---|---|\n"
)


def stepper(net: InfMLP, x: torch.Tensor, y: torch.Tensor, sums: str) -> Callable[[], None]:
    """A step of the training run that `cifar10mlp --memory moments` makes; with the sums of torch,
    as it was before there was another choice."""
    fused = True if sums == "native" else None
    optimizer = PiSGD(param_groups(net, 0.1, 1e-5), lr=0.1, fused=fused)

    def step() -> None:
        with implementation(moments=sums):
            F.cross_entropy(net(x), y).backward()
            clip_grad_norm_(net, 0.4, per_param=True)
            optimizer.step()
            optimizer.zero_grad()

    return step


def cost_of(net: InfMLP, b: int) -> tuple[float, float]:
    """(FLOPs, bytes) that a step can't do without."""
    moments = sum(layer.V.numel() for layer in net.layers[1:])
    first = net.layers[0].A.numel()
    return 6 * b * moments + 4 * b * first, 4 * (4 * moments + 3 * first)


def seconds_of(step: Callable[[], None], count: int) -> float:
    started = time.process_time()
    for _ in range(count):
        step()
    return (time.process_time() - started) / count


def measure(args: argparse.Namespace, r: int, b: int, limits: Limits) -> str:
    """A line of the table."""
    x, y = torch.randn(b, args.d), torch.randint(CLASSES, (b,))
    steps = {}
    for sums in ("plain", "native"):
        torch.manual_seed(0)
        net = InfMLP(args.d, CLASSES, r, args.layers, memory="moments", fused=True)
        steps[sums] = stepper(net, x, y, sums)
        once = min(seconds_of(steps[sums], 1) for _ in range(3))
    count = max(1, int(args.seconds / once))
    times: dict[str, list[float]] = {sums: [] for sums in steps}
    for number in range(args.rounds):
        limits.measure()
        for sums in list(steps)[:: 1 if number % 2 else -1]:
            times[sums].append(seconds_of(steps[sums], count))
    plain, native = (statistics.median(values) for values in times.values())
    ratios = [before / after for before, after in zip(*times.values())]
    low, _, high = statistics.quantiles(ratios, n=4)
    floor = limits.floor(*cost_of(net, b))
    return (
        f"| {r} | {b} | {1e3 * plain:.2f} | {1e3 * native:.2f} | {statistics.median(ratios):.2f} "
        f"({low:.2f} – {high:.2f}) | {1e3 * floor:.2f} | {floor / plain:.0%} | "
        f"{floor / native:.0%} |\n"
    )


def main(argv: list[str] | None = None) -> str:
    parser = plain_command_line("bench.moments_step", __doc__)
    parser.add_argument(
        "--ranks",
        type=int,
        nargs="+",
        default=[50, 100, 200, 400],
        help="ranks r (default 50 100 200 400)",
    )
    parser.add_argument(
        "--batches",
        type=int,
        nargs="+",
        default=[8, 128],
        help="samples of a step b (default 8 128)",
    )
    parser.add_argument("--layers", type=int, default=2, help="hidden π-layers (default 2)")
    parser.add_argument("--d", type=int, default=3072, help="size of the data (default 3072)")
    parser.add_argument(
        "--rounds", type=int, default=9, help="turns of each side, one after the other (default 9)"
    )
    parser.add_argument("--seconds", type=float, default=0.3, help="of a side's turn (default 0.3)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default 1)")
    parser.group("output").add_argument(
        "--out", "--save-dir", type=Path, help="folder for table.md (default none)"
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    limits, lines = Limits(), []
    print(describe(), HEAD, sep="\n\n", end="", flush=True)
    for r in args.ranks:
        for b in args.batches:
            lines.append(measure(args, r, b, limits))
            print(lines[-1], end="", flush=True)
    rates = (
        f"{limits.rate / 1e9:.0f} GFLOP/s in a product, {limits.bandwidth / 1e9:.1f} GB/s in a copy"
    )
    print(f"\n{rates}")
    table = f"{describe()}; {rates}\n\n{HEAD}{''.join(lines)}"
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        write_text(args.out / "table.md", table)
    return table


if __name__ == "__main__":
    main()
