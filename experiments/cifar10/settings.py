"""The settings of a training run of `cifar10mlp`, and the command line made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..training.choices import ACTIVATIONS, DATASETS, FITS
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
from ..training.names import Names

PAPERS_SETS = {"cifar10": "CIFAR-10", "imagenet32": "ImageNet32"}
REMOVED = {  # flags that did nothing in the original's library, or named what it never had
    "--last-layer-grad-no-alpha": "it had no effect in the original library",
    "--init-from-data": "it had no effect in the original library",
    "--init-A-B-direct": "it had no effect in the original library",
    "--cycarr": "it had no effect in the original library",
    "--cuda-batch-size": "rows are always walked in blocks that fit",
}


@dataclass(frozen=True)
class Settings:
    """One training run. The defaults train digits; the README lists those of the paper for
    CIFAR-10."""

    names = Names("cifar10.cifar10mlp", may_differ=("epochs", "implementation"))
    dataset: str = "digits"
    data: str = "./dataset"
    train_subset_size: int | None = None
    test_subset_size: int | None = None
    held_out: int = 0
    data_augment: bool = False
    augment_shift: int | None = None
    width: int = 0
    gaussian_init: bool = False
    r: int = 50
    depth: int = 2
    memory: str = "rows"
    degree: int = 2
    fit: str = "hermite"
    activation: str = "relu"
    row_budget: int | None = None
    merge: float | None = None
    optimizer: str = "sgd"
    layernorm: bool = False
    first_layer_alpha: float = 1.0
    last_layer_alpha: float = 0.5
    bias_alpha: float = 0.5
    last_bias_alpha: float | None = None
    loss: str = "xent"
    label_smoothing: float = 0.0
    lr: float = 1.0
    momentum: float = 0.0
    wd: float = 1e-5
    first_layer_lr_mult: float = 0.1
    last_layer_lr_mult: float = 4.0
    bias_lr_mult: float = 0.5
    no_apply_lr_mult_to_wd: bool = False
    gclip: float = 0.4
    gclip_per_param: bool = False
    scheduler: str = "None"
    lr_drop_ratio: float = 0.5
    lr_drop_milestones: str = ""
    gclip_drop_ratio: float = 0.5
    gclip_drop_milestones: str = ""
    batch_size: int = 8
    accum_steps: int = 1
    test_batch_size: int = 512
    epochs: int = 8
    average_from: int | None = None
    seed: int = 1
    implementation: str = "auto"
    cuda: bool = False
    float: bool = False
    teacher_path: str = ""
    teacher_alpha: float = 0.5
    teacher_temp: float = 1.0

    @classmethod
    def before(cls) -> dict[str, Any]:
        """What a run had whose settings.json is older than a setting."""
        return asdict(cls())

    def check(self) -> None:
        """Raise on settings that contradict each other or can't be meant."""
        ones = ("r", "batch_size", "accum_steps", "test_batch_size", "epochs")
        problems = too_small(self, ones, 1)
        problems += too_small(self, ("width", "depth", "wd", "gclip", "momentum", "held_out"), 0)
        if self.gaussian_init and not self.width:
            problems.append("--gaussian-init makes a finite μ-network: give its --width")
        if self.optimizer != "sgd":
            if (self.memory == "rows" or self.row_budget is not None) and not self.width:
                problems.append(
                    f"--optimizer {self.optimizer} needs --memory moments without --row-budget: "
                    "rows are appended by "
                    "SGD only"
                )
            if self.momentum:
                problems.append(f"--momentum is SGD's; --optimizer {self.optimizer} has its own")
        if bool(milestones(self.lr_drop_milestones)) != (self.scheduler == "multistep"):
            problems.append("--scheduler multistep and --lr-drop-milestones belong together")
        if self.gclip_drop_milestones and not self.gclip:
            problems.append(
                "--gclip-drop-milestones lower the clip, but --gclip is 0 (no clipping)"
            )
        if self.augment_shift is not None and (self.augment_shift < 0 or not self.data_augment):
            problems.append(
                f"--augment-shift {self.augment_shift}: pixels that --data-augment (which it "
                "needs) moves an image, "
                "0 or more"
            )
        if not 0 <= self.label_smoothing < 1 or self.label_smoothing and self.loss != "xent":
            problems.append(
                f"--label-smoothing {self.label_smoothing} must be at least 0 and below 1, and "
                "belongs to --loss xent"
            )
        if self.average_from is not None:
            if not 0 < self.average_from <= self.epochs:
                problems.append(
                    f"--average-from {self.average_from} is the first epoch whose end is averaged: "
                    f"from 1 to --epochs {self.epochs}"
                )
            if not self.width and (self.memory == "rows" or self.row_budget is not None):
                problems.append(
                    "--average-from needs parameters that keep their sizes: --memory moments "
                    "without --row-budget, or a --width"
                )
        if not self.teacher_path and (self.teacher_alpha, self.teacher_temp) != (0.5, 1.0):
            problems.append("--teacher-alpha and --teacher-temp need a --teacher-path")
        require_none(problems)

    @property
    def sums(self) -> tuple[str, ...]:
        """What an infinite network sums over: rows, moments, or with a budget both."""
        if self.width:
            return ()
        if self.row_budget is not None:
            return "rows", "moments"
        return (self.memory,)

    @property
    def not_native(self) -> str | None:
        """Why C++ can't sum for this run on any machine, or None."""
        if self.cuda:
            return "it runs on the CPU, and --cuda was given"
        if "moments" in self.sums and self.degree > 2:
            return f"it knows degrees up to 2, and --degree is {self.degree}"
        return None

    def describe(self) -> str:
        finite = f"{'μ' if self.gaussian_init else 'π'}-network, width {self.width}"
        kind = finite if self.width else "infinite π-network"
        return f"{kind}, r={self.r}, depth {self.depth}, seed {self.seed}"

    def note_on_depth(self) -> str:
        """What to say before training where the network on a set of the paper's isn't the paper's,
        else nothing."""
        if self.dataset not in PAPERS_SETS or self.depth == 1:
            return ""
        count = {0: "no hidden π-layer", 2: "two hidden π-layers"}.get(
            self.depth, f"{self.depth} hidden π-layers"
        )
        return (
            f"--depth {self.depth} is {count} between input layer and readout; the paper's network "
            f"on {PAPERS_SETS[self.dataset]} has one: --depth 1 (the paper's code, which counts "
            "stages of ReLU units, calls it depth 2)"
        )


CHOICES = {
    "implementation": ("auto", "plain", "native"),
    "memory": ("rows", "moments"),
    "fit": FITS,
    "activation": ACTIVATIONS,
    "optimizer": ("sgd", "adam", "adamw"),
    "dataset": DATASETS,
    "loss": ("xent", "mse"),
    "scheduler": ("None", "cosine", "multistep"),
}

# of the runs for CIFAR-10, where it differs from what is meant by leaving the flag out
PAPER = {
    "dataset": "cifar10",
    "r": "200 and 400",
    "depth": "1, which its code, counting stages of ReLU units, calls 2",
    "lr": "1.0",
    "gclip": "0.4 per parameter",
    "wd": "1e-5, the same in all layers",
    "batch_size": "8",
    "epochs": "50",
    "first_layer_lr_mult": "0.1",
    "last_layer_lr_mult": "4",
    "bias_lr_mult": "0.5",
    "bias_alpha": "0.5",
    "first_layer_alpha": "1",
    "last_layer_alpha": "0.5",
    "scheduler": "multistep",
    "lr_drop_ratio": "0.15",
    "lr_drop_milestones": "40",
    "gclip_drop_ratio": "0.15",
    "gclip_drop_milestones": "40",
    "gclip_per_param": "on",
    "no_apply_lr_mult_to_wd": "on",
}

# what concerns a run's output, and is no part of its settings
OUTPUT = ("resume", "overwrite", "model_path", "save_model", "quiet", "human", "verbose", "log")


def parser(
    description: str | None = None,
    settings: type[Settings] = Settings,
    command: str = "cifar10.cifar10mlp",
    more_choices: Mapping[str, tuple[str, ...]] | None = None,
    texts: Mapping[str, Mapping[str, str]] | None = None,
    paper: Mapping[str, str] = PAPER,
    aliases: Mapping[str, Sequence[str]] | None = None,
) -> CommandLine:
    """The command line of a training run: one flag per setting, and what concerns the output
    only."""
    result = command_line(
        command,
        settings,
        description,
        choices={**CHOICES, **(more_choices or {})},
        texts=texts,
        paper=paper,
        aliases=aliases,
    )
    result.group("network").add_argument(
        "--model-path", default="", help="start from this state_dict"
    )
    add_save_dir(result, command.split(".")[-1])
    switches = {
        "save-model": "write model.th (a state_dict) at the end",
        "resume": "continue the run in --save-dir",
        "overwrite": "replace the run in --save-dir",
        "test": "only test the network of --model-path",
        "verbose": "print the network",
        "quiet": "print nothing while training: no bar, no table",
        "human": "count rows in thousands",
    }
    add_switches(result, switches)
    add_log(result)
    return result
