"""Do dendrites help? Against what a network gains by being made larger, at equal parameters and
equal epochs.

    python -m experiments.dendrites.does_it_help --hidden 4 8 --seeds 0 1 2 3 4 5 6 7 --out DIR

Digits, a network 64 - h - 10 with h small, Adam, a learning rate that halves at plateaus. Every arm
stops after the epochs that the first took for the same seed, and restarts the learning rate from
the best weights at each plateau:

dendrites      begin as drawn, nearly constant (init="draw")
standardised   begin with pre-activations of unit variance (init="standardised")
restarts       nothing grows
width          hidden units with outgoing weights of zero are added at plateaus, as many as a
               generation of dendrites has parameters
wide           as large from the start as the first arm was in the end

Each finished arm is a row of results.csv; the same command goes on where it stopped.
"""

import argparse
import copy
import csv
from pathlib import Path

import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from experiments.dendrites.data import digits
from experiments.dendrites.training import accuracy, train_epoch
from pilimit_lib.dendrites import DendriteConfig, Growth, Patience, Plateau, dendritic

ARMS = ("dendrites", "standardised", "restarts", "width", "wide")
COLUMNS = ["hidden", "seed", "arm", "val", "test", "parameters", "epochs"]
MANY = 10**6


def network(hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def widened(net: nn.Sequential, more: int) -> nn.Sequential:
    """The same function with more hidden units: incoming weights as Linear draws them, outgoing
    ones zero."""
    old_in, old_out = net[1], net[3]
    hidden = old_in.out_features
    new = network(hidden + more)
    with torch.no_grad():
        new[1].weight[:hidden], new[1].bias[:hidden] = old_in.weight, old_in.bias
        new[3].weight.zero_()
        new[3].weight[:, :hidden], new[3].bias[:] = old_out.weight, old_out.bias
    return new


def optimisers(net: nn.Module, args):
    optimizer = torch.optim.Adam(net.parameters(), args.lr, fused=True)
    return optimizer, ReduceLROnPlateau(optimizer, "max", patience=args.scheduler_patience)


class Best:
    """The network with the best validation score so far, and its test score."""

    def __init__(self, sets):
        self.sets, self.row, self.epochs = sets, {"val": -1.0}, 0

    def score(self, net: nn.Module) -> float:
        self.epochs += 1
        value = accuracy(net, *self.sets["val"])
        if value > self.row["val"]:
            test = accuracy(net, *self.sets["test"])
            self.row = {"val": value, "test": test, "parameters": parameters(net)}
        return value


def config_of(args, seed: int, grows: bool, init: str = "draw") -> DendriteConfig:
    return DendriteConfig(
        switch=Patience(patience=args.patience),
        max_dendrites=args.max_dendrites if grows else MANY,
        max_tries=2 if grows else MANY,
        find_best_lr=False,
        wait_for_lower_lr=False,
        optimizer_state="reset",
        seed=seed,
        init=init,
    )


def grown(args, hidden: int, seed: int, sets, arm: str, epochs: int) -> dict:
    """Dendrites, however they begin, or (restarts) the same run in which no layer is chosen."""
    torch.manual_seed(seed)
    grows = arm != "restarts"
    config = config_of(args, seed, grows, "standardised" if arm == "standardised" else "draw")
    best = Best(sets)
    growth = Growth(
        dendritic(network(hidden), config),
        config,
        optimizer=lambda ps: torch.optim.Adam(ps, args.lr, fused=True),
        scheduler=lambda o: ReduceLROnPlateau(o, "max", patience=args.scheduler_patience),
        select=None if grows else lambda net: [],
    )
    for _ in range(epochs):
        train_epoch(growth.model, growth.optimizer, *sets["train"])
        if growth.step(best.score(growth.model)).complete:
            break
    return {**best.row, "epochs": best.epochs}


def made_wider(args, hidden: int, seed: int, sets, more: int, epochs: int) -> dict:
    """Width instead of dendrites, decided by the same plateaus; ``more`` units at a time."""
    torch.manual_seed(seed)
    plateau, best = Plateau(config_of(args, seed, grows=more > 0)), Best(sets)
    net = network(hidden)
    kept, grown_from = copy.deepcopy(net), None
    optimizer, scheduler = optimisers(net, args)
    for _ in range(epochs):
        train_epoch(net, optimizer, *sets["train"])
        score = best.score(net)
        scheduler.step(score)
        decision = plateau.observe(score)
        if decision.new_best:
            kept = copy.deepcopy(net)
        if decision.action == "finish":
            break
        if decision.action in ("grow", "retry"):
            grown_from = kept if decision.action == "grow" or grown_from is None else grown_from
            net = widened(grown_from, more) if more else copy.deepcopy(kept)
            optimizer, scheduler = optimisers(net, args)
    return {**best.row, "epochs": best.epochs}


def size_of_a_generation(hidden: int) -> int:
    """Hidden units that have as many parameters as the first dendrites of both layers."""
    dendrites = parameters(network(hidden)) + hidden + 10
    return round(dendrites / (64 + 1 + 10))


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(8)))
    parser.add_argument("--arms", choices=ARMS, nargs="+", default=list(ARMS))
    parser.add_argument("--out", default="results/dendrites/does_it_help")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--patience", type=int, default=8)
    parser.add_argument("--scheduler-patience", type=int, default=3)
    parser.add_argument("--max-dendrites", type=int, default=3)
    parser.add_argument("--max-epochs", type=int, default=120)
    args = parser.parse_args(argv)
    sets, file = digits(), Path(args.out) / "results.csv"
    file.parent.mkdir(parents=True, exist_ok=True)
    done = {}
    if file.is_file():
        with open(file, newline="") as rows:
            done = {(int(r["hidden"]), int(r["seed"]), r["arm"]): r for r in csv.DictReader(rows)}
    else:
        file.write_text(",".join(COLUMNS) + "\n")
    for hidden in args.hidden:
        for seed in args.seeds:
            for arm in args.arms:
                if (hidden, seed, arm) in done:
                    continue
                first = done.get((hidden, seed, ARMS[0]))
                epochs = args.max_epochs if first is None else int(first["epochs"])
                if arm in ("width", "wide"):
                    larger = arm == "wide" and first is not None
                    size = int(first["parameters"]) if larger else 0
                    start = max(1, round((size - 10) / 75)) if larger else hidden
                    more = 0 if arm == "wide" else size_of_a_generation(hidden)
                    row = made_wider(args, start, seed, sets, more, epochs)
                else:
                    row = grown(args, hidden, seed, sets, arm, epochs)
                row = {"hidden": hidden, "seed": seed, "arm": arm, **row}
                done[hidden, seed, arm] = row
                with open(file, "a", newline="") as rows:
                    csv.DictWriter(rows, COLUMNS).writerow(row)
                print(row, flush=True)


if __name__ == "__main__":
    main()
