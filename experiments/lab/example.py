"""The documented example: a tiny CNN is trained, looked into and operated on.

    python -m experiments.lab.example                                              # digits, seconds
    python -m experiments.lab.example --dataset fashion_mnist --data DATA --epochs 3

Each seed is trained three times for the same number of steps: left alone ("plain"); operated on
from the same start ("operated"): after a third, silent neurons are drawn anew and neurons are added
to the first layer, after two thirds, samples that the model finds easy are denied; and left alone
with the added neurons from the beginning ("wide").

Written to `--out`: `metrics.csv`, `settings.json`, `accuracy.png`, and a `report.html`
beside each run's checkpoints. A run that was interrupted goes on from its last checkpoint, bit for
bit.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
import pandas as pd
import seaborn as sns
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn, optim
from torch.utils.data import TensorDataset

from pilimit_lib.lab import (
    Conv2dWithNeuronOps,
    Experiment,
    LinearWithNeuronOps,
    NetworkWithOps,
    TrackingMode,
)

from ..training.flags import plain_command_line

matplotlib.use("Agg")


@dataclass(frozen=True)
class Settings:
    """What is trained, on what, for how long."""

    dataset: str = "digits"
    data: str = ""
    out: str = "results/lab_example"
    epochs: int = 6
    batch_size: int = 64
    learning_rate: float = 1e-2
    add: int = 4
    samples: int = 0  # of the training set, from its start; 0: all
    seeds: tuple[int, ...] = (0, 1, 2)
    device: str = "cpu"


MEANINGS = {
    "dataset": "images to learn",
    "data": "folder of Fashion-MNIST",
    "out": "folder of the experiments, table and figure",
    "epochs": "passes over the training data",
    "batch_size": "images of a step",
    "learning_rate": "of Adam",
    "add": "neurons that are added on the way",
    "samples": "training images, from the first on; 0 all",
    "seeds": "one run of each arm for each",
    "device": "where torch computes",
}


class MNISTModel(NetworkWithOps):
    """The documented network for images of 28 x 28; `first` is the width of its first layer."""

    def __init__(self, first: int = 2) -> None:
        super().__init__()
        self.tracking_mode = TrackingMode.DISABLED
        self.layer0 = Conv2dWithNeuronOps(in_channels=1, out_channels=first, kernel_size=3)
        self.layer1 = Conv2dWithNeuronOps(in_channels=first, out_channels=4, kernel_size=3)
        self.layer2 = Conv2dWithNeuronOps(in_channels=4, out_channels=10, kernel_size=3)
        self.pool = nn.MaxPool2d(2)
        self.out = LinearWithNeuronOps(in_features=10, out_features=10)
        self.layers = [self.layer0, self.layer1, self.layer2, self.out]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.maybe_update_age(input)
        x = input
        for layer in self.layers[:3]:
            x = self.pool(F.relu(layer(x)))
        return F.log_softmax(self.out(x.flatten(1), skip_register=True), dim=1)


def images(settings: Settings) -> tuple[TensorDataset, TensorDataset]:
    """Training and test set, 28 x 28, in [0, 1]."""
    if settings.dataset == "digits":
        digits = load_digits()
        x = F.interpolate(
            torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16,
            size=28,
            mode="bilinear",
        )
        y = torch.tensor(digits.target)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        return TensorDataset(x[order[:1400]], y[order[:1400]]), TensorDataset(
            x[order[1400:]], y[order[1400:]]
        )
    from torchvision.datasets import FashionMNIST

    parts = [FashionMNIST(settings.data, train=train) for train in (True, False)]
    return tuple(
        TensorDataset(part.data.unsqueeze(1).float() / 255, part.targets) for part in parts
    )


def shortened(train: TensorDataset, samples: int) -> TensorDataset:
    """The first `samples` of the training set, all with 0."""
    return TensorDataset(*train[:samples]) if samples else train


def operate_on_neurons(exp: Experiment, settings: Settings) -> None:
    """Draw silent neurons anew and widen the first layer, all or nothing."""
    stats = exp.neuron_stats()
    with exp.edit() as model:
        for index, rows in stats[stats["layer"] != "out"].groupby("layer_index"):
            silent = set(rows.loc[rows["train_rate"] == 0, "neuron"])
            if silent:
                model.reinit_neurons(layer_index=int(index), neuron_indices=silent)
        model.add_neurons(layer_index=0, neuron_count=settings.add)


def deny_easy_samples(exp: Experiment) -> None:
    """Deny what the model is sure of, but keep one allowed sample for each denied one."""
    exp.train_loader.dataset.deny_samples_and_sample_allowed_with_predicate(
        lambda frame: frame["prediction_loss"] < 0.05, allow_to_denied_factor=1
    )


def run(arm: str, seed: int, settings: Settings) -> list[dict]:
    """Train one network to the end, from its last checkpoint where there is one; a row per
    evaluation."""
    torch.manual_seed(seed)
    train, test = images(settings)
    train = shortened(train, settings.samples)
    exp = Experiment(
        model=MNISTModel(2 + settings.add if arm == "wide" else 2),
        optimizer_class=optim.Adam,
        train_dataset=train,
        eval_dataset=test,
        device=settings.device,
        learning_rate=settings.learning_rate,
        batch_size=settings.batch_size,
        name=f"{arm}_{seed}",
        seed=seed,
        root_log_dir=settings.out,
        eval_every=10**9,
        dump_every=10**9,
    )
    steps = settings.epochs * (-(-len(train) // settings.batch_size))
    stops = sorted({steps * part // 6 for part in range(7)})
    if len(exp.chkpt_manager):
        exp.load(max(exp.chkpt_manager))
    for stop in stops:
        if stop < exp.lab.steps or (stop == exp.lab.steps and len(exp.chkpt_manager)):
            continue
        exp.train_n_steps(stop - exp.lab.steps)
        exp.eval_full()
        if arm == "operated" and stop == steps // 3:
            operate_on_neurons(exp, settings)
        if arm == "operated" and stop == steps * 2 // 3:
            deny_easy_samples(exp)
        exp.dump()
    exp.report(exp.folder / "report.html")
    return [
        {
            "arm": arm,
            "seed": seed,
            **{key: event[key] for key in ("step", "age", "loss", "accuracy", "parameters")},
        }
        for event in exp.lab.journal.events
        if event["kind"] == "eval"
    ]


def main() -> None:
    parser = plain_command_line("lab.example", __doc__)
    for name, value in asdict(Settings()).items():
        how = {"type": type(value), "default": value, "help": f"{MEANINGS[name]} (default {value})"}
        if name == "seeds":
            how |= {"type": int, "nargs": "+", "default": list(value)}
        elif name == "dataset":
            how["choices"] = ("digits", "fashion_mnist")
        parser.add_argument(f"--{name}", *(("--save-dir",) if name == "out" else ()), **how)
    given = vars(parser.parse_args())
    settings = Settings(**{**given, "seeds": tuple(given["seeds"])})
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "settings.json").write_text(json.dumps(asdict(settings), indent=1))
    rows = [
        row
        for seed in settings.seeds
        for arm in ("plain", "operated", "wide")
        for row in run(arm, seed, settings)
    ]
    frame = pd.DataFrame(rows).drop_duplicates(["arm", "seed", "step"], keep="last")
    frame.to_csv(out / "metrics.csv", index=False)
    axes = sns.lineplot(frame, x="step", y="accuracy", hue="arm", marker="o", errorbar=("pi", 100))
    axes.set(
        title=f"{settings.dataset}: test accuracy, mean and range over {len(settings.seeds)} seeds"
    )
    axes.figure.savefig(out / "accuracy.png", dpi=120)
    last = frame[frame["step"] == frame["step"].max()]
    print(
        last.pivot(
            index="seed", columns="arm", values=["accuracy", "loss", "parameters"]
        ).to_string()
    )


if __name__ == "__main__":
    main()
