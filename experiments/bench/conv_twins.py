"""How finite ConvNets trained by projected SGD approach the infinite one: distance of outputs
against channels.

    python -m experiments.bench.conv_twins --out output/conv_twins
    python -m experiments.bench.conv_twins --out output/conv_twins --channels 64 256 1024 --draws 5
    --steps 10 --lr .1

Small images (noise, one channel brighter in one of two classes), a chain and a residual network,
SGD with momentum and weight decay. Each point is the relative root mean square distance of outputs
of one finite network from the infinite one after the same steps on the same data, for networks
sampled at the start; "without projection" trains the same samples by ordinary SGD, "at rest" none.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from pilimit_lib.core import write_text
from pilimit_lib.inf import InfPiConvNet, InfPiResNet

from ..training.flags import add_out, plain_command_line
from ..training.process import shows_bars
from .machine import describe

KINDS = ("at rest", "projected SGD", "without projection")


def network(residual: bool) -> InfPiConvNet:
    torch.manual_seed(0)
    if residual:
        net = InfPiResNet(3, 2, (3, 4), blocks=1, branch_gain=0.5)
    else:
        net = InfPiConvNet(3, 2, (3, 4, 3), pools=(2, 1))
    # with a readout of 0 little would happen in a few steps
    nn.init.normal_(net.layers[-1].V, std=0.5)
    return net


def images(b: int, size: int) -> tuple[Tensor, Tensor]:
    x, y = (
        torch.randn(b, 3, size, size, generator=torch.Generator().manual_seed(1)),
        torch.arange(b) % 2,
    )
    x[:, 0] += 2 * y[:, None, None]
    return x, y


def trained(net: nn.Module, steps: int, lr: float, x: Tensor, y: Tensor) -> Tensor:
    """Outputs after so many steps."""
    optimizer = torch.optim.SGD(net.parameters(), lr, momentum=0.9, weight_decay=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    with torch.no_grad():
        return net(x)


def measure(name: str, kind: str, n: int, draw: int, steps: int, lr: float) -> dict:
    """One point: relative distance of one finite network of n channels."""
    net, (x, y) = network(name == "residual"), images(4, 4)
    steps = 0 if kind == "at rest" else steps
    exact = trained(copy.deepcopy(net), steps, lr, x, y)
    torch.manual_seed(1000 * n + draw)
    twin = net.sample(n)
    for layer in twin.layers:
        layer.project = layer.project and kind != "without projection"
    gap = (
        trained(twin, steps, lr, x, y) - exact
    ).square().mean().sqrt() / exact.square().mean().sqrt()
    return {"network": name, "training": kind, "channels": n, "draw": draw, "distance": gap.item()}


def table(frame: pd.DataFrame) -> str:
    """Median distances, and the exponent of n between the smallest and the largest number of
    channels."""
    wide = frame.pivot_table(
        index=["network", "training"], columns="channels", values="distance", aggfunc="median"
    )
    widths = list(wide.columns)
    heads = ["network", "training", *(f"n = {n}" for n in widths), "exponent"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for (name, kind), row in wide.iterrows():
        exponent = (
            torch.tensor([row.iloc[-1] / row.iloc[0]]).log()
            / torch.tensor([widths[-1] / widths[0]]).log()
        )
        lines.append(
            f"| {name} | {kind} | "
            + " | ".join(f"{value:.3f}" for value in row)
            + f" | {exponent.item():.2f} |"
        )
    return "\n".join(lines) + "\n"


def draw(frame: pd.DataFrame, path: Path) -> None:
    import seaborn as sns

    names = sorted(frame["network"].unique())
    with sns.axes_style("whitegrid"):
        figure = Figure(figsize=(4.6 * len(names), 3.6), layout="constrained")
        for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
            part = frame[frame["network"] == name]
            sns.lineplot(
                part,
                x="channels",
                y="distance",
                hue="training",
                style="training",
                estimator="median",
                errorbar=("pi", 100),
                markers=True,
                ax=axis,
            )
            n = sorted(part["channels"].unique())
            start = part[(part["training"] == "projected SGD") & (part["channels"] == n[-1])][
                "distance"
            ].median()
            axis.plot(n, [start * (n[-1] / m) ** 0.5 for m in n], "k:", lw=1, label="rate n^-½")
            axis.set(xscale="log", yscale="log", title=name, ylabel="relative distance of outputs")
            axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> None:
    parser = plain_command_line("bench.conv_twins", __doc__)
    add_out(parser, None, "folder of results.jsonl, from which a command goes on, and table")
    parser.add_argument(
        "--channels",
        type=int,
        nargs="+",
        default=[64, 256, 1024],
        help="widths of the finite networks (default 64 256 1024)",
    )
    parser.add_argument(
        "--draws", type=int, default=15, help="finite networks of each width (default 15)"
    )
    parser.add_argument("--steps", type=int, default=6, help="training steps of both (default 6)")
    parser.add_argument("--lr", type=float, default=0.03, help="learning rate (default 0.03)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "results.jsonl"
    results = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    known = {(r["network"], r["training"], r["channels"], r["draw"]) for r in results}
    cases = [
        (name, kind, n, number)
        for n in args.channels
        for number in range(args.draws)
        for name in ("chain", "residual")
        for kind in KINDS
    ]
    for case in tqdm(cases, desc="networks", disable=not shows_bars()):
        if case not in known:
            results.append(measure(*case, args.steps, args.lr))
            write_text(path, "".join(json.dumps(line) + "\n" for line in results))
    frame = pd.DataFrame(results)
    found = f"{describe()}\n\n{table(frame)}"
    write_text(args.out / "table.md", found)
    draw(frame, args.out / "conv_twins.png")
    print(found)


if __name__ == "__main__":
    main()
