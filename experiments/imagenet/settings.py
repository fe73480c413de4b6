"""The settings of a run of `transfer_imagenet`."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.cifar10.settings import Settings as TrainSettings
from experiments.training.choices import REGS
from experiments.training.flags import milestones, require_none
from experiments.training.names import Names

SOURCES = ("imagenet32", "cifar10-half")
CHOICES = {"dataset": SOURCES, "save_epochs": ("none", "best", "all")}


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
