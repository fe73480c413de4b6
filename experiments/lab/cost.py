"""What the lab costs: a training step of a small CNN without it, with tracking, and in a whole
Experiment.

    python -m experiments.lab.cost --out results/lab_cost

The variants take turns, a block of steps each, in one process; each round gives one ratio to the
plain block of that round.
Both clocks are kept: time on the wall, and processor time of the process, which other work on the
machine disturbs less. The second "plain" shows how far two equal things differ. Written:
`rounds.csv`, `settings.json`, `cost.png`.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from pilimit_lib.lab import Experiment, watch

from ..bench.machine import describe
from ..training.flags import plain_command_line

matplotlib.use("Agg")


@dataclass(frozen=True)
class Settings:
    """Sizes of network, data and measurement."""

    out: str = "results/lab_cost"
    rounds: int = 30
    steps: int = 10
    warm: int = 5
    batch_size: int = 64
    samples: int = 4096
    seed: int = 0
    tensorboard: bool = True


MEANINGS = {
    "out": "folder of settings, rounds and figure",
    "rounds": "measurements of each variant",
    "steps": "training steps of a measurement",
    "warm": "steps before the first one",
    "batch_size": "images of a step",
    "samples": "images of the data set",
    "seed": "of network and images",
    "tensorboard": "write scalars for TensorBoard too",
}


def network() -> nn.Module:
    """Three convolutions and two linear layers on 28 x 28 images."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 25, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


class Plain:
    """The loop that everyone writes; with `lab`, the same loop under `watch`, nothing recorded."""

    def __init__(
        self, model: nn.Module, data: TensorDataset, settings: Settings, watched: bool
    ) -> None:
        self.model, self.loader = model, DataLoader(data, settings.batch_size, shuffle=True)
        self.optimizer = optim.Adam(model.parameters(), lr=1e-3)
        self.lab = watch(model, self.optimizer, example=data[:2][0]) if watched else None
        self.batches = iter(self.loader)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            batch = next(self.batches, None)
            if batch is None:
                self.batches = iter(self.loader)
                batch = next(self.batches)
            x, y = batch
            loss = F.cross_entropy(self.model(x), y)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()


def measure(settings: Settings) -> pd.DataFrame:
    """Milliseconds a step of each variant, per round and clock."""
    torch.manual_seed(settings.seed)
    torch.set_num_threads(1)
    data = TensorDataset(
        torch.randn(settings.samples, 1, 28, 28), torch.randint(0, 10, (settings.samples,))
    )
    first = network()
    exp = Experiment(
        copy.deepcopy(first),
        optim.Adam,
        data,
        data,
        "cpu",
        1e-3,
        settings.batch_size,
        "cost",
        root_log_dir=Path(settings.out) / "run",
        tensorboard=settings.tensorboard,
        progress=False,
    )
    runs = {
        "plain": Plain(copy.deepcopy(first), data, settings, False).run,
        "plain again": Plain(copy.deepcopy(first), data, settings, False).run,
        "tracking": Plain(copy.deepcopy(first), data, settings, True).run,
        "experiment": exp.train_n_steps,
    }
    for run in runs.values():
        run(settings.warm)
    rows = []
    for number in tqdm(range(settings.rounds), desc="rounds"):
        names = list(np.random.default_rng([settings.seed, number]).permutation(list(runs)))
        for name in names:
            wall, processor = time.perf_counter(), time.process_time()
            runs[name](settings.steps)
            for clock, spent in (
                ("wall", time.perf_counter() - wall),
                ("processor", time.process_time() - processor),
            ):
                rows.append(
                    {
                        "round": number,
                        "variant": name,
                        "clock": clock,
                        "ms": spent / settings.steps * 1e3,
                    }
                )
    return pd.DataFrame(rows)


def main() -> None:
    parser = plain_command_line("lab.cost", __doc__)
    for name, value in asdict(Settings()).items():
        how = {"default": value, "help": f"{MEANINGS[name]} (default {value})"}
        if isinstance(value, bool):
            parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, **how)
        elif name == "out":
            parser.add_argument("--out", "--save-dir", **how)
        else:
            parser.add_argument(f"--{name}", type=type(value), **how)
    settings = Settings(**vars(parser.parse_args()))
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "settings.json").write_text(json.dumps(asdict(settings), indent=1))
    frame = measure(settings)
    frame.to_csv(out / "rounds.csv", index=False)
    wide = frame.pivot(index=["clock", "round"], columns="variant", values="ms")
    ratios = wide.div(wide["plain"], axis=0).drop(columns="plain")
    print(describe())
    for (clock, name), values in (
        ratios.melt(ignore_index=False).reset_index().groupby(["clock", "variant"])["value"]
    ):
        low, middle, high = values.quantile([0.25, 0.5, 0.75])
        print(
            f"{clock:9} {name:12} {middle:.3f} x plain   (quartiles {low:.3f} to {high:.3f}; "
            "median step "
            f"{wide.loc[clock, name].median():.2f} ms, plain "
            f"{wide.loc[clock, 'plain'].median():.2f} ms)"
        )
    long = ratios.melt(value_name="ratio", ignore_index=False).reset_index()
    axes = sns.boxplot(long, x="variant", y="ratio", hue="clock", showfliers=False)
    axes.set(title="time of a step, ratio to the plain step of the same round", xlabel="")
    axes.figure.savefig(out / "cost.png", dpi=120)


if __name__ == "__main__":
    main()
