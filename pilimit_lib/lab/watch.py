"""The lab around a model, an optimiser and a loader: whatever the training loop, it can be looked
into and operated on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from pilimit_lib.core import current_ids, follow

from .data.ledger import Ledger
from .data.loader import LabLoader
from .edits.history import History
from .edits.ops import ModelOps
from .network import NetworkWithOps
from .neurons.counters import Neurons, TrackingMode
from .neurons.couplings import Planner, execution_order
from .neurons.hooks import Tracking
from .neurons.step_scaling import StepScaling
from .neurons.undisturbed import undisturbed
from .provenance import Provenance
from .report import stats
from .run.checkpoints import CheckpointManager
from .run.journal import Journal
from .run.state import full_state, hashes, network_state, set_full_state


def _first(batch: Any) -> tuple:
    if isinstance(batch, Tensor):
        return (batch,)
    if isinstance(batch, list | tuple) and len(batch):
        return (batch[0],)
    raise TypeError(
        f"the loader serves a {type(batch).__name__}, which does not say what the model's input "
        "is; "
        "pass inputs=lambda batch: (batch['image'],) to watch"
    )


class Lab:
    """See `watch`. `model` operates on the architecture, `loader` serves the samples, `neurons`
    holds counters and rates."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer | None = None,
        loader: LabLoader | None = None,
        eval_loader: LabLoader | None = None,
        *,
        example: Any = None,
        inputs: Callable[[Any], tuple] = _first,
        folder: str | Path | None = None,
        name: str | None = None,
        also: dict[str, Any] | None = None,
        auto_track: bool = False,
        log_every: int = 10,
        undo_depth: int = 1,
    ) -> None:
        self.module, self.optimizer, self.loader, self.eval_loader = (
            module,
            optimizer,
            loader,
            eval_loader,
        )
        self.inputs, self.also = inputs, dict(also or {})
        self.log_every, self.tracking, self.history = (
            log_every,
            Tracking(module, auto_track),
            History(self, undo_depth),
        )
        self.folder = None if folder is None else Path(folder)
        self.name = name or (
            type(module).__name__ if self.folder is None else self.folder.resolve().name
        )
        self.journal = Journal(None if self.folder is None else self.folder / "journal.jsonl")
        self.chkpt_manager = (
            None if self.folder is None else CheckpointManager(self.folder / "checkpoints")
        )
        self.age = self.steps = 0
        self.window: list[list[float]] = []  # losses and hits of the steps since the last scalar
        self.on_scalars: Callable[[str, int, dict[str, float]], None] | None = None
        self._example = (
            None if example is None else (example if isinstance(example, tuple) else (example,))
        )
        self._planner: Planner | None = None
        self._order: list[nn.Module] | None = None
        self._scaling = None if optimizer is None else StepScaling(optimizer, self)
        if isinstance(module, NetworkWithOps):
            module.__dict__["_lab"] = self
        self.ops = ModelOps(self)
        for which, served in (("train", loader), ("eval", eval_loader)):
            if served is not None:
                served.dataset.listener = partial(self.note, data=which)

    def __reduce__(self) -> tuple:
        return type(None), ()  # a copy of a watched model is not watched

    @property
    def model(self) -> NetworkWithOps | ModelOps:
        """The model with its operations: itself where it is a `NetworkWithOps`, wrapped
        otherwise."""
        return self.module if isinstance(self.module, NetworkWithOps) else self.ops

    def close(self) -> None:
        """Stop watching: all hooks are taken off, and the model is as it would be without the
        lab."""
        self.tracking.close()
        if self._scaling is not None:
            self._scaling.remove()
        if self.module.__dict__.get("_lab") is self:
            self.module.__dict__["_lab"] = None

    # ---- tracking

    @property
    def neurons(self) -> dict[nn.Module, Neurons]:
        """Counters and rates by layer."""
        return self.tracking.neurons

    @property
    def tracking_mode(self) -> TrackingMode:
        """Which counters a forward pass feeds. Under `watch` and in an Experiment it follows
        `model.training`."""
        return self.tracking.mode

    @tracking_mode.setter
    def tracking_mode(self, mode: TrackingMode) -> None:
        self.tracking.mode = mode

    def tracking_paused(self) -> AbstractContextManager[None]:
        """Forward passes inside the `with` are not counted."""
        return self.tracking.pause()

    # ---- the ledger

    def record(
        self,
        loss: Tensor,
        output: Tensor | None = None,
        target: Tensor | None = None,
        *,
        ids: Tensor | None = None,
        **signals: Tensor,
    ) -> dict[str, Tensor]:
        """Note what the model just said about a batch: `loss` [b], one per sample, and any further
        named signals [b].

        With class scores `output` [b c] (logits or log-probabilities) and `target` [b] also the
        predicted class and the probability of the true one. The samples are `ids`, those of the
        surrounding `with batch(ids)`, or the loader's last. In training mode the samples are added
        to the age of the model. Returns what was derived from the output.
        """
        train = self.module.training
        loader = self.loader if train else self.eval_loader
        if loader is None:
            raise RuntimeError(
                f"no {'training' if train else 'evaluation'} loader is watched, so there is no "
                "ledger to write to"
            )
        ids = ids if ids is not None else current_ids() if current_ids() is not None else loader.ids
        if ids is None:
            raise RuntimeError("whose losses are these? Take batches from lab.loader, or pass ids=")
        judged = judge(output, target) if output is not None and target is not None else {}
        loader.dataset.ledger.record(ids, loss, self.age, **judged, **signals)
        if train:
            hits = (
                float((judged["pred"] == judged["label"]).float().mean())
                if judged
                else float("nan")
            )
            self._count_step(len(ids), float(loss.detach().float().mean()), hits)
        return judged

    def _count_step(self, samples: int, loss: float, hits: float) -> None:
        self.age += samples
        self.steps += 1
        self.window.append([loss, hits])
        if len(self.window) >= self.log_every:
            self.scalars("train", *np.mean(self.window, axis=0).tolist())
            self.window.clear()

    def scalars(self, kind: str, loss: float, accuracy: float) -> None:
        """Note a point of a curve at the present age."""
        values = {
            "loss": loss,
            "accuracy": accuracy,
            "parameters": sum(p.numel() for p in self.module.parameters()),
        }
        self.journal.write(kind, age=self.age, step=self.steps, **values)
        if self.on_scalars is not None:
            self.on_scalars(kind, self.age, values)

    def ledger(self, which: str = "train") -> Ledger:
        """The ledger of the training or the evaluation set."""
        return (self.loader if which == "train" else self.eval_loader).dataset.ledger

    def note(self, kind: str, **fields: Any) -> None:
        """Put an event on the timeline."""
        self.journal.write(kind, age=self.age, step=self.steps, **fields)

    # ---- operating

    def example(self) -> tuple:
        """A small batch of inputs, on which couplings are traced and edits are checked."""
        if self._example is None and self.loader is not None:
            with undisturbed(self.module):
                batch = self.loader.fetch(np.arange(min(4, len(self.loader.dataset))))
            self._example = self.inputs(batch)
        if self._example is None:
            self._example = self.tracking.example
        if self._example is None and "_example" in self.module.__dict__:
            self._example = (self.module.__dict__["_example"],)
        if self._example is None:
            raise ValueError(
                "planning needs an example input: pass example=, watch a loader, or run the model "
                "once"
            )
        device = next((p.device for p in self.module.parameters()), torch.device("cpu"))
        return tuple(arg.to(device) if isinstance(arg, Tensor) else arg for arg in self._example)

    def planner(self) -> Planner:
        """Couplings and order of execution of the present architecture; traced once."""
        if self._planner is None:
            with self.tracking_paused():
                self._planner = Planner(self.module, self.example())
        return self._planner

    def execution_order(self) -> list[nn.Module]:
        """The layers with neurons in the order in which a forward pass reaches them; found once,
        edits do not change it."""
        if self._order is None:
            with self.tracking_paused():
                self._order = execution_order(self.module, self.example())
        return self._order

    def forget_plans(self) -> None:
        """The architecture changed: trace again when next asked."""
        self._planner = None

    def edit(self) -> AbstractContextManager[NetworkWithOps | ModelOps]:
        """`with lab.edit() as m: m.prune(...); m.add_neurons(...)`: all of them, or on any error
        none. One `undo` for all."""
        return self.history.block()

    def undo(self) -> str:
        """Go back to the moment before the last edit: model, optimiser, counters, rates and age,
        bit for bit. Training done since is undone with it; ledgers and position in the data stay.
        Returns what was undone."""
        return self.history.undo()

    def provenance(self, readout: str | None = None) -> Provenance:
        """Which samples made the rows of a network whose rows know it (π-networks)."""
        return Provenance(self.module, readout)

    def forget(self, samples: Iterable[int] | Tensor) -> None:
        """Deny training samples and remove every row that they made; the optimiser follows. `undo`
        brings the rows back."""
        provenance = self.provenance()
        chosen = provenance._known(samples)
        before = network_state(self)
        if self.loader is not None:
            self.loader.dataset.denylist_samples(chosen)
        change = provenance.remove(chosen)
        if self.optimizer is not None:
            follow(self.optimizer, change)
        self.history.remember(f"forget {len(chosen)} samples", before)
        self.note("edit", what=f"forget {len(chosen)} samples")

    # ---- looking

    def neuron_stats(self):
        """One row per neuron: layer, triggers, samples and rates in training and evaluation,
        learning rate. A pandas frame."""
        return stats.neuron_frame(self)

    def display_stats(self) -> None:
        """Print how often each neuron triggers per sample, in training and in evaluation."""
        print(stats.text(self))

    def report(self, path: str | Path) -> Path:
        """Write one self-contained HTML page about this run; returns its path."""
        from .report import write_report

        return write_report(self, path)

    # ---- checkpoints

    def settings(self) -> dict[str, Any]:
        """What was chosen rather than learned: hashed into each checkpoint."""
        groups = (
            []
            if self.optimizer is None
            else [
                {
                    k: v if isinstance(v, int | float | bool | str | type(None)) else str(v)
                    for k, v in group.items()
                    if k != "params"
                }
                for group in self.optimizer.param_groups
            ]
        )
        return {
            "name": self.name,
            "model": type(self.module).__name__,
            "optimizer": type(self.optimizer).__name__,
            "groups": groups,
            "batch_size": None if self.loader is None else self.loader.batch_size,
        }

    def _manager(self) -> CheckpointManager:
        if self.chkpt_manager is None:
            raise RuntimeError("no folder for checkpoints was given: watch(..., folder='runs/x0')")
        return self.chkpt_manager

    def dump(self, note: str = "") -> int:
        """Write a checkpoint of everything, as child of the one that this run descends from;
        returns its id."""
        state = full_state(self)
        state.update(thumbnails=stats.thumbnails(self), layers=self.ops.layer_paths())
        new = self._manager().dump(
            state,
            age=self.age,
            steps=self.steps,
            branch=self.journal.begin(),
            note=note,
            **hashes(state),
        )
        self.note("checkpoint", id=new)
        return new

    def load(self, checkpoint_id: int) -> None:
        """Go back to a checkpoint: architecture, optimiser, ledgers, counters, rates, frozen
        layers, generators and position in the epoch. Going on from here equals never having
        stopped."""
        manager = self._manager()
        set_full_state(self, manager.read(checkpoint_id))
        manager.current = checkpoint_id
        self.history.states.clear()
        self.journal.fork(checkpoint_id)


def judge(output: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Predicted class, label and probability of the true class, where the task is to classify;
    nothing otherwise."""
    if (
        output.ndim != 2
        or target.ndim != 1
        or target.is_floating_point()
        or not output.is_floating_point()
    ):
        return {}
    with torch.no_grad():
        likely = (
            output.detach().float().log_softmax(1).gather(1, target.view(-1, 1).long()).squeeze(1)
        )
    return {"pred": output.detach().argmax(1), "label": target, "confidence": likely.exp()}


def watch(
    model: nn.Module,
    optimizer: Optimizer | None = None,
    loader: DataLoader | LabLoader | None = None,
    eval_loader: DataLoader | LabLoader | None = None,
    *,
    seed: int = 0,
    **options: Any,
) -> Lab:
    """Put a lab around your own training loop; nothing in it has to change but where the batches
    come from.

        lab = watch(model, optimizer, loader)
        for x, y in lab.loader:                                       # denied samples are left out
            logits = model(x)
            loss = F.cross_entropy(logits, y, reduction="none")
            lab.record(loss, logits, y)                               # ledger, age, curves
            optimizer.zero_grad(); loss.mean().backward(); optimizer.step()
        lab.model.prune(layer="features.0", neuron_indices={3})       # the optimiser follows

    Args:
        model: any module. Linear and convolution layers are tracked, in the training or evaluation
        counters by `model.training`.
        loader, eval_loader: torch DataLoaders; `lab.loader` serves the same batches. `seed` fixes
        the order of shuffling.
        example: an input (or tuple of inputs) for planning, where no loader gives one.
        inputs: from a batch to the tuple of the model's inputs (default: the batch's first entry).
        folder, name: where checkpoints and the journal go (needed for `dump`); the run's label
        (default: the folder's name).
        also: further things with `state_dict`/`load_state_dict` to keep in checkpoints, by name (a
        scheduler, a scaler).
        undo_depth: how many edits back `undo` can go; each keeps a copy of model and optimiser in
        memory.
    """

    def ours(given: DataLoader | LabLoader | None) -> LabLoader | None:
        return (
            given
            if given is None or isinstance(given, LabLoader)
            else LabLoader.of(given, seed=seed)
        )

    return Lab(model, optimizer, ours(loader), ours(eval_loader), auto_track=True, **options)
