"""A small conv net with dendrites on digits or Fashion-MNIST, beside two controls that are trained
by the same machinery.

    python -m experiments.dendrites.images --set digits --widths 0.25 0.5 --seeds 0 1 2 \\
        --out results/dendrites/digits
    python -m experiments.dendrites.images --set fashion --data DIR --widths 0.25 \\
        --seeds 0 1 2 --max-epochs 60 --out results/dendrites/fashion

arms   dendrites   grows when learning stalls
       restarts    the same network: at each stall back to the best weights and a restarted
                   learning rate, but nothing grows
       wider       a network as large as the dendritic one became, with the same restarts
Both controls train for as many epochs as the dendritic run took. Interrupted, the same command goes
on where it stopped.
"""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from tqdm import tqdm

from pilimit_lib.dendrites import DendriteConfig, Growth, PAISequential, Patience, dendritic

from ..training.flags import add_out, plain_command_line
from .data import digits, fashion
from .table import write_table
from .training import accuracy, train_epoch

ARMS = ("dendrites", "restarts", "wider")


@dataclass(frozen=True)
class Settings:
    set: str = "digits"
    lr: float = 3e-3
    batch: int = 64
    patience: int = 10
    scheduler_patience: int = 5
    max_dendrites: int = 4
    max_epochs: int = 150
    train: int = 6000  # Fashion-MNIST only: images of the subset
    val: int = 2000
    test: int = 10000


MEANINGS = {
    "lr": "of Adam",
    "batch": "images of a step",
    "patience": "epochs without progress before dendrites grow",
    "scheduler_patience": "epochs without progress before the learning rate falls",
    "max_dendrites": "generations of dendrites at most",
    "max_epochs": "epochs at most",
    "train": "training images of Fashion-MNIST",
    "val": "validation images of Fashion-MNIST",
    "test": "test images of Fashion-MNIST",
}


class ConvNet(nn.Module):
    """Two convolutions with batch norm, each one block, and a linear layer; ``width`` 1 is 16 and
    32 channels."""

    def __init__(self, width: float, side: int, classes: int = 10):
        super().__init__()
        c1, c2 = max(1, round(16 * width)), max(1, round(32 * width))
        self.block1 = PAISequential([nn.Conv2d(1, c1, 3, padding=1), nn.BatchNorm2d(c1)])
        self.block2 = PAISequential([nn.Conv2d(c1, c2, 3, padding=1), nn.BatchNorm2d(c2)])
        self.pool = nn.MaxPool2d(2)
        self.fc = nn.Linear(c2 * (side // 4) ** 2, classes)

    def forward(self, x):
        x = self.pool(torch.relu(self.block1(x)))
        x = self.pool(torch.relu(self.block2(x)))
        return self.fc(x.flatten(1))


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def width_for(count: int, side: int) -> float:
    """The width whose network has the parameter count nearest to ``count``."""
    return min(
        (w / 32 for w in range(1, 200)), key=lambda w: abs(parameters(ConvNet(w, side)) - count)
    )


def fit(
    arm: str, width: float, seed: int, sets, settings: Settings, folder: Path, epochs: int
) -> dict:
    """Train one arm; returns what the table needs."""
    torch.manual_seed(seed)
    (x, y), side = sets["train"], sets["train"][0].shape[-1]
    grows = arm == "dendrites"
    config = DendriteConfig(
        switch=Patience(patience=settings.patience),
        max_dendrites=settings.max_dendrites if grows else 10**6,
        max_tries=2 if grows else 10**6,
        save_dir=str(folder),
        seed=seed,
    )
    growth = Growth(
        dendritic(ConvNet(width, side), config),
        config,
        optimizer=lambda ps: torch.optim.Adam(ps, settings.lr, fused=True),
        scheduler=lambda o: ReduceLROnPlateau(o, mode="max", patience=settings.scheduler_patience),
        select=None if grows else lambda net: [],
    )
    if (folder / "latest.pt").is_file():
        growth.load(folder / "latest.pt")
    growth.restart_clock()  # building an optimiser for the first time loads half of torch
    first = time.perf_counter()
    done = growth.plateau.state.epoch
    progress = tqdm(
        range(done, epochs),
        desc=f"{arm} width {width:.3g} seed {seed}",
        initial=done,
        total=epochs,
        mininterval=5,
    )
    for _ in progress:
        train_epoch(growth.model, growth.optimizer, x, y, settings.batch)
        score = accuracy(growth.model, *sets["val"])
        record = score > max(
            (r["validation"] for r in growth.records.rows.epochs), default=-1.0
        )  # only then a table needs the test score
        result = growth.step(score, test=accuracy(growth.model, *sets["test"]) if record else None)
        progress.set_postfix(
            best=growth.plateau.state.best, dendrites=growth.plateau.state.dendrites if grows else 0
        )
        if result.complete:
            break
    rows = growth.records.rows
    validation = [r["validation"] for r in rows.epochs]
    tests = {e["epoch"]: e["value"] for e in rows.extras if e["kind"] == "test"}
    best = max(range(len(validation)), key=lambda i: (validation[i], -i))
    switches = [r["epoch"] for r in rows.switches if r["action"] in ("grow", "retry", "finish")]
    before = max(
        range(min(switches[0] if switches else len(validation), len(validation))),
        key=lambda i: (validation[i], -i),
    )
    return {
        "set": settings.set,
        "arm": arm,
        "base width": width,
        "seed": seed,
        "val": validation[best],
        "test": tests[best + 1],
        "val first cycle": validation[before],
        "test first cycle": tests[before + 1],
        "parameters": rows.epochs[best]["parameters"],
        "parameters trained": max(r["parameters"] for r in rows.epochs),
        "parameters at start": rows.epochs[0]["parameters"],
        "epochs": len(validation),
        "seconds": sum(r["train_seconds"] for r in rows.epochs),
        "bookkeeping": sum(r["bookkeeping_seconds"] for r in rows.epochs),
        "wall": time.perf_counter() - first,
    }


def begin_anew(out: Path) -> None:
    """Remove the results of an earlier command, and what its runs would go on from."""
    for stale in (out / "results.jsonl", *out.glob("*/latest.pt")):
        stale.unlink(missing_ok=True)


def main(argv=None):
    parser = plain_command_line("dendrites.images", __doc__)
    parser.add_argument(
        "--set",
        choices=("digits", "fashion"),
        default="digits",
        help="images to learn (default digits)",
    )
    parser.add_argument("--data", default="dataset", help="folder of the Fashion-MNIST files")
    add_out(parser, "results/dendrites", "folder of all runs, from which a command goes on")
    parser.group("output").add_argument(
        "--overwrite",
        action="store_true",
        help="begin anew in --save-dir instead of going on where the command was stopped",
    )
    parser.add_argument(
        "--widths",
        type=float,
        nargs="+",
        default=[0.25],
        help="widths of the network; 1 is 16 and 32 channels (default 0.25)",
    )
    parser.add_argument(
        "--arms",
        choices=ARMS,
        nargs="+",
        default=list(ARMS),
        help="ways of growing that are compared; controls first run the dendrites (default all)",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[0, 1, 2],
        help="one run of each arm for each (default 0 1 2)",
    )
    for name, value in asdict(Settings()).items():
        if name != "set":
            parser.add_argument(
                f"--{name.replace('_', '-')}",
                type=type(value),
                default=value,
                help=f"{MEANINGS[name]} (default {value})",
            )
    args = vars(parser.parse_args(argv))
    data, out, widths, seeds, arms, overwrite = (
        args.pop(name) for name in ("data", "out", "widths", "seeds", "arms", "overwrite")
    )
    if overwrite:
        begin_anew(out)
    settings = Settings(**args)
    out.mkdir(parents=True, exist_ok=True)
    (out / "settings.json").write_text(
        json.dumps({**asdict(settings), "widths": widths, "seeds": seeds}, indent=2)
    )
    sets = (
        digits()
        if settings.set == "digits"
        else fashion(data, settings.train, settings.val, settings.test)
    )
    side = sets["train"][0].shape[-1]
    results = out / "results.jsonl"
    rows = (
        [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []
    )

    def once(arm, base, width, seed, epochs):
        for row in rows:
            if (row["arm"], row["base width"], row["seed"]) == (arm, base, seed):
                return row
        row = fit(arm, width, seed, sets, settings, out / f"{arm}_{base}_{seed}", epochs) | {
            "base width": base,
            "width": width,
        }
        rows.append(row)
        with open(results, "a") as file:
            file.write(json.dumps(row) + "\n")
        return row

    for width in widths:
        for seed in seeds:
            grown = once("dendrites", width, width, seed, settings.max_epochs)
            if "restarts" in arms:
                once("restarts", width, width, seed, grown["epochs"])
            if "wider" in arms:
                once("wider", width, width_for(grown["parameters"], side), seed, grown["epochs"])
            write_table(rows, out)
    write_table(rows, out)


if __name__ == "__main__":
    main()
