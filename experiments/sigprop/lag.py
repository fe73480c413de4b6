"""What lags behind hidden layers that move: the running statistics of batch norms, or the output
layer?

    python -m experiments.sigprop.lag --data FOLDER --train 10000 --test 5000 --epochs 1 3

A network is trained at a constant rate, and after the epochs named it is left as it is (it trains
on untouched) while copies of it are measured:

as trained        its test accuracy
statistics        batch norms measured anew on training images, nothing else
output            the output layer trained on over the hidden layer's features as they are now
both              first the one, then the other

Training on helps any output layer, behind or not. The same is therefore done to a network whose
hidden layers stand still (frozen): what it gains there, it gains without any lag. Written:
OUT/lag.csv, a row per method, seed and epoch.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from pilimit_lib import sigprop

from ..training.flags import add_out, plain_command_line
from ..training.images import ImageSet, load_images
from ..training.process import seed_everything
from .cifar10 import PROTOCOL
from .evaluation import accuracy, features
from .methods import Settings, step
from .training import Progress


def train_on(
    model: sigprop.models.Model, images: ImageSet, settings: Settings, epochs: int, seed: int
) -> None:
    """Train the output layer alone, on the features of the last hidden layer in evaluation."""
    last = model.model[-1].module
    x, y = features(model, images.train_x), images.train_y
    linear = last[-1] if isinstance(last, nn.Sequential) else last
    optimizer = torch.optim.Adam(linear.parameters(), settings.output_lr)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for part in torch.randperm(len(x), generator=generator).split(settings.batch):
            optimizer.zero_grad()
            F.cross_entropy(linear(x[part]), y[part]).backward()
            optimizer.step()


def measure(
    model: sigprop.models.Model, images: ImageSet, settings: Settings, seed: int, epochs: int
) -> dict[str, float]:
    """Test accuracy of the model and of its mended copies; the model stays as it is."""

    def right(copied: nn.Module) -> float:
        return accuracy(copied, images.test_x, images.test_y)

    found = {"as trained": right(model)}
    for name, anew, longer in (
        ("statistics", True, False),
        ("output", False, True),
        ("both", True, True),
    ):
        mended = copy.deepcopy(model)
        if anew:
            sigprop.recalibrate(mended, images.train_x.split(500))
        if longer:
            train_on(mended, images, settings, epochs, seed)
        found[name] = right(mended)
    model.train()
    return found


def run(
    method: str, seed: int, images: ImageSet, settings: Settings, after: list[int], longer: int
) -> list[dict]:
    seed_everything(seed)
    progress, rows = Progress(settings, method, seed, images, None), []
    for epoch in range(1, max(after) + 1):
        progress.model.train()
        for _, x, y in progress.order:
            if len(x) == settings.batch:
                step(progress.model, progress.optimizer, x, y)
        if epoch in after:
            numbers = measure(progress.model, images, settings, seed, longer)
            rows.append({"method": method, "seed": seed, "epoch": epoch, **numbers})
    return rows


def main(argv: list[str] | None = None) -> pd.DataFrame:
    flags = plain_command_line("sigprop.lag", __doc__)
    flags.add_argument(
        "--dataset",
        choices=("digits", "cifar10"),
        default="cifar10",
        help="images (default cifar10)",
    )
    flags.add_argument("--data", default="./dataset", help="folder as torchvision lays it out")
    flags.add_argument(
        "--methods",
        nargs="+",
        default=["sigprop", "frozen"],
        help="ways of learning (default sigprop frozen)",
    )
    flags.add_argument(
        "--seeds", nargs="+", type=int, default=[0, 1, 2], help="of networks (default 0 1 2)"
    )
    flags.add_argument("--epochs", nargs="+", type=int, default=[1, 6], help="measured after these")
    flags.add_argument("--longer", type=int, default=3, help="epochs that the output trains on")
    flags.add_argument("--train", type=int, default=None, help="training images (default all)")
    flags.add_argument("--test", type=int, default=None, help="test images (default all)")
    add_out(flags, "results/sigprop/lag", "folder of the tables")
    args = flags.parse_args(argv)
    images = load_images(args.dataset, args.data, args.train, args.test)
    settings = replace(PROTOCOL, dataset=args.dataset, decay=False, train=args.train)
    rows: list[dict] = []
    args.out.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for method in args.methods:
            rows += run(method, seed, images, settings, args.epochs, args.longer)
            pd.DataFrame(rows).to_csv(args.out / "lag.csv", index=False)
    frame = pd.DataFrame(rows)
    ways = ["as trained", "statistics", "output", "both"]
    print(frame.groupby(["method", "epoch"])[ways].mean().round(4).to_string())
    return frame


if __name__ == "__main__":
    main()
