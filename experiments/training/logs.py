"""Logs outside of this library: the numbers of every epoch in TensorBoard and Weights & Biases."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from pilimit_lib.core import write_text

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}


class Logged(Protocol):
    """What of a trainer is logged."""

    epoch: int
    records: list[dict[str, Any]]

    def scalars(self) -> dict[str, float]: ...


Listener = Callable[[Any, Path], None]


def logs(
    kinds: Sequence[str], settings: dict[str, Any], also: Listener | None = None
) -> Listener | None:
    """What `loop.fit` shall call at every epoch to log to these `kinds`, after `also`.

    Raises ImportError, before anything is trained, where the package of a kind is not installed.
    """
    for kind in kinds:
        if find_spec(PACKAGES[kind]) is None:
            raise ImportError(
                f"--log {kind} needs {PACKAGES[kind]}, which is not installed: "
                f"pip install 'pilimit[{kind}]'"
            )
    if not kinds:
        return also
    writers = [{"tensorboard": TensorBoard, "wandb": Wandb}[kind](settings) for kind in kinds]
    first = os.environ.get("RANK", "0") == "0"  # of several processes of one run one logs

    def at_epoch(trainer: Logged, folder: Path) -> None:
        if also is not None:
            also(trainer, folder)
        for writer in writers if first else ():
            writer.write(trainer, folder)

    return at_epoch


class TensorBoard:
    """Event files in the folder `tensorboard` of a run. A resumed run goes on in them."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings, self.writer = settings, None

    def write(self, trainer: Logged, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if self.writer is None:
            self.writer = SummaryWriter(folder / "tensorboard", purge_step=trainer.epoch)
            self.writer.add_text("settings", f"```\n{json.dumps(self.settings, indent=2)}\n```")
        if not trainer.records:
            return
        for name, value in trainer.scalars().items():
            self.writer.add_scalar(name, value, trainer.epoch)
        self.writer.flush()


class Wandb:
    """A run of Weights & Biases, whose id is kept in the run's folder so that it is resumed too."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings, self.run = settings, None

    def write(self, trainer: Logged, folder: Path) -> None:
        import wandb

        if self.run is None:
            kept = folder / "wandb_id.txt"
            if not trainer.epoch or not kept.is_file():
                write_text(kept, secrets.token_hex(8))
            self.run = wandb.init(
                project="pilimit",
                name=folder.name,
                dir=str(folder),
                id=kept.read_text(),
                resume="allow",
                config=self.settings,
            )
        if trainer.records:
            self.run.log(trainer.scalars(), step=trainer.epoch)
