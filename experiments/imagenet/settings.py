"""The settings of a run of `transfer_imagenet`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..cifar10.settings import Settings as TrainSettings
from ..cifar10.settings import parser
from ..training.choices import REGS
from ..training.flags import CommandLine, milestones, require_none
from ..training.names import Names
from .classes import CLASSES

SOURCES = ("imagenet32", "cifar10-half")
CHOICES = {
    "dataset": SOURCES,
    "imagenet_classes": tuple(CLASSES),
    "save_epochs": ("none", "best", "all"),
}
TEXTS = {
    "data": {
        "dataset": "what to pretrain on; cifar10-half needs no ImageNet",
        "imagenet_classes": "paper: the 250 fixed classes that the paper pretrained on; all: the "
        "1,000 of the set",
        "imagenet_data": "folder of ImageNet's 32x32 batches",
        "cifar_data": "folder that holds CIFAR-10, or into which it is downloaded",
        "data": "where cifar10mlp looks for its data; nothing here",
    },
    "transfer": {
        "transfer": "regress CIFAR-10's labels on the features",
        "transfer_milestones": "epochs after which, such as 0,5,10 (default after the last)",
        "transfer_train_size": "images of the regression (default all)",
        "transfer_test_size": "images it is tested on (default all)",
        "solve_kernel": "try many ridges, not only --kernel-reg",
        "kernel_reg": "ridge, relative to the mean of the kernel's diagonal",
    },
    "output": {
        "save_epochs": "networks to keep beside the checkpoint: none, the best, of every epoch",
    },
}
PAPER = {
    "r": "200",
    "lr": "0.01",
    "gclip": "0",
    "wd": "1e-4",
    "batch_size": "16",
    "epochs": "26 of 40",
    "bias_alpha": "0.5",
    "depth": "1, which its code calls 2",
    "kernel_reg": "1e-4 where k(1) = 0.5",
}
ALIASES = {"transfer_milestones": ("--transfer-milestone",)}


@dataclass(frozen=True)
class Settings(TrainSettings):
    """Pretraining as in `cifar10mlp`, with the original's defaults, and what to transfer when."""

    # the sizes don't influence training
    names = Names(
        "imagenet.transfer_imagenet",
        may_differ=("epochs", "implementation", "transfer_train_size", "transfer_test_size"),
    )
    dataset: str = "imagenet32"
    imagenet_data: str = "experiments/imagenet/data"
    imagenet_classes: str = "paper"
    cifar_data: str = "./dataset"
    r: int = 400
    lr: float = 2.0
    wd: float = 1e-4
    gclip: float = 0.2
    last_layer_alpha: float = 1.0
    bias_alpha: float = 1.0
    last_layer_lr_mult: float = 1.0
    batch_size: int = 64
    test_batch_size: int = 64
    epochs: int = 24
    transfer: bool = False
    transfer_milestones: str = ""
    transfer_train_size: int | None = None
    transfer_test_size: int | None = None
    solve_kernel: bool = False
    kernel_reg: float = 1e-2
    save_epochs: str = "none"

    def check(self) -> None:
        super().check()
        problems = []
        if not self.transfer and (self.transfer_milestones or self.solve_kernel):
            problems.append(
                "--transfer-milestones and --solve-kernel say when and how to transfer: they need "
                "--transfer"
            )
        early = [m for m in milestones(self.transfer_milestones) if m < 0]
        if early:
            problems.append(f"--transfer-milestones are epochs from 0 (untrained) on, got {early}")
        if self.kernel_reg < 0:
            problems.append(f"--kernel-reg must not be negative, got {self.kernel_reg}")
        require_none(problems)

    @classmethod
    def before(cls) -> dict[str, Any]:
        return super().before() | {"imagenet_classes": "all"}

    @property
    def when(self) -> list[int]:
        """Epochs after which to transfer; where none are named, after the last."""
        return (milestones(self.transfer_milestones) or [self.epochs]) if self.transfer else []

    @property
    def late(self) -> list[int]:
        """Milestones that the run never reaches."""
        return [m for m in self.when if m > self.epochs]

    @property
    def regs(self) -> list[float]:
        """Ridges of the regression, relative to the kernel's mean diagonal."""
        return sorted({*REGS, self.kernel_reg}) if self.solve_kernel else [self.kernel_reg]


def command_parser(description: str | None = None) -> CommandLine:
    """The command line: that of `cifar10mlp`, and what to transfer when."""
    command = "imagenet.transfer_imagenet"
    return parser(description, Settings, command, CHOICES, TEXTS, PAPER, ALIASES)
