"""What growth costs beside training: seconds of bookkeeping (decisions, checkpoints, CSV, pictures)
for each second of training, on digits.

    python -m experiments.dendrites.bookkeeping --epochs 60 --out results/dendrites/bookkeeping

Processor time, so that other work on the machine does not count; wall time beside it. Compared in
one run: everything on (the default), pictures off, and no files at all.
"""

import json
import statistics
import time

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from pilimit_lib.dendrites import DendriteConfig, Growth, Patience, dendritic

from ..bench.machine import describe
from ..training.flags import add_out, plain_command_line
from .data import digits
from .images import ConvNet
from .training import accuracy, train_epoch


def measure(width: float, epochs: int, **settings) -> dict:
    torch.manual_seed(0)
    sets = digits()
    x, y = sets["train"]
    config = DendriteConfig(switch=Patience(patience=5), max_dendrites=3, seed=0, **settings)
    growth = Growth(
        dendritic(ConvNet(width, 8), config),
        optimizer=lambda ps: torch.optim.Adam(ps, 3e-3, fused=True),
        scheduler=lambda o: ReduceLROnPlateau(o, mode="max", patience=2),
    )
    training, keeping = [], []
    for epoch in range(epochs + 2):
        started = (time.process_time(), time.perf_counter())
        train_epoch(growth.model, growth.optimizer, x, y)
        score = accuracy(growth.model, *sets["val"])
        trained = (time.process_time(), time.perf_counter())
        complete = growth.step(score, test=0.0).complete
        kept = (time.process_time(), time.perf_counter())
        if epoch >= 2:  # the first epochs load modules
            training.append([b - a for a, b in zip(started, trained)])
            keeping.append([b - a for a, b in zip(trained, kept)])
        if complete:
            break
    result = {"epochs": len(training), "dendrites": growth.plateau.state.dendrites}
    for i, clock in enumerate(("processor", "wall")):
        result |= {
            f"{clock}: training, median ms": round(
                1e3 * statistics.median(t[i] for t in training), 2
            ),
            f"{clock}: bookkeeping, median ms": round(
                1e3 * statistics.median(k[i] for k in keeping), 2
            ),
            f"{clock}: median share, %": round(
                100 * statistics.median(k[i] / t[i] for k, t in zip(keeping, training)), 2
            ),
            f"{clock}: share of the whole run, %": round(
                100 * sum(k[i] for k in keeping) / sum(t[i] for t in training), 2
            ),
        }
    return result


def main(argv=None):
    parser = plain_command_line("dendrites.bookkeeping", __doc__)
    parser.add_argument("--epochs", type=int, default=60, help="epochs at most (default 60)")
    parser.add_argument(
        "--widths",
        type=float,
        nargs="+",
        default=[0.25, 1.0],
        help="widths of the network (default 0.25 1)",
    )
    add_out(parser, "results/dendrites/bookkeeping", "folder of bookkeeping.json")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    out, results = args.out, {}
    out.mkdir(parents=True, exist_ok=True)
    print(describe(), flush=True)
    for width in args.widths:
        for name, settings in {
            "all": {"save_dir": str(out / "all")},
            "no pictures": {"save_dir": str(out / "still"), "graphs": "never"},
            "no files": {},
        }.items():
            results[f"width {width}, {name}"] = measure(width, args.epochs, **settings)
            print(f"width {width}, {name}", results[f"width {width}, {name}"], flush=True)
    (out / "bookkeeping.json").write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
