"""Do finite networks scale as the infinite one, and do learning rates that were tuned at infinity
suit them? On digits, for four parametrisations of the same finite network.

    # a minute or two
    python -m experiments.understanding.scaling --save-dir output/scaling

    π          sampled from the infinite network, gradients projected
    μ          independent Gaussian weights, rates as in the infinite network (μP)
    NTK        rates of input and hidden layers fall as 1/n: features freeze
    standard   one rate in the usual coordinates: that of the readout grows as n here

All rates agree at the base width. Writes coord_check.csv, coord_check.png, rates.csv, rates.png,
and prints the verdict on each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from pilimit_lib.core import write_text
from pilimit_lib.inf import FinPiMLPSample, InfMLP, PiSGD
from pilimit_lib.inf.instruments import CoordCheck, coord_check
from pilimit_lib.inf.instruments.coord_check import records

from ..training.flags import add_out, plain_command_line
from ..training.images import Batches, ImageSet, load_images
from ..training.process import seed_everything, shows_bars

BASE = 64  # the width at which all parametrisations agree
Power = tuple[int, int, int]
# how the rates of input, hidden layers and readout grow with n / BASE, in our coordinates
POWERS: dict[str, Power] = {
    "π": (0, 0, 0),
    "μ": (0, 0, 0),
    "NTK": (-1, -1, 0),
    "standard": (-1, 0, 1),
}


@dataclass(frozen=True)
class Settings:
    r: int = 16
    depth: int = 1
    images: int = 640
    batch_size: int = 32
    steps: int = 40
    check_steps: int = 4
    check_lr: float = 0.02
    widths: tuple[int, ...] = (64, 256, 768)
    rates: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
    check_seeds: tuple[int, ...] = (0, 1, 2)
    seeds: tuple[int, ...] = (0, 1)  # of the trainings at every rate


def limit_of(settings: Settings, data: ImageSet, seed: int) -> InfMLP:
    seed_everything(seed)
    return InfMLP(data.features, data.classes, settings.r, settings.depth, 1.0, 0.5, bias_alpha=0)


def finite(limit: InfMLP, kind: str, n: int) -> FinPiMLPSample:
    net = limit.sample(n)
    return net if kind == "π" else net.gaussian_init_()


def optimizer_of(net: nn.Module, kind: str, lr: float) -> PiSGD:
    """The multipliers of the first command (input 0.1, readout 4), times the power of the width."""
    relative = getattr(net, "n", BASE) / BASE
    first, hidden, last = (relative**power for power in POWERS[kind])
    layers = list(net.layers)
    groups = [{"params": list(layers[0].parameters()), "lr": 0.1 * lr * first}]
    groups += [{"params": list(layer.parameters()), "lr": lr * hidden} for layer in layers[1:-1]]
    groups += [{"params": list(layers[-1].parameters()), "lr": 4 * lr * last}]
    return PiSGD(groups, lr=lr)


def check(settings: Settings, data: ImageSet, kind: str) -> CoordCheck:
    """The infinite network of rank r is the limit of π-networks only: without projection features
    move in more directions than r, so the others are compared by width."""
    limit = limit_of(settings, data, seed=0).double()  # small steps are lost in rounding otherwise
    x, y = data.train_x[:64].flatten(1).double(), data.train_y[:64]
    return coord_check(
        lambda n: finite(limit, kind, n),
        settings.widths,
        x,
        y,
        lambda net: optimizer_of(net, kind, settings.check_lr),
        limit=limit if kind == "π" else None,
        steps=settings.check_steps,
        seeds=settings.check_seeds,
        tolerance=0.5,
    )


def trained_loss(
    settings: Settings, data: ImageSet, net: nn.Module, opt: PiSGD, seed: int
) -> float:
    """Loss on the test images after the steps; infinity where the run diverged."""
    batches: list[tuple[Tensor, Tensor]] = []
    source = Batches(
        data.train_x[: settings.images], data.train_y[: settings.images], settings.batch_size, seed
    )
    while len(batches) < settings.steps:
        batches += [(x.flatten(1), y) for _, x, y in source]
    for x, y in batches[: settings.steps]:
        opt.zero_grad()
        loss = F.cross_entropy(net(x), y)
        if not math.isfinite(loss.item()) or loss.item() > 50:
            return math.inf
        loss.backward()
        opt.step()
    with torch.no_grad():
        return float(F.cross_entropy(net(data.test_x.flatten(1)), data.test_y))


def rates(settings: Settings, data: ImageSet) -> pd.DataFrame:
    """Test loss by parametrisation, width (infinity: once for all), rate and seed."""
    rows = []
    for seed in tqdm(settings.seeds, desc="seeds", disable=not shows_bars()):
        for lr in settings.rates:
            net = limit_of(settings, data, seed)
            loss = trained_loss(settings, data, net, optimizer_of(net, "π", lr), seed)
            rows.append(("infinite", math.inf, lr, seed, loss))
            for kind in ("μ", "NTK", "standard"):
                for n in settings.widths:
                    net = finite(limit_of(settings, data, seed), kind, n)
                    loss = trained_loss(settings, data, net, optimizer_of(net, kind, lr), seed)
                    rows.append((kind, n, lr, seed, loss))
    return pd.DataFrame(rows, columns=["network", "width", "rate", "seed", "loss"])


def at_the_rate_tuned_at_infinity(frame: pd.DataFrame) -> pd.DataFrame:
    """For each finite network: the best rate of its own, and what the infinite network's best rate
    costs it in loss."""
    mean = frame.groupby(["network", "width", "rate"])["loss"].mean()
    chosen = mean["infinite", math.inf].idxmin()
    rows = []
    for (network, width), losses in mean.groupby(level=[0, 1], sort=False):
        losses = losses.droplevel([0, 1])
        rows.append(
            {
                "network": network,
                "width": width,
                "its best rate": losses.idxmin(),
                "loss there": losses.min(),
                f"loss at {chosen:g}, best at infinity": losses[chosen],
            }
        )
    return pd.DataFrame(rows).sort_values(["network", "width"]).reset_index(drop=True)


def draw_check(frame: pd.DataFrame, steps: int, path: Path) -> None:
    """The change of each layer's output after the last step against width, the limit as a line."""
    import seaborn as sns

    last = frame[(frame["quantity"] == "change") & (frame["step"] == steps)]
    with sns.axes_style("whitegrid"):
        grid = sns.relplot(
            last[last["width"] < math.inf],
            x="width",
            y="size",
            hue="network",
            style="network",
            col="layer",
            kind="line",
            markers=True,
            dashes=False,
            errorbar=("sd", 1),
            height=3.2,
            facet_kws={"sharey": False},
        )
        for layer, axis in grid.axes_dict.items():
            limit = last[(last["width"] == math.inf) & (last["layer"] == layer)]["size"]
            axis.axhline(limit.mean(), color="0.2", linestyle=":", label="infinite")
            axis.set(xscale="log", yscale="log", title=layer)
            ticks = sorted(last["width"].unique())[:-1]
            axis.set_xticks(ticks, [f"{int(n)}" for n in ticks])
            axis.xaxis.minorticks_off()
        grid.set_axis_labels("width n", f"change of the output after {steps} steps")
        grid.figure.savefig(path, dpi=130, bbox_inches="tight")


def draw_rates(frame: pd.DataFrame, path: Path) -> None:
    import seaborn as sns

    worst = frame.groupby(["network", "width", "rate"])["loss"].transform("max")
    shown = frame[worst < math.inf]  # where a seed diverged, nothing is drawn
    finite_ones = shown[shown["network"] != "infinite"].astype({"width": int})
    infinite = shown[shown["network"] == "infinite"].groupby("rate")["loss"].mean()
    with sns.axes_style("whitegrid"):
        grid = sns.relplot(
            finite_ones.astype({"width": str}),
            x="rate",
            y="loss",
            hue="width",
            col="network",
            kind="line",
            marker="o",
            errorbar=("sd", 1),
            height=3.2,
        )
        for name, axis in grid.axes_dict.items():
            axis.plot(infinite.index, infinite, color="0.2", linestyle=":", label="infinite")
            axis.axvline(infinite.idxmin(), color="0.7", linewidth=1)
            axis.set(xscale="log", yscale="log", title=f"{name} (dotted: infinite π)")
            ticks = sorted(frame["rate"].unique())
            axis.set_xticks(ticks, [f"{rate:g}" for rate in ticks])
            axis.xaxis.minorticks_off()
        grid.set_axis_labels("learning rate", "test loss")
        grid.figure.savefig(path, dpi=130, bbox_inches="tight")


def main(argv: list[str] | None = None, settings: Settings | None = None) -> dict[str, list[str]]:
    parser = plain_command_line("understanding.scaling", __doc__)
    add_out(parser, "output/scaling", "folder of tables and figures")
    args = parser.parse_args(argv)
    settings, data = settings or Settings(), load_images("digits")
    args.out.mkdir(parents=True, exist_ok=True)
    frames, off = [], {}
    for kind in POWERS:
        found = check(settings, data, kind)
        off[kind] = found.off
        print(f"{kind}: {found}".replace("\n", f"\n{' ' * len(kind)}  "))
        frames.append(pd.DataFrame(records(found)).assign(network=kind))
    frame = pd.concat(frames)
    write_text(args.out / "coord_check.csv", frame.to_csv(index=False, float_format="%.5g"))
    draw_check(frame, settings.check_steps, args.out / "coord_check.png")
    found_rates = rates(settings, data)
    write_text(args.out / "rates.csv", found_rates.to_csv(index=False, float_format="%.5g"))
    draw_rates(found_rates, args.out / "rates.png")
    print(at_the_rate_tuned_at_infinity(found_rates).round(3).to_string(index=False))
    return off


if __name__ == "__main__":
    main()
