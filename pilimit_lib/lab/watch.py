"""The lab around a model, an optimiser and a loader: whatever the training loop, it can be looked
into and operated on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from pilimit_lib.core import current_ids, follow

from .data.ledger import as_array
from .data.loader import LabLoader
from .edits import history
from .edits.rollback import Rollback, remember
from .errors import NonFinite
from .network import ModelOps, NetworkWithOps, uncompiled
from .neurons.hooks import Tracking
from .neurons.tracked import undisturbed
from .provenance import Provenance
from .report import stats
from .run.checkpoints import CheckpointManager
from .run.session import Session
from .run.state import fingerprints, full_state, hashes, set_full_state


class Lab(Session):
    """See `watch`. `model` operates on the architecture, `loader` serves the samples, `neurons`
    holds counters and rates."""

    @property
    def model(self) -> NetworkWithOps | ModelOps:
        """The model with its operations: itself where it is a `NetworkWithOps`, wrapped
        otherwise."""
        return self.module if isinstance(self.module, NetworkWithOps) else self.ops

    @property
    def ops(self) -> ModelOps:
        """The operations on any model."""
        return ModelOps(self)

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

        Call it before `backward`: a loss that is NaN or infinite raises `NonFinite`, which names
        the samples. Under `nonfinite="skip"` it is counted in the ledger, nothing is learned from
        the batch in the lab's books, and `lab.finite` is False: leave the step out. Either way the
        buffers of the model (running statistics) and the counters of its neurons are as they were
        before the batch.
        """
        train = self.module.training
        loader = self.loader if train else self.eval_loader
        if loader is None:
            raise RuntimeError(
                f"no {'training' if train else 'evaluation'} loader is watched, so there is no "
                "ledger to write to"
            )
        for known in (current_ids(), loader.ids):
            ids = known if ids is None else ids
        if ids is None:
            raise RuntimeError("whose losses are these? Take batches from lab.loader, or pass ids=")
        judged = judge(output, target) if output is not None and target is not None else {}
        self._check_finite(loader, as_array(ids), as_array(loss.detach().reshape(-1)))
        loader.dataset.ledger.record(ids, loss, self.age, **judged, **signals)
        if train and self.finite:
            right = (judged["pred"] == judged["label"]).float() if judged else torch.tensor(np.nan)
            self._count_step(len(ids), float(loss.detach().float().mean()), float(right.mean()))
        self.tracking.end()
        return judged

    def _check_finite(self, loader: LabLoader, ids: np.ndarray, loss: np.ndarray) -> None:
        wrong = ~np.isfinite(loss)
        self.finite = not wrong.any()
        if self.finite or len(loss) != len(ids):
            return
        self.tracking.take_back()
        with undisturbed(self.module):
            suspects = loader.dataset.not_finite(np.unique(ids))
        found = np.unique(ids[wrong]).tolist()
        what = f"the loss of samples {some(found)} is not finite ({len(found)} of {len(ids)})"
        if suspects:
            what += f"; the data of samples {some(suspects)} is not finite"
        self.note("non-finite", what=what, samples=found[:100], suspects=suspects[:100])
        if self.nonfinite == "stop":
            raise NonFinite(
                f"{what}. Nothing was learned from this batch (age {self.age}, step {self.steps}). "
                "Look at these samples; leave them out with dataset.denylist_samples([...]), or go "
                "on without such batches: nonfinite='skip'",
                found,
                suspects,
            )

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

    @contextmanager
    def edit(self) -> Iterator[NetworkWithOps | ModelOps]:
        """`with lab.edit() as m: m.prune(...); m.add_neurons(...)`: all of them, or on any error
        none. One `undo` for all."""
        with history.edit_block(self):
            yield self.model

    def undo(self) -> str:
        """Go back to the moment before the last edit: model, optimiser, counters, rates and age,
        bit for bit. Training done since is undone with it; ledgers and position in the data stay.
        Returns what was undone."""
        return history.undo(self)

    def provenance(self, readout: str | None = None) -> Provenance:
        """Which samples made the rows of a network whose rows know it (π-networks)."""
        return Provenance(self.module, readout)

    def forget(self, samples: Iterable[int] | Tensor) -> None:
        """Deny training samples and remove every row that they made; the optimiser follows. `undo`
        brings the rows back. No unlearning: see `Provenance.remove`."""
        provenance = self.provenance()
        chosen, before = provenance.known(samples), Rollback(self)
        if self.loader is not None:
            self.loader.dataset.denylist_samples(chosen)
        change = provenance.remove(chosen)
        if self.optimizer is not None:
            follow(self.optimizer, change)
        remember(self, f"forget {len(chosen)} samples", before)
        self.note("edit", what=f"forget {len(chosen)} samples")

    def neuron_stats(self) -> pd.DataFrame:
        """One row per neuron: layer, triggers, samples and rates in training and evaluation,
        learning rate."""
        return stats.neuron_frame(self)

    def display_stats(self) -> None:
        """Print how often each neuron triggers per sample, in training and in evaluation."""
        print(stats.text(self))

    def report(self, path: str | Path) -> Path:
        """Write one self-contained HTML page about this run; returns its path."""
        from .report.page import write_report

        return write_report(self, path)

    def _manager(self) -> CheckpointManager:
        if self.chkpt_manager is None:
            raise RuntimeError("no folder for checkpoints was given: watch(..., folder='runs/x0')")
        return self.chkpt_manager

    def dump(self, note: str = "") -> int:
        """Write a checkpoint of everything, as child of the one that this run descends from;
        returns its id."""
        state = full_state(self)
        state.update(
            thumbnails=stats.thumbnails(self), layers=self.layer_paths(), data=fingerprints(self)
        )
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
        state, path = manager.read(checkpoint_id), manager.path(checkpoint_id)
        try:
            set_full_state(self, state)
        except RuntimeError as error:
            raise RuntimeError(f"{path} could not be loaded: {error}") from error
        except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
            raise ValueError(f"{path} does not fit here or is damaged: {error!r}") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        manager.current = checkpoint_id
        self.past.clear()
        self.journal.fork(checkpoint_id)


def some(ids: list[int]) -> str:
    """The first few of a list of ids."""
    return str(ids) if len(ids) <= 10 else f"{str(ids[:10])[:-1]}, ...]"


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
        model: any module, also what `torch.compile` returned. Linear and convolution layers are
        tracked, in the training or evaluation counters by `model.training`: in forward passes on a
        batch from the loaders until it is recorded (without loaders, in every forward pass).
        loader, eval_loader: torch DataLoaders; `lab.loader` serves the same batches. `seed` fixes
        the order of shuffling.
        example: an input (or tuple of inputs) for planning, where no loader gives one.
        inputs: from a batch to the tuple of the model's inputs (default: the batch's first entry).
        folder, name: where checkpoints and the journal go (needed for `dump`); the run's label
        (default: the folder's name).
        also: further things with `state_dict`/`load_state_dict` to keep in checkpoints, by name (a
        scheduler, a scaler).
        nonfinite: what a loss of NaN or infinity does: "stop" (raise, naming the samples) or "skip"
        (count it in the ledger and go on; see `record`).
        undo_depth: how many edits back `undo` can go; each keeps a copy of model and optimiser in
        memory.
    """

    served = [
        loader
        if loader is None or isinstance(loader, LabLoader)
        else LabLoader.of(loader, seed=seed)
        for loader in (loader, eval_loader)
    ]
    watched = [loader for loader in served if loader is not None]
    model = uncompiled(model)
    tracking = Tracking(model, always=not watched)
    for loader in watched:
        loader.on_batch = tracking.served
    return Lab(model, optimizer, *served, tracking=tracking, **options)
