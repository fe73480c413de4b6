"""Time of a training step relative to backprop on the same layers: a paired ratio, steps of both
taken in turn.

    python -m experiments.sigprop.timing
    python -m experiments.sigprop.timing --networks vgg --widths 32 --batch 256 --image 3 32 32

On the CPU with one thread processor time is read, which other work on the machine disturbs least;
on a GPU the clock, after waiting for the device. The median of the ratios is given with their
quartiles.
"""

from __future__ import annotations

import time

import pandas as pd
import torch
from tqdm import tqdm

from ..bench.machine import describe
from ..training.flags import add_out, plain_command_line
from .methods import Settings, make, step
from .networks import NAMES

WAYS = {
    "v9, a target per sample": {},
    "v9 by label, a target per sample": {"partners": "label"},
    "v9 by label, a target per class": {"partners": "label", "per_class": True},
}


def timed(model, optimizer, x, y) -> float:
    if x.is_cuda:
        torch.cuda.synchronize()
        started = time.perf_counter()
        step(model, optimizer, x, y)
        torch.cuda.synchronize()
        return time.perf_counter() - started
    started = time.process_time()
    step(model, optimizer, x, y)
    return time.process_time() - started


def compare(
    network: str, width: int, batch: int, image: tuple[int, int, int], repeats: int, device: str
) -> list[dict]:
    """Ratios of every way of signal propagation to backprop, `repeats` pairs each."""
    torch.manual_seed(0)
    settings = Settings(network=network, width=width)
    x, y = torch.randn(batch, *image, device=device), torch.randint(10, (batch,), device=device)

    def ready(method: str, **options):
        model, optimizer = make(Settings(**{**vars(settings), **options}), method, image)
        model.to(device).train()
        for _ in range(2):
            step(model, optimizer, x, y)
        return model, optimizer

    base = ready("backprop")
    others = {way: ready("sigprop", **options) for way, options in WAYS.items()}
    rows = []
    for _ in tqdm(range(repeats), desc=f"{network} {width}", leave=False):
        reference = timed(*base, x, y)
        rows += [
            {
                "network": network,
                "width": width,
                "way": way,
                "backprop ms": 1000 * reference,
                "ratio": timed(*pair, x, y) / reference,
            }
            for way, pair in others.items()
        ]
    return rows


def main(argv: list[str] | None = None) -> pd.DataFrame:
    flags = plain_command_line("sigprop.timing", __doc__)
    flags.add_argument(
        "--networks",
        nargs="+",
        choices=NAMES,
        default=["mlp", "conv", "vgg"],
        help="shapes (default mlp conv vgg)",
    )
    flags.add_argument(
        "--widths",
        nargs="+",
        type=int,
        default=[16, 64],
        help="units or channels of a layer (default 16 64)",
    )
    flags.add_argument("--batch", type=int, default=128, help="images of a step (default 128)")
    flags.add_argument(
        "--image",
        nargs=3,
        type=int,
        default=[1, 16, 16],
        help="channels, rows and columns (default 1 16 16)",
    )
    flags.add_argument("--repeats", type=int, default=15, help="pairs of measurements (default 15)")
    flags.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where torch computes (default a GPU where there is one)",
    )
    flags.add_argument(
        "--cuda",
        dest="device",
        action="store_const",
        const="cuda",
        help="the same as --device cuda",
    )
    add_out(flags, "results/sigprop/timing", "folder of tables")
    args = flags.parse_args(argv)
    torch.set_num_threads(1)
    frame = pd.DataFrame(
        [
            row
            for network in args.networks
            for width in args.widths
            for row in compare(
                network, width, args.batch, tuple(args.image), args.repeats, args.device
            )
        ]
    )
    args.out.mkdir(parents=True, exist_ok=True)
    frame.to_csv(args.out / "ratios.csv", index=False)
    groups = frame.groupby(["network", "width", "way"], sort=False)
    table = (
        groups.ratio.quantile([0.25, 0.5, 0.75])
        .unstack()
        .rename(columns={0.25: "25 %", 0.5: "ratio", 0.75: "75 %"})
    )
    table["backprop ms"] = groups["backprop ms"].median()
    table.to_csv(args.out / "timing.csv")
    print(describe())
    print(f"batch {args.batch}, images {args.image}, {args.device}, {args.repeats} pairs")
    print(table.round(2).to_string())
    return table


if __name__ == "__main__":
    main()
