"""How a command calls its files and flags. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Names:
    """What a command calls its files and flags, what a resumed run may have otherwise, and what an
    overwritten one may have left (patterns), `early` before it had anything to be resumed from."""

    command: str = "cifar10.cifar10mlp"
    settings: str = "settings.json"
    folder: str = "--save-dir"
    overwrite: str = "--overwrite"
    epochs: str = "--epochs"
    may_differ: tuple[str, ...] = ("epochs",)
    written: tuple[str, ...] = (
        "checkpoint.pt",
        "metrics.jsonl",
        "curves.png",
        "model.th",
        "model_best.th",
        "model_epoch_*.th",
    )
    early: tuple[str, ...] = ("transfer.png", "transfers.jsonl")
