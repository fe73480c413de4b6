"""Error bars of one infinitely wide network beside those of a deep ensemble of finite ones.

    python -m experiments.tabular.calibration --out output/calibration        # resumes

Regression: π with a Gaussian posterior over its readout (noise and prior by marginal likelihood),
the same with its noise measured on held-out samples, and five finite twins `net.sample(64)` of
freshly drawn networks, each trained alike; the ensemble's variance is that of its members plus the
mean square of its errors on the same held-out samples. Classification: π alone and the mean
probability of five such twins. Three seeds of data split and weights; NLL in nats per sample of
standardised targets, ECE in percent (of the classes' top probability in ten bins; of regression the
mean difference between nominal and actual coverage at 10 ... 90 %).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import norm
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from tqdm import tqdm

from pilimit_lib.inf import InfMLP, param_groups
from pilimit_lib.inf.estimators import PiClassifier, PiRegressor

from ..training.flags import add_out, plain_command_line
from . import data

MEMBERS, WIDTH, R, EPOCHS, BATCH = 5, 64, 16, 40, 32
SETS = ("diabetes", "friedman1", "Carseats", "breast_cancer", "digits")


def regression(mean: np.ndarray, std: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """NLL, ECE and R² of Gaussian predictions."""
    levels = np.arange(0.1, 1.0, 0.1)
    inside = [np.mean(np.abs(y - mean) < norm.ppf(0.5 + level / 2) * std) for level in levels]
    return {
        "nll": float(-norm.logpdf(y, mean, std).mean()),
        "ece": float(100 * np.abs(np.array(inside) - levels).mean()),
        "score": float(1 - np.mean((y - mean) ** 2) / y.var()),
    }


def classification(probabilities: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """NLL, ECE and accuracy of probabilities [n classes] for class numbers y [n]."""
    top, right = probabilities.max(1), probabilities.argmax(1) == y
    bins = np.minimum((10 * top).astype(int), 9)
    gaps = [
        abs(top[bins == b].mean() - right[bins == b].mean()) * (bins == b).mean()
        for b in np.unique(bins)
    ]
    chosen = np.maximum(probabilities[np.arange(len(y)), y], 1e-12)
    return {
        "nll": float(-np.log(chosen).mean()),
        "ece": float(100 * sum(gaps)),
        "score": float(right.mean()),
    }


def twin(x: Tensor, y: Tensor, outputs: int, loss: nn.Module, seed: int) -> nn.Module:
    """A finite network sampled from a fresh infinite one, and trained with Adam."""
    torch.manual_seed(seed)
    settings = {"memory": "moments", "fit": "minimax"}
    net = InfMLP(x.shape[1], outputs, R, 1, **settings).sample(WIDTH)
    optimizer = torch.optim.Adam(param_groups(net, 0.002, optimizer="adam"))
    steps = EPOCHS * -(-len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            loss(net(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
    return net.eval()


@torch.no_grad()
def outputs(nets: list[nn.Module], x: Tensor) -> Tensor:
    return torch.stack([net(x) for net in nets])


def compared(name: str, seed: int) -> dict[str, dict[str, float]]:
    """Method to its figures, on one split of one set."""
    table = data.load(name)
    classes, y = table.classes, table.y
    y = np.unique(y, return_inverse=True)[1] if classes else y.astype(float)
    parts = train_test_split(
        table.X, y, test_size=0.4, random_state=seed, stratify=y if classes else None
    )
    X, X_rest, y, y_rest = parts
    half = len(y_rest) // 2
    scaler = StandardScaler().fit(X)
    X, X_held, X_test = (scaler.transform(part) for part in (X, X_rest[:half], X_rest[half:]))
    y_held, y_test = y_rest[:half], y_rest[half:]
    if not classes:
        shift, scale = y.mean(), y.std()
        y, y_held, y_test = ((part - shift) / scale for part in (y, y_held, y_test))
    settings = {"max_epochs": EPOCHS, "batch_size": BATCH, "random_state": seed}
    tensors = [torch.tensor(part, dtype=torch.float32) for part in (X, X_held, X_test)]
    if classes:
        alone = PiClassifier(R, **settings).fit(X, y)
        targets, loss, width = torch.from_numpy(y), nn.CrossEntropyLoss(), int(y.max()) + 1
    else:
        alone = PiRegressor(R, **settings).fit(X, y)
        targets, loss, width = torch.tensor(y[:, None]).float(), nn.MSELoss(), 1
    nets = [
        twin(tensors[0], targets, width, loss, 100 * seed + member) for member in range(MEMBERS)
    ]
    if classes:
        mean = outputs(nets, tensors[2]).softmax(-1).mean(0).numpy()
        single = outputs(nets[:1], tensors[2]).softmax(-1)[0].numpy()
        return {
            "π": classification(alone.predict_proba(X_test), y_test),
            f"ensemble of {MEMBERS} twins": classification(mean, y_test),
            "one twin": classification(single, y_test),
        }
    mean, std = alone.predict(X_test, return_std=True)
    held = alone.predict(X_held, return_std=True)
    left = np.mean((y_held - held[0]) ** 2) - np.mean(held[1] ** 2)
    widened = np.sqrt(np.maximum(std**2 + left, 1e-6))
    members = outputs(nets, tensors[1])[:, :, 0].numpy()
    error = np.mean((y_held - members.mean(0)) ** 2)
    ensemble = outputs(nets, tensors[2])[:, :, 0].numpy()
    return {
        "π": regression(mean, std, y_test),
        "π, noise held out": regression(mean, widened, y_test),
        f"ensemble of {MEMBERS} twins": regression(
            ensemble.mean(0), np.sqrt(ensemble.var(0) + error), y_test
        ),
        f"ensemble of {MEMBERS} twins, members only": regression(
            ensemble.mean(0), np.maximum(ensemble.std(0), 1e-3), y_test
        ),
    }


def report(results: Path) -> str:
    """Mean ± s.d. over seeds."""
    lines = pd.read_json(results, lines=True)
    rows = ["| data | method | NLL | ECE, % | accuracy or R² |", "|---|---|---|---|---|"]
    for (name, method), part in lines.groupby(["data", "method"], sort=False):
        cells = [
            f"{part[key].mean():.3g} ± {part[key].std():.2g}" for key in ("nll", "ece", "score")
        ]
        rows.append(f"| {name} | {method} | " + " | ".join(cells) + " |")
    return "\n".join(rows) + f"\n\n{lines['seed'].nunique()} seeds.\n"


def main() -> None:
    parser = plain_command_line("tabular.calibration", __doc__)
    add_out(parser, "output/calibration", "folder of calibration.jsonl")
    parser.add_argument(
        "--data",
        nargs="+",
        default=SETS,
        choices=data.names(),
        help=f"data sets (default {' '.join(SETS)})",
    )
    parser.add_argument("--seeds", type=int, default=3, help="how many splits (default 3)")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    results = options.out / "calibration.jsonl"
    text = results.read_text(encoding="utf-8") if results.exists() else ""
    done = {(line["data"], line["seed"]) for line in map(json.loads, text.splitlines())}
    pairs = [(seed, name) for seed in range(options.seeds) for name in options.data]
    with results.open("a", encoding="utf-8") as file:
        for seed, name in tqdm([p for p in pairs if p[::-1] not in done], disable=None):
            for method, figures in compared(name, seed).items():
                line = {"data": name, "seed": seed, "method": method} | figures
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
    table = report(results)
    (options.out / "calibration.md").write_text(table, encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
