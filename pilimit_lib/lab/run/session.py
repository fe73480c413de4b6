"""What one run consists of: model, optimiser, loaders, counters, journal, checkpoints, and how far
it has come. Operations on it stand beside; `Lab` is what users hold."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..data.ledger import Ledger
from ..data.loader import LabLoader
from ..neurons.counters import Neurons, TrackingMode
from ..neurons.couplings import Planner, execution_order
from ..neurons.geometry import is_layer
from ..neurons.hooks import Tracking
from ..neurons.step_scaling import StepScaling
from ..neurons.tracked import TrackedNetwork, undisturbed
from .checkpoints import CheckpointManager
from .journal import Journal


def first(batch: Any) -> tuple:
    """The model's inputs where nothing else is said: the first entry of a batch."""
    if isinstance(batch, Tensor):
        return (batch,)
    if isinstance(batch, list | tuple) and len(batch):
        return (batch[0],)
    raise TypeError(
        f"the loader serves a {type(batch).__name__}, which does not say what the model's input "
        "is; pass inputs=lambda batch: (batch['image'],) to watch"
    )


class Session:
    """The state of a run; for the arguments see `watch`. Without a `tracking` nothing is counted
    but in a mode that was set by hand.

    `age` counts training samples learned from, `steps` training steps; `window` holds loss and hits
    of the steps since the last scalar; `finite` says whether the last recorded loss was; `past` is
    what `undo` goes back to: a summary of each of the last `undo_depth` edits with the way back
    before it.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer | None = None,
        loader: LabLoader | None = None,
        eval_loader: LabLoader | None = None,
        *,
        example: Any = None,
        inputs: Callable[[Any], tuple] = first,
        folder: str | Path | None = None,
        name: str | None = None,
        also: dict[str, Any] | None = None,
        tracking: Tracking | None = None,
        nonfinite: str = "stop",
        log_every: int = 10,
        undo_depth: int = 1,
    ) -> None:
        self.module, self.optimizer = module, optimizer
        self.loader, self.eval_loader = loader, eval_loader
        self.inputs, self.also, self.log_every = inputs, dict(also or {}), log_every
        self.tracking = tracking or Tracking(module, manual=True)
        self.folder = None if folder is None else Path(folder)
        self.journal, self.chkpt_manager = Journal(), None
        if self.folder is not None:
            self.journal = Journal(self.folder / "journal.jsonl")
            self.chkpt_manager = CheckpointManager(self.folder / "checkpoints")
            name = name or self.folder.resolve().name
        self.name = name or type(module).__name__
        if nonfinite not in ("stop", "skip"):
            raise ValueError(f"nonfinite={nonfinite!r}: 'stop' or 'skip' was expected")
        self.nonfinite, self.finite = nonfinite, True
        self.age = self.steps = 0
        self.window: list[list[float]] = []
        self.past: list[tuple[str, Any]] = []
        self.undo_depth, self.editing = undo_depth, False
        self.on_scalars: Callable[[str, int, dict[str, float]], None] | None = None
        self._example = example if example is None or isinstance(example, tuple) else (example,)
        self._planner: Planner | None = None
        self._order: list[nn.Module] | None = None
        self._scaling: StepScaling | None = None
        if optimizer is not None:
            self._scaling = StepScaling(optimizer, self.neurons, self._before_step)
        if isinstance(module, TrackedNetwork):
            module.__dict__["_session"] = self
        for which, served in (("train", loader), ("eval", eval_loader)):
            if served is not None:
                served.dataset.listener = partial(self.note, data=which)

    def __reduce__(self) -> tuple:
        return type(None), ()  # a copy of a watched model is not watched

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.described()}"

    def described(self) -> str:
        """What this run is and where it stands, in a few lines."""
        sizes = sum(p.numel() for p in self.module.parameters())
        what = f"'{self.name}': {type(self.module).__name__} ({sizes:,} parameters)"
        if self.optimizer is not None:
            rates = ", ".join(f"{group['lr']:g}" for group in self.optimizer.param_groups)
            what += f", {type(self.optimizer).__name__} at learning rate {rates}"
        lines = [what, f"age {self.age:,} samples, {self.steps:,} steps"]
        for which, loader in self.loaders().items():
            samples, allowed = len(loader.dataset), loader.dataset.allowed
            denied = f", {samples - allowed:,} denied" if allowed < samples else ""
            lines.append(
                f"{which} set: {samples:,} samples{denied}, batches of {loader.batch_size}"
            )
        if self.chkpt_manager is not None:
            current = self.chkpt_manager.current
            stands = "" if current is None else f", grown out of checkpoint {current}"
            lines.append(f"{len(self.chkpt_manager)} checkpoints in {self.folder}{stands}")
        return "\n  ".join(lines)

    def _before_step(self) -> None:
        if self.editing:
            raise RuntimeError(
                "a training step inside `with edit()`, which the block could not take back; leave "
                "the block first"
            )

    def close(self) -> None:
        """Stop watching: all hooks are taken off, and the model is as it would be without the
        lab."""
        self.tracking.close()
        if self._scaling is not None:
            self._scaling.remove()
        if self.module.__dict__.get("_session") is self:
            del self.module.__dict__["_session"]

    @property
    def neurons(self) -> dict[nn.Module, Neurons]:
        """Counters and rates by layer."""
        return self.tracking.neurons

    @property
    def tracking_mode(self) -> TrackingMode:
        """Which counters a forward pass feeds: TRAIN or EVAL in steps, by `model.training`, and
        DISABLED otherwise. A mode that is set wins, until None is set."""
        return self.tracking.mode

    @tracking_mode.setter
    def tracking_mode(self, mode: TrackingMode | None) -> None:
        self.tracking.mode = mode

    def tracking_paused(self) -> AbstractContextManager[None]:
        """Forward passes inside the `with` are not counted."""
        return self.tracking.pause()

    def ledger(self, which: str = "train") -> Ledger:
        """The ledger of the training or the evaluation set."""
        return self.loaders()[which].dataset.ledger

    def loaders(self) -> dict[str, LabLoader]:
        """The loaders that are watched, by "train" and "eval"."""
        both = {"train": self.loader, "eval": self.eval_loader}
        return {which: loader for which, loader in both.items() if loader is not None}

    def note(self, kind: str, **fields: Any) -> None:
        """Put an event on the timeline."""
        self.journal.write(kind, age=self.age, step=self.steps, **fields)

    def example(self) -> tuple:
        """A small batch of inputs, on which couplings are traced and edits are checked: the given
        one, what the model was last seen to get, or the first samples of the loader."""
        if self._example is None:
            self._example = self._found_example()
        device = next((p.device for p in self.module.parameters()), torch.device("cpu"))
        return tuple(arg.to(device) if isinstance(arg, Tensor) else arg for arg in self._example)

    def _found_example(self) -> tuple:
        seen = self.tracking.example
        if self.loader is None or (seen is not None and len(seen) == 1 and self.inputs is first):
            if seen is not None:
                return seen
            if "_example" in self.module.__dict__:
                return (self.module.__dict__["_example"],)
            raise ValueError(
                "planning needs an example input: pass example=, watch a loader, or run the model "
                "once"
            )
        with undisturbed(self.module):
            batch = self.loader.fetch(np.arange(min(4, len(self.loader.dataset))))
        return self.inputs(batch)

    def planner(self) -> Planner:
        """Couplings of the present architecture; traced once."""
        if self._planner is None:
            self._planner = Planner(self.module, self.example())
        return self._planner

    def forget_plans(self) -> None:
        """The architecture changed: trace again when next asked."""
        self._planner = None

    def layers(self) -> list[nn.Module]:
        """The layers with neurons as `layer_index` counts them: the model's own list `layers`, or
        the order in which a forward pass reaches them (found once, edits do not change it)."""
        own = self.module.__dict__.get("layers", self.module._modules.get("layers"))
        if isinstance(own, list | tuple | nn.ModuleList) and len(own) and all(map(is_layer, own)):
            return list(own)
        if self._order is None:
            self._order = execution_order(self.module, self.example())
        return self._order

    def paths(self) -> dict[nn.Module, str]:
        """The path of each module in the model."""
        return {module: path for path, module in self.module.named_modules()}

    def layer_paths(self) -> list[str]:
        """The paths of `layers()`."""
        paths = self.paths()
        return [paths[layer] for layer in self.layers()]

    def settings(self) -> dict[str, Any]:
        """What was chosen rather than learned: hashed into each checkpoint."""
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        return {
            "name": self.name,
            "model": type(self.module).__name__,
            "optimizer": type(self.optimizer).__name__,
            "groups": [
                {
                    key: value if isinstance(value, int | float | str | None) else str(value)
                    for key, value in group.items()
                    if key != "params"
                }
                for group in groups
            ],
            "batch_size": None if self.loader is None else self.loader.batch_size,
        }
