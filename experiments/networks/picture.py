"""The picture of the README: what a π-layer is, a trained infinite network, and finite networks
sampled from it.

    python -m experiments.networks.picture --save-dir output/picture                  # seconds

The infinite π-network learns a one-dimensional function from 12 points; then networks of several
widths are sampled from it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pilimit_lib.inf import InfMLP, PiSGD, param_groups

from ..training.flags import add_out, plain_command_line
from ..training.process import seed_everything

WIDTHS, DRAWS = (64, 512, 4096), 5
STEPS, LR = 600, 0.2


def inputs(t: Tensor) -> Tensor:
    """Points t [b] on a line as data [b 2]: a constant beside them lets every unit have its own
    threshold."""
    return torch.stack([t, torch.ones_like(t)], 1)


def fit(net: InfMLP, x: Tensor, y: Tensor) -> list[int]:
    """Train on all points at once; the number of rows of the hidden layer after each step."""
    optimizer, rows = PiSGD(param_groups(net, LR), lr=LR), [net.rows[0]]
    for _ in range(STEPS):
        optimizer.zero_grad()
        (net(x)[:, 0] - y).square().mean().backward()
        optimizer.step()
        rows.append(net.rows[0])
    return rows


def main(argv: list[str] | None = None) -> Path:
    import seaborn as sns
    from matplotlib.figure import Figure

    parser = plain_command_line("networks.picture", __doc__)
    add_out(parser, "output/picture", "folder of pi_network.png")
    args = parser.parse_args(argv)
    seed_everything(0)
    t, grid = torch.linspace(-2, 2, 12), torch.linspace(-2.4, 2.4, 200)
    y = torch.sin(2.2 * t) + 0.3 * t
    net = InfMLP(2, 1, r=12, L=1, bias_alpha=0.5)
    rows = fit(net, inputs(t), y)
    with sns.axes_style("white"), torch.no_grad():
        figure = Figure(figsize=(10, 3.2), layout="constrained")
        left, middle, right = figure.subplots(1, 3, width_ratios=[1.05, 1.5, 0.9])
        draw_layer(left)
        for colour, n in zip(sns.color_palette("crest", len(WIDTHS)), WIDTHS):
            for draw in range(DRAWS):
                label = f"width {n}" if draw == 0 else None
                middle.plot(
                    grid,
                    net.sample(n)(inputs(grid))[:, 0],
                    color=colour,
                    linewidth=0.9,
                    label=label,
                )
        middle.plot(grid, net(inputs(grid))[:, 0], color="crimson", linewidth=2.2, label="infinite")
        middle.scatter(t, y, color="black", s=16, zorder=3, label="data")
        middle.set(title=f"trained, then sampled {DRAWS} times per width", ylim=(-2.2, 2.2))
        middle.legend(fontsize=8, frameon=False)
        right.plot(np.arange(STEPS + 1), rows, color="crimson")
        right.set(title="rows of a π-layer", xlabel="training step")
        sns.despine(figure)
        left.set_axis_off()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "pi_network.png"
    figure.savefig(path, dpi=130)
    return path


def draw_layer(axis) -> None:
    """A π-layer as three matrices, with the rows that one step appends."""
    from matplotlib.patches import Rectangle

    for x, width, name, shape in (
        (0, 1.0, "B", "[m r]"),
        (1.5, 0.22, "Amult", "[m]"),
        (2.3, 1.0, "A", "[m o]"),
    ):
        for y, height, colour in ((0.9, 2.1, "#c9d7e3"), (0.55, 0.28, "#e9a6ad")):
            axis.add_patch(
                Rectangle((x, y), width, height, facecolor=colour, edgecolor="0.3", linewidth=0.8)
            )
        axis.text(x + width / 2, 3.12, f"{name} {shape}", ha="center", fontsize=9)
    step = "one step: the batch's rows\nB ← ĝ    Amult ← -lr    A ← s·∂loss/∂g"
    axis.text(1.65, 0.12, step, ha="center", va="center", fontsize=8)
    axis.set(xlim=(-0.2, 3.5), ylim=(-0.3, 3.6), title="g → s · Σ Amult · A · k(⟨B, ĝ⟩)")


if __name__ == "__main__":
    print(main())
