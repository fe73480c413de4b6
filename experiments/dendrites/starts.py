"""What a new dendrite can explain, by how it begins: the short look behind the comparison.

    python -m experiments.dendrites.starts --hidden 4 8 --seeds 0 1 2 3 4 5 6 7 --out DIR

Digits, 64 - h - 10 trained to its plateau without dendrites. Then each way of beginning is given to
a copy, and read off, for the hidden and for the output layer:

linear       |Σ_n e_n x_nᵀ| of the errors at the plateau as a share of Σ_n |e_n| |x_n|: what GradMax
             to first order would follow, and what the neurons follow themselves
explained    the share of the error's variance that σ(z) explains beyond a constant and the linear
             map of the input that neurons have already, one dendrite for each neuron
loss         of training, after more epochs with the dendrites

Written: OUT/starts.csv, a row per h, seed and way.
"""

from __future__ import annotations

import copy

import pandas as pd
import torch
from torch import Tensor, nn

from pilimit_lib.dendrites import DendriteConfig, EveryEpoch, Growth, dendritic

from ..training.flags import add_out, plain_command_line
from .data import digits
from .growing_networks import mlp
from .training import accuracy, train_epoch

WAYS = ("none", "draw", "standardised", "gradient")


def errors(net: nn.Sequential, x: Tensor, y: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """For both layers, by name: inputs [N d] and errors ∂L/∂y [N o], L summed."""
    hidden = net[:2](x)
    output = net[3](torch.relu(hidden))
    loss = nn.functional.cross_entropy(output, y, reduction="sum")
    at_hidden, at_output = torch.autograd.grad(loss, [hidden, output])
    return {"1": (x.flatten(1), at_hidden), "3": (torch.relu(hidden).detach(), at_output)}


def beyond(target: Tensor, inputs: Tensor) -> Tensor:
    """What is left of [N k] after the least squares on inputs [N d] and a constant."""
    design = torch.cat([inputs, torch.ones(len(inputs), 1)], 1).double()
    target = target.double()
    return target - design @ torch.linalg.lstsq(design, target, driver="gelsd").solution


def explained(inputs: Tensor, error: Tensor, a: Tensor) -> float:
    """Share of the errors' variance [N o] that activations [N o] explain beyond linear maps, each
    that of its neuron."""
    a, e = beyond(a, inputs), error.double() - error.double().mean(0)
    power = a.square().sum(0)
    gain = torch.where(power > 1e-18 * len(a), (a * e).sum(0).square() / power, 0.0)
    return float(gain.sum() / e.square().sum())


def look(hidden: int, seed: int, epochs: int, more: int, rate: float) -> list[dict]:
    torch.manual_seed(seed)
    sets = digits()
    x, y = sets["train"]
    net = mlp(64).network(hidden)
    optimizer = torch.optim.Adam(net.parameters(), rate)
    for _ in range(epochs):
        train_epoch(net, optimizer, x, y)
    seen, rows = errors(net, x, y), []
    for way in WAYS:
        torch.manual_seed(seed)
        config = DendriteConfig(
            switch=EveryEpoch(), seed=seed, init="draw" if way == "none" else way
        )
        growth = Growth(
            dendritic(copy.deepcopy(net), config),
            config,
            optimizer=lambda ps: torch.optim.Adam(ps, rate),
            losses=lambda model: [nn.functional.cross_entropy(model(x), y)],
            select=(lambda model: []) if way == "none" else None,
        )
        growth.model(x)
        growth.grow_now()
        growth.model.train()(x)  # where it begins standardised, by this batch
        row = {"hidden": hidden, "seed": seed, "way": way}
        for name, where in (("1", "hidden"), ("3", "output")):
            inputs, error = seen[name]
            bound = (error.norm(dim=1) * inputs.norm(dim=1)).sum()
            row[f"linear, {where}"] = float((error.T @ inputs).norm() / bound)
            layer = growth.network[int(name)]
            if layer.dendrites:
                with torch.no_grad():
                    a = torch.sigmoid(layer.dendrites[0].body(inputs))
                row[f"explained, {where}"] = explained(inputs, error, a)
        for _ in range(more):
            train_epoch(growth.model, growth.optimizer, x, y)
        with torch.no_grad():
            row["loss"] = float(nn.functional.cross_entropy(growth.model(x), y))
        row["val"] = accuracy(growth.model, *sets["val"])
        rows.append(row)
    return rows


def main(argv: list[str] | None = None) -> pd.DataFrame:
    flags = plain_command_line("dendrites.starts", __doc__)
    flags.add_argument(
        "--hidden", type=int, nargs="+", default=[4, 8], help="hidden units (default 4 8)"
    )
    flags.add_argument(
        "--seeds", type=int, nargs="+", default=list(range(8)), help="of networks (default 0 to 7)"
    )
    flags.add_argument("--epochs", type=int, default=60, help="before a network grows (default 60)")
    flags.add_argument("--more", type=int, default=20, help="epochs after it (default 20)")
    flags.add_argument("--lr", type=float, default=1e-2, help="of Adam (default 0.01)")
    add_out(flags, "results/dendrites/starts", "folder of the tables")
    args = flags.parse_args(argv)
    frame = pd.DataFrame(
        [
            row
            for hidden in args.hidden
            for seed in args.seeds
            for row in look(hidden, seed, args.epochs, args.more, args.lr)
        ]
    )
    args.out.mkdir(parents=True, exist_ok=True)
    frame.to_csv(args.out / "starts.csv", index=False)
    numbers = frame.drop(columns="seed").groupby(["hidden", "way"], sort=False)
    print(numbers.mean().round(4).to_string())
    return frame


if __name__ == "__main__":
    main()
