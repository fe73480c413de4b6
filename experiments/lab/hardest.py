"""Do wrong labels gather where the lab says "hardest"? Labels are flipped, a small network is
trained on them, and the flipped ones are looked for.

    python -m experiments.lab.hardest --seeds 0 1 2 3 4 --out results/lab_hardest

1,400 digits of which 40 get another label at random, five epochs of Adam. Each way ranks the
samples worst first, by what the ledger holds after training, and counts how many of the first 40
have a flipped label:

hardest        dataset.hardest(): the lowest mean probability of the label over training
last loss      the largest loss at the last look
correctness    how rarely the prediction was the label; equal ones by id
forgotten      how often a right prediction became wrong; equal ones by id

Written: `hits.csv`, a row per seed and way, and `settings.json`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn, optim
from torch.utils.data import TensorDataset

from pilimit_lib.lab import Experiment

from ..training.flags import add_out, plain_command_line


@dataclass(frozen=True)
class Settings:
    """What is trained, and how many labels are wrong."""

    out: str = "results/lab_hardest"
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    samples: int = 1400
    flipped: int = 40
    epochs: int = 5
    batch_size: int = 64
    learning_rate: float = 1e-2


MEANINGS = {
    "out": "folder of the tables",
    "seeds": "of network, order and wrong labels",
    "samples": "images of digits",
    "flipped": "how many labels are wrong",
    "epochs": "passes over the images",
    "batch_size": "images of a step",
    "learning_rate": "of the optimiser",
}


def flip(labels: Tensor, count: int, seed: int, classes: int = 10) -> tuple[Tensor, set[int]]:
    """`labels` with `count` of them wrong, and which."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(labels), generator=generator)[:count]
    labels = labels.clone()
    labels[chosen] += torch.randint(1, classes, (count,), generator=generator)
    return labels % classes, set(chosen.tolist())


def ways(frame: pd.DataFrame, hardest: pd.DataFrame, count: int) -> dict[str, pd.Index]:
    """The first `count` samples by each way of ranking."""

    def first(column: str, ascending: bool) -> pd.Index:
        return frame.sort_values(column, ascending=ascending, kind="stable").index[:count]

    return {
        "hardest": hardest.index,
        "last loss": first("prediction_loss", False),
        "correctness": first("correctness", True),
        "forgotten": first("forgotten", False),
    }


def run(seed: int, settings: Settings) -> list[dict]:
    """Train once; how many flipped labels each way finds."""
    data = load_digits()
    images = torch.tensor(data.images[: settings.samples], dtype=torch.float32).unsqueeze(1) / 16
    labels, flipped = flip(torch.tensor(data.target[: settings.samples]), settings.flipped, seed)
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(72, 10),
    )
    exp = Experiment(
        model,
        optim.Adam,
        TensorDataset(images, labels),
        TensorDataset(images[:1], labels[:1]),
        "cpu",
        settings.learning_rate,
        settings.batch_size,
        f"seed_{seed}",
        seed=seed,
        root_log_dir=settings.out,
        tensorboard=False,
        progress=False,
    )
    exp.train_n_steps(settings.epochs * -(-len(images) // settings.batch_size))
    dataset = exp.train_loader.dataset
    ranked = ways(dataset.get_dataframe(), dataset.hardest(settings.flipped), settings.flipped)
    return [
        {"seed": seed, "way": way, "found": len(flipped & set(index))}
        for way, index in ranked.items()
    ]


def main(argv: list[str] | None = None) -> pd.DataFrame:
    parser = plain_command_line("lab.hardest", __doc__)
    for name, value in asdict(Settings()).items():
        text = f"{MEANINGS[name]} (default {value})"
        if name == "seeds":
            parser.add_argument("--seeds", type=int, nargs="+", default=list(value), help=text)
        elif name == "out":
            add_out(parser, value, MEANINGS[name])
        else:
            parser.add_argument(f"--{name}", type=type(value), default=value, help=text)
    given = vars(parser.parse_args(argv))
    settings = Settings(**{**given, "out": str(given["out"]), "seeds": tuple(given["seeds"])})
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "settings.json").write_text(json.dumps(asdict(settings), indent=1))
    frame = pd.DataFrame([row for seed in settings.seeds for row in run(seed, settings)])
    frame.to_csv(out / "hits.csv", index=False)
    table = frame.pivot(index="way", columns="seed", values="found")
    table["mean"] = table.mean(axis=1)
    print(f"of {settings.flipped} flipped labels, among the first {settings.flipped}:")
    print(table.sort_values("mean", ascending=False).to_string())
    return table


if __name__ == "__main__":
    main()
