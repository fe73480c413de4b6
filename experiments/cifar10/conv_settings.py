"""The settings of a training run of `cifar10conv`, and the command line made of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from experiments.training.choices import ACTIVATIONS, DATASETS, FITS, FLIPS
from experiments.training.flags import (
    CommandLine,
    add_log,
    add_save_dir,
    add_switches,
    command_line,
    require_none,
    too_small,
)

NETWORKS = ("infinite", "twin", "mup", "batchnorm")


@dataclass(frozen=True)
class Settings:
    """One training run. The defaults train an infinite-width network on CIFAR-10."""

    dataset: str = "cifar10"
    data: str = "./dataset"
    train_subset_size: int | None = None
    test_subset_size: int | None = None
    network: str = "infinite"
    width: int = 0
    ranks: str = "8,16,24,32"
    pools: str = "2,2,1"
    shortcuts: str = ""
    branch_gain: float = 0.0
    degree: int = 2
    fit: str = "minimax"
    activation: str = "relu"
    layernorm: bool = False
    first_layer_alpha: float = 1.0
    last_layer_alpha: float = 1.0
    bias_alpha: float = 0.0
    optimizer: str = "adam"
    lr: float = 0.01
    momentum: float = 0.9
    wd: float = 0.0
    scheduler: str = "onecycle"
    gclip: float = 1.0
    label_smoothing: float = 0.0
    ema: float = 0.0
    flips: bool | None = None  # None: where a mirrored image belongs to the same class
    shift: int = 0
    cutout: int = 0
    batch_size: int = 64
    test_batch_size: int = 250
    epochs: int = 12
    seed: int = 1
    cuda: bool = False

    def __post_init__(self) -> None:
        if self.flips is None:
            object.__setattr__(self, "flips", FLIPS.get(self.dataset, False))

    def check(self) -> None:
        """Raise on settings that contradict each other or can't be meant."""
        problems = too_small(self, ("batch_size", "test_batch_size", "epochs", "degree"), 1)
        zeros = ("wd", "gclip", "momentum", "shift", "cutout", "label_smoothing", "width")
        problems += too_small(self, zeros, 0)
        if not 0 <= self.ema < 1 or not self.label_smoothing < 1:
            problems.append(
                f"--ema {self.ema} and --label-smoothing {self.label_smoothing} must be at least 0 "
                "and below 1"
            )
        if (self.network == "infinite") != (self.width == 0):
            problems.append(
                f"--network {self.network} with --width {self.width}: a finite network has a "
                "width, the infinite one has none"
            )
        try:
            layers, pools, _ = len(self.rank_list), len(self.pool_list), self.shortcut_list
            if layers != pools + 1:
                problems.append(
                    f"--pools {self.pools} must have one entry less than --ranks {self.ranks}: one "
                    "for each hidden layer"
                )
        except ValueError:
            problems.append(
                f"--ranks {self.ranks!r} and --pools {self.pools!r} are numbers separated by "
                f"commas, --shortcuts {self.shortcuts!r} pairs of layers such as 1-3,3-5"
            )
        require_none(problems)

    @property
    def rank_list(self) -> list[int]:
        return [int(part) for part in self.ranks.split(",")]

    @property
    def pool_list(self) -> list[int]:
        return [int(part) for part in self.pools.split(",") if part.strip()]

    @property
    def shortcut_list(self) -> list[tuple[int, int]]:
        pairs = [
            tuple(map(int, part.split("-"))) for part in self.shortcuts.split(",") if part.strip()
        ]
        if any(len(pair) != 2 for pair in pairs):
            raise ValueError(self.shortcuts)
        return pairs

    @property
    def name(self) -> str:
        return (
            f"infinite, ranks {self.ranks}"
            if self.network == "infinite"
            else f"{self.network}, {self.width} channels"
        )


CHOICES = {
    "fit": FITS,
    "activation": ACTIVATIONS,
    "optimizer": ("sgd", "adam", "adamw"),
    "dataset": DATASETS,
    "scheduler": ("none", "onecycle", "cosine"),
    "network": NETWORKS,
}


TEXTS = {
    "network": {
        "network": "infinite; twin: the finite π-network sampled from it; mup, batchnorm: ordinary "
        "ConvNets of the same shape",
        "width": "channels of a finite network; 0 the infinite one",
        "ranks": "rank of the input layer and of each hidden layer",
        "pools": "for each hidden layer, the window over which activations are averaged before it",
        "shortcuts": "pairs of layers such as 1-3,3-5: the output of one is added to the other's",
        "branch_gain": "size of outputs at the start in layers to which a shortcut leads",
        "activation": "activation of hidden units",
    },
    "optimiser": {
        "optimizer": "sgd on moments is the limit of projected SGD; Adam trains the same functions",
        "momentum": "of --optimizer sgd",
    },
    "schedule": {
        "scheduler": "how the learning rate goes: up and down, or falling along a cosine",
    },
}


def parser(description: str | None = None) -> CommandLine:
    """The command line of `cifar10conv`: one flag per setting, and what concerns the output
    only."""
    result = command_line(
        "cifar10.cifar10conv",
        Settings,
        description,
        choices=CHOICES,
        texts=TEXTS,
    )
    beside = result.group("networks beside it")
    beside.add_argument(
        "--beside", default="", help="finite networks to train too, such as batchnorm:16,mup:64"
    )
    beside.add_argument(
        "--beside-lr", type=float, help="their learning rate (default that of --lr)"
    )
    beside.add_argument(
        "--beside-epochs", type=int, help="their number of epochs (default that of --epochs)"
    )
    add_save_dir(result, "cifar10conv")
    switches = {
        "resume": "continue the runs in --save-dir",
        "overwrite": "replace the runs in --save-dir",
        "save-model": "write model.th (a state_dict) at the end",
        "quiet": "print nothing while training",
        "verbose": "print the network",
    }
    add_switches(result, switches)
    add_log(result)
    return result


def beside(text: str, settings: Settings, lr: float | None, epochs: int | None) -> list[Settings]:
    """Settings of the finite networks that `text`, such as batchnorm:16,mup:64, asks for."""
    result = []
    for part in filter(None, text.split(",")):
        network, _, width = part.partition(":")
        if network not in NETWORKS[1:] or not width.isdigit():
            raise ValueError(
                f"--beside {text!r}: {part!r} is not one of {', '.join(NETWORKS[1:])} with a "
                "width, such as batchnorm:64"
            )
        result.append(
            replace(
                settings,
                network=network,
                width=int(width),
                lr=settings.lr if lr is None else lr,
                epochs=epochs or settings.epochs,
            )
        )
    return result
