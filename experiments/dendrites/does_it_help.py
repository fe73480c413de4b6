"""Do dendrites help? Against what a network gains by being made larger, at equal parameters and
equal epochs.

    python -m experiments.dendrites.does_it_help --hidden 4 8 --seeds 0 1 2 3 4 5 6 7 --out DIR
    python -m experiments.dendrites.does_it_help --set fashion --data FOLDER --hidden 8 --out DIR
    python -m experiments.dendrites.does_it_help --set resnet --data FOLDER --hidden 4 --out DIR

digits and fashion: a network d - h - 10 with h small, whose two layers may grow; resnet: a small
ResNet on Fashion-MNIST, of which only the last block, before the last layer, may grow, h its inner
channels. Adam, a learning rate that falls to a tenth at plateaus. Every arm stops after the epochs
that the first took for the same seed, and restarts the learning rate from the best weights at each
plateau:

dendrites      begin as drawn, nearly constant (init="draw")
standardised   begin with pre-activations of unit variance (init="standardised")
gradient       begin where the outgoing weight gets the largest gradient (init="gradient")
restarts       nothing grows
width          hidden units with outgoing weights of zero are added at plateaus, as many as a
               generation of dendrites has parameters
wide           as large from the start as the first arm was in the end

Each finished arm is a row of results.csv; the same command goes on where it stopped.
"""

import copy
import csv

import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from pilimit_lib.dendrites import DendriteConfig, Growth, Patience, Plateau, dendritic

from ..training.flags import add_out, plain_command_line
from .data import digits, fashion
from .growing_networks import (
    Kind,
    mlp,
    parameters,
    resnet,
    size_of_a_generation,
    units_for,
)
from .training import accuracy, train_epoch

ARMS = ("dendrites", "standardised", "gradient", "restarts", "width", "wide")
INIT = {"dendrites": "draw", "standardised": "standardised", "gradient": "gradient"}
COLUMNS = ["hidden", "seed", "arm", "val", "test", "parameters", "epochs"]
KINDS = {"digits": mlp(64), "fashion": mlp(784), "resnet": resnet()}
MANY = 10**6
LOOK = 500  # images in a batch of errors that a start by gradient looks at


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
        convert=[f".{name}" for name in KINDS[args.set].grows],
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
    config = config_of(args, seed, grows, INIT.get(arm, "draw"))
    best = Best(sets)
    batches = [(x, y) for x, y in zip(*(part.split(LOOK) for part in sets["train"]))]
    growth = Growth(
        dendritic(KINDS[args.set].network(hidden), config),
        config,
        optimizer=lambda ps: torch.optim.Adam(ps, args.lr, fused=True),
        scheduler=lambda o: ReduceLROnPlateau(o, "max", patience=args.scheduler_patience),
        select=None if grows else lambda net: [],
        losses=lambda net: (nn.functional.cross_entropy(net(x), y) for x, y in batches),
    )
    for _ in range(epochs):
        train_epoch(growth.model, growth.optimizer, *sets["train"])
        if growth.step(best.score(growth.model)).complete:
            break
    return {**best.row, "epochs": best.epochs}


def made_wider(args, kind: Kind, hidden: int, seed: int, sets, more: int, epochs: int) -> dict:
    """Width instead of dendrites, decided by the same plateaus; ``more`` units at a time."""
    torch.manual_seed(seed)
    plateau, best = Plateau(config_of(args, seed, grows=more > 0)), Best(sets)
    net = kind.network(hidden)
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
            net = kind.widened(grown_from, more) if more else copy.deepcopy(kept)
            optimizer, scheduler = optimisers(net, args)
    return {**best.row, "epochs": best.epochs}


def main(argv=None):
    parser = plain_command_line("dendrites.does_it_help", __doc__)
    parser.add_argument(
        "--hidden", type=int, nargs="+", default=[4, 8], help="hidden units (default 4 8)"
    )
    parser.add_argument(
        "--set",
        choices=tuple(KINDS),
        default="digits",
        help="images and network that are compared (default digits)",
    )
    parser.add_argument(
        "--data", default="dataset", help="folder of the Fashion-MNIST files (default dataset)"
    )
    parser.add_argument(
        "--train", type=int, default=2500, help="training images of Fashion-MNIST (default 2500)"
    )
    parser.add_argument(
        "--val", type=int, default=1500, help="validation images of Fashion-MNIST (default 1500)"
    )
    parser.add_argument(
        "--test", type=int, default=3000, help="test images of Fashion-MNIST (default 3000)"
    )
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=list(range(8)),
        help="one run of each arm for each (default 0 to 7)",
    )
    parser.add_argument(
        "--arms",
        choices=ARMS,
        nargs="+",
        default=list(ARMS),
        help="ways of growing that are compared (default all)",
    )
    add_out(
        parser,
        "results/dendrites/does_it_help",
        "folder of results.csv, from which a command goes on",
    )
    parser.group("output").add_argument(
        "--overwrite",
        action="store_true",
        help="begin anew in --save-dir instead of going on where the command was stopped",
    )
    parser.add_argument("--lr", type=float, default=1e-2, help="of Adam (default 0.01)")
    parser.add_argument(
        "--patience",
        type=int,
        default=8,
        help="epochs without progress before a network grows (default 8)",
    )
    parser.add_argument(
        "--scheduler-patience",
        type=int,
        default=3,
        help="epochs without progress before the learning rate falls (default 3)",
    )
    parser.add_argument(
        "--max-dendrites", type=int, default=3, help="generations of dendrites at most (default 3)"
    )
    parser.add_argument("--max-epochs", type=int, default=120, help="epochs at most (default 120)")
    args = parser.parse_args(argv)
    sets = digits()
    if args.set != "digits":
        sets = fashion(args.data, args.train, args.val, args.test)
    kind, file = KINDS[args.set], args.out / "results.csv"
    if args.overwrite:
        file.unlink(missing_ok=True)
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
                    start = units_for(kind, size) if larger else hidden
                    more = 0 if arm == "wide" else size_of_a_generation(kind, hidden)
                    row = made_wider(args, kind, start, seed, sets, more, epochs)
                else:
                    row = grown(args, hidden, seed, sets, arm, epochs)
                row = {"hidden": hidden, "seed": seed, "arm": arm, **row}
                done[hidden, seed, arm] = row
                with open(file, "a", newline="") as rows:
                    csv.DictWriter(rows, COLUMNS).writerow(row)
                print(row, flush=True)


if __name__ == "__main__":
    main()
