"""How fast do finite networks sampled from a trained infinite one converge to it, and do they stay
together while both train?

    # about 2 minutes on 2 idle cores
    python -m experiments.networks.convergence --save-dir output/convergence

Trains an infinite π-network on digits, samples networks of width n from it, measures the root mean
square of f_n - f over test images and outputs, then trains both on the same batches and measures
again. Writes deviations.csv, slopes.json, convergence.png.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from pilimit_lib.core import write_text
from pilimit_lib.inf import InfMLP, PiSGD, clip_grad_norm_, param_groups

from ..training.flags import add_out, plain_command_line
from ..training.images import Batches, load_images
from ..training.process import seed_everything, shows_bars


@dataclass(frozen=True)
class Settings:
    r: int = 16
    depth: int = 1
    lr: float = 0.5
    gclip: float = 0.4
    batch_size: int = 16
    steps_alone: int = 60  # of the infinite network, before anything is sampled
    steps_together: int = 20  # of both, on the same batches
    widths: tuple[int, ...] = (512, 2048, 8192)
    seeds: tuple[int, ...] = (0, 1, 2)
    test_images: int = 128


def train(
    net: nn.Module, optimizer: PiSGD, batches: list[tuple[Tensor, Tensor]], gclip: float
) -> None:
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        clip_grad_norm_(net, gclip, per_param=True)
        optimizer.step()


def optimizer_for(net: nn.Module, lr: float) -> PiSGD:
    return PiSGD(
        param_groups(net, lr, first_layer_lr_mult=0.1, last_layer_lr_mult=4, bias_lr_mult=0.5),
        lr=lr,
    )


def measure(settings: Settings) -> pd.DataFrame:
    """One row per seed, width and moment: the root mean square deviation of the outputs on the test
    images."""
    data = load_images("digits")
    x_test = data.test_x[: settings.test_images].flatten(1)
    rows = []
    for seed in tqdm(settings.seeds, desc="seeds", disable=not shows_bars()):
        seed_everything(seed)
        source = Batches(data.train_x, data.train_y, settings.batch_size, seed)
        batches = [(x.flatten(1), y) for _, x, y in source]
        net = InfMLP(data.features, data.classes, settings.r, settings.depth, 1.0, 0.5, 0.5)
        train(net, optimizer_for(net, settings.lr), batches[: settings.steps_alone], settings.gclip)
        together = batches[settings.steps_alone : settings.steps_alone + settings.steps_together]
        with torch.no_grad():
            at_sampling = net(x_test)
        twins = {n: net.sample(n) for n in settings.widths}
        train(net, optimizer_for(net, settings.lr), together, settings.gclip)
        with torch.no_grad():
            at_end = net(x_test)
        for n in list(twins):
            twin = twins.pop(n)
            for moment, target in (("sampled", at_sampling), ("trained together", at_end)):
                if moment != "sampled":
                    train(twin, optimizer_for(twin, settings.lr), together, settings.gclip)
                with torch.no_grad():
                    deviation = (twin(x_test) - target).square().mean().sqrt().item()
                rows.append(
                    {
                        "seed": seed,
                        "width": n,
                        "moment": moment,
                        "deviation": deviation,
                        "output size": target.square().mean().sqrt().item(),
                    }
                )
    return pd.DataFrame(rows)


def slopes(frame: pd.DataFrame) -> dict[str, float]:
    """Exponent of n in the deviation, by least squares over all seeds in log-log coordinates."""
    return {
        moment: float(np.polyfit(np.log(part["width"]), np.log(part["deviation"]), 1)[0])
        for moment, part in frame.groupby("moment")
    }


def draw(frame: pd.DataFrame, path: Path) -> None:
    import seaborn as sns
    from matplotlib.figure import Figure

    fitted = slopes(frame)
    frame = frame.assign(curve=[f"{m} (slope {fitted[m]:.2f})" for m in frame["moment"]])
    with sns.axes_style("whitegrid"):
        figure = Figure(figsize=(5.4, 3.8), layout="constrained")
        axis = figure.subplots()
        sns.lineplot(
            frame,
            x="width",
            y="deviation",
            hue="curve",
            style="curve",
            markers=True,
            errorbar=("sd", 1),
            ax=axis,
        )
        widths = np.array(sorted(frame["width"].unique()), dtype=float)
        start = frame.loc[frame["width"] == widths[0], "deviation"].max() * 1.3
        axis.plot(
            widths,
            start * (widths / widths[0]) ** -0.5,
            color="0.5",
            linewidth=1,
            linestyle=":",
            label=r"$n^{-1/2}$",
        )
        axis.set(
            xscale="log",
            yscale="log",
            xlabel="width n of the finite network",
            ylabel="root mean square of f_n - f",
        )
        axis.set_xticks(widths, [f"{int(n)}" for n in widths])
        axis.xaxis.minorticks_off()
        axis.legend(title=None)
    figure.savefig(path, dpi=130)


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = plain_command_line("networks.convergence", __doc__)
    add_out(parser, "output/convergence", "folder of settings, table and figure")
    args = parser.parse_args(argv)
    settings = Settings()
    frame = measure(settings)
    args.out.mkdir(parents=True, exist_ok=True)
    write_text(args.out / "settings.json", json.dumps(asdict(settings), indent=2) + "\n")
    write_text(args.out / "deviations.csv", frame.to_csv(index=False))
    write_text(args.out / "slopes.json", json.dumps(slopes(frame), indent=2) + "\n")
    draw(frame, args.out / "convergence.png")
    print(frame.pivot_table("deviation", "width", "moment").to_string(), slopes(frame), sep="\n")
    return slopes(frame)


if __name__ == "__main__":
    main()
