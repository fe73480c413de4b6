"""The settings of a training run of `cifar10conv`, and the command line made of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..training.choices import ACTIVATIONS, DATASETS, FITS, FLIPS, PADDING_MODES
from ..training.flags import (
    CommandLine,
    add_log,
    add_save_dir,
    add_switches,
    command_line,
    milestones,
    require_none,
    too_small,
)

if TYPE_CHECKING:
    from pilimit_lib.inf.conv.plan import Plan

NETWORKS = ("infinite", "twin", "mup", "batchnorm", "plain")


@dataclass(frozen=True)
class Settings:
    """One training run. The defaults train an infinite-width network on CIFAR-10."""

    dataset: str = "cifar10"
    data: str = "./dataset"
    train_subset_size: int | None = None
    test_subset_size: int | None = None
    held_out: int = 0
    network: str = "infinite"
    width: int = 0
    ranks: str = "8,16,24,32"
    pools: str = "2,2,1"
    shortcuts: str = ""
    strides: str = ""
    kernels: str = ""
    input_stride: int = 1
    padding_mode: str = "zeros"
    branch_gain: float = 0.0
    degree: int = 2
    fit: str = "minimax"
    activation: str = "relu"
    layernorm: bool = False
    first_layer_alpha: float = 1.0
    last_layer_alpha: float = 1.0
    bias_alpha: float = 0.0
    whiten: bool = False
    norm: str = "none"
    start_degree: int | None = None
    noise_width: int | None = None
    channels_last: bool = False
    optimizer: str = "adam"
    lr: float = 0.01
    high_degree_lr: float = 1.0
    momentum: float = 0.9
    betas: str = "0.9,0.999"
    wd: float = 0.0
    scheduler: str = "onecycle"
    lr_drop_ratio: float = 0.1
    lr_drop_milestones: str = ""
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
        zeros += ("held_out", "high_degree_lr", "lr_drop_ratio")
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
        if bool(milestones(self.lr_drop_milestones)) != (self.scheduler == "multistep"):
            problems.append("--scheduler multistep and --lr-drop-milestones belong together")
        if len(self.beta_list) != 2 or not all(0 <= beta < 1 for beta in self.beta_list):
            problems.append(
                f"--betas {self.betas!r} must be two numbers from 0 and below 1, such as .8,.9"
            )
        try:
            layers, pools, _ = len(self.rank_list), len(self.pool_list), self.shortcut_list
            if layers != pools + 1:
                problems.append(
                    f"--pools {self.pools} must have one entry less than --ranks {self.ranks}: one "
                    "for each hidden layer"
                )
            numbers(self.strides), numbers(self.kernels)
        except ValueError:
            problems.append(
                f"--ranks {self.ranks!r} and --pools {self.pools!r} are numbers separated by "
                f"commas, and so are --strides {self.strides!r} and --kernels {self.kernels!r}, "
                f"--shortcuts {self.shortcuts!r} pairs of layers such as 1-3,3-5"
            )
        require_none(problems)
        self.plan.check()

    @property
    def plan(self) -> Plan:
        """The shape of the network, whatever its kind."""
        from pilimit_lib.inf.conv.plan import Plan  # which imports torch, and --help need not

        kernels = numbers(self.kernels) or [3] * len(self.rank_list)
        strides = numbers(self.strides) or None
        return Plan.of(
            self.rank_list,
            self.pool_list,
            strides,
            self.shortcut_list,
            kernels,
            self.input_stride,
        )

    @property
    def beta_list(self) -> list[float]:
        try:
            return [float(part) for part in self.betas.split(",")]
        except ValueError:
            return []

    @property
    def rank_list(self) -> list[int]:
        return [int(part) for part in self.ranks.split(",")]

    @property
    def pool_list(self) -> list[int]:
        return numbers(self.pools)

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


def numbers(text: str) -> list[int]:
    """Whole numbers separated by commas; none of an empty text."""
    return [int(part) for part in text.split(",") if part.strip()]


CHOICES = {
    "padding_mode": PADDING_MODES,
    "norm": ("none", "scalar"),
    "fit": FITS,
    "activation": ACTIVATIONS,
    "optimizer": ("sgd", "adam", "adamw"),
    "dataset": DATASETS,
    "scheduler": ("none", "onecycle", "cosine", "multistep"),
    "network": NETWORKS,
}


TEXTS = {
    "network": {
        "network": "infinite; twin: the finite π-network sampled from it; mup, batchnorm, plain: "
        "ordinary ConvNets of the same shape, plain without any normalisation",
        "width": "channels of a finite network; 0 the infinite one",
        "ranks": "rank of the input layer and of each hidden layer",
        "pools": "for each hidden layer, the window over which activations are averaged before it",
        "shortcuts": "pairs of layers such as 1-3,3-5: the output of one is added to the other's",
        "branch_gain": "size of outputs at the start in layers to which a shortcut leads",
        "strides": "stride of each hidden layer (default 1)",
        "kernels": "side of the kernel of the input layer and of each hidden one (default 3)",
        "input_stride": "stride of the input layer",
        "padding_mode": "what lies beyond the border of a map",
        "activation": "activation of hidden units",
        "whiten": "start the input layer as a whitening of the patches of training images",
        "norm": "scalar: divide each layer's outputs by their root mean square length over batch "
        "and positions (infinite, twin)",
        "start_degree": "monomials of a higher degree start at 0 (infinite, twin; default none)",
        "noise_width": "disturb training as the finite network of this width would, fresh in every "
        "step (infinite; default no noise)",
        "channels_last": "store maps of ordinary ConvNets position by position, which CPUs like",
    },
    "optimiser": {
        "high_degree_lr": "the share of --lr for monomials of degree 2 and more (infinite)",
        "betas": "of --optimizer adam and adamw",
        "optimizer": "sgd on moments is the limit of projected SGD; Adam trains the same functions",
        "momentum": "of --optimizer sgd",
    },
    "schedule": {
        "scheduler": "how the learning rate goes: up and down, falling along a cosine, or at "
        "--lr-drop-milestones",
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
        "--beside",
        default="",
        help="finite networks to train too, such as batchnorm:16,mup:64, or "
        "batchnorm:64:.003,batchnorm:64:.01 with rates of their own",
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
        network, width, *rates = part.split(":")[:3] if ":" in part else (part, "")
        try:
            rate = float(*rates) if rates else lr
            known = network in NETWORKS[1:] and width.isdigit() and part.count(":") <= 2
        except ValueError:
            known = False
        if not known:
            raise ValueError(
                f"--beside {text!r}: {part!r} is not one of {', '.join(NETWORKS[1:])} with a "
                "width, such as batchnorm:64, or batchnorm:64:.01 with a learning rate"
            )
        result.append(
            replace(
                settings,
                network=network,
                width=int(width),
                lr=settings.lr if rate is None else rate,
                epochs=epochs or settings.epochs,
            )
        )
    return result
