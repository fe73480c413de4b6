"""The documented facade: a model, an optimiser and two data sets, trained and operated on
together."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset
from tqdm import tqdm

from pilimit_lib.core import sample_ids

from .data.dataset import TrackedDataset
from .data.loader import LabLoader
from .network import ModelOps, NetworkWithOps, uncompiled
from .neurons.hooks import Tracking
from .watch import Lab


def classification_loss(output: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy per sample [b]; log-probabilities are their own logits, so a final log_softmax
    does no harm."""
    return F.cross_entropy(output, target, reduction="none")


class Experiment:
    """Train, evaluate, look, operate, go back.

        exp = Experiment(model=Net(), optimizer_class=optim.Adam, train_dataset=train,
        eval_dataset=test,
                         device="cpu", learning_rate=1e-2, batch_size=256, name="x0")
        exp.train_n_steps_with_eval_full(len(exp.train_loader))

    Nothing is loaded on its own: an earlier run under the same name is listed by
    `print(exp.chkpt_manager)`.

    `exp.model` is the model with the operations on its architecture, `exp.module` the bare one;
    `exp.optimizer` is never rebuilt, it follows every edit; `exp.train_loader` and
    `exp.eval_loader` serve the samples that are not denied, and their `dataset` has ledger and deny
    list.

    Args:
        model: any module, also what `torch.compile` returned; `exp.model` has the operations on its
        architecture.
        optimizer_class: called as `optimizer_class(model.parameters(), lr=learning_rate,
        **optimizer_options)`.
        train_dataset, eval_dataset: items are `(input, target)`; ids are positions in them.
        name: label of the run, and its folder under `root_log_dir`.
        criterion: from output and target to one loss per sample [b] (default: cross-entropy).
        seed: fixes the order of the training samples.
        eval_every, dump_every: steps between evaluations and checkpoints in
        `train_n_steps_with_eval_full`.
        nonfinite: what a loss of NaN or infinity does: "stop" (raise `NonFinite` with the ids of
        its samples, before anything is learned from them) or "skip" (flag them in the ledger's
        column `nonfinite`, leave the step out, go on).
        tensorboard: scalars for TensorBoard, every `log_every` steps (needs the `lab` extra).
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer_class: Callable[..., Optimizer],
        train_dataset: Dataset,
        eval_dataset: Dataset,
        device: torch.device | str = "cpu",
        learning_rate: float = 1e-3,
        batch_size: int = 64,
        name: str = "x0",
        *,
        root_log_dir: str | Path = "root_experiment",
        optimizer_options: dict[str, Any] | None = None,
        criterion: Callable[[Tensor, Tensor], Tensor] = classification_loss,
        seed: int = 0,
        train_shuffle: bool = True,
        num_workers: int = 0,
        collate_fn: Callable | None = None,
        eval_every: int = 256,
        dump_every: int = 1024,
        log_every: int = 10,
        undo_depth: int = 1,
        nonfinite: str = "stop",
        tensorboard: bool = True,
        progress: bool = True,
    ) -> None:
        self.device = torch.device(device)
        self.criterion, self.progress = criterion, progress
        self.eval_every, self.dump_every = eval_every, dump_every
        checked_learning_rate(learning_rate)
        options = {"num_workers": num_workers, "collate_fn": collate_fn, "seed": seed}
        train = LabLoader(_tracked(train_dataset), batch_size, shuffle=train_shuffle, **options)
        evaluation = LabLoader(_tracked(eval_dataset), batch_size, **options)
        self._forward = model.to(self.device)
        model = uncompiled(model)
        optimizer = optimizer_class(
            model.parameters(), lr=learning_rate, **(optimizer_options or {})
        )
        self.folder = Path(root_log_dir) / name
        self.writer = _Scalars(self.folder / "tensorboard") if tensorboard else None
        self.lab = Lab(
            model,
            optimizer,
            train,
            evaluation,
            folder=self.folder,
            name=name,
            tracking=Tracking(model),
            log_every=log_every,
            undo_depth=undo_depth,
            nonfinite=nonfinite,
        )
        self.lab.on_scalars = self.writer
        self.model, self.module, self.optimizer = self.lab.model, model, optimizer
        self.train_loader, self.eval_loader = train, evaluation
        self.chkpt_manager, self.name = self.lab.chkpt_manager, name

    def __repr__(self) -> str:
        return f"Experiment {self.lab.described()}"

    @property
    def age(self) -> int:
        """How many training samples the model has learned from."""
        return self.lab.age

    def train_n_steps(self, n: int) -> tuple[float, float]:
        """Train for n steps, through as many epochs as that takes; mean loss and accuracy (a
        fraction) over these steps."""
        sums = _Sums()
        self.module.train()
        for _ in tqdm(
            range(_steps(n)),
            desc=f"train {self.name}",
            disable=not self.progress or n < 2,
            leave=False,
        ):
            self._train_step(sums)
        return sums.means()

    def train_n_steps_with_eval_full(self, n: int) -> tuple[float, float]:
        """Train for n steps; evaluate fully before the first, then every `eval_every` steps of the
        run and at the end; dump every `dump_every` steps. Returns loss and accuracy of the last
        evaluation."""
        result, sums = self.eval_full() if self.lab.steps == 0 else None, _Sums()
        for _ in tqdm(
            range(_steps(n)),
            desc=f"train {self.name}",
            disable=not self.progress or n < 2,
            leave=False,
        ):
            self.module.train()
            self._train_step(sums)
            result = self.eval_full() if self.lab.steps % self.eval_every == 0 else None
            if self.lab.steps % self.dump_every == 0:
                self.dump()
        return result or self.eval_full()

    def _train_step(self, sums: _Sums) -> None:
        inputs, target = self._to_device(self.train_loader.next_batch())
        ids = self.train_loader.ids
        with sample_ids(ids), self.lab.tracking.step():
            output = self._forward(inputs)
            loss = self._loss(output, target, len(ids))
            judged = self.lab.record(loss, output, target, ids=ids)
        if not self.lab.finite:
            return
        self.optimizer.zero_grad(set_to_none=True)
        loss.mean().backward()
        self.optimizer.step()
        sums.add(loss, judged)

    def eval_n_steps(self, n: int) -> tuple[float, float]:
        """Mean loss and accuracy (a fraction) over the first n batches of the evaluation set, the
        same ones each time."""
        _steps(n)
        was, sums = self.module.training, _Sums()
        self.module.eval()
        self.eval_loader.reset()
        try:
            with torch.no_grad():
                for _ in range(min(n, len(self.eval_loader))):
                    inputs, target = self._to_device(self.eval_loader.next_batch())
                    ids = self.eval_loader.ids
                    with sample_ids(ids), self.lab.tracking.step():
                        output = self._forward(inputs)
                        loss = self._loss(output, target, len(ids))
                        judged = self.lab.record(loss, output, target, ids=ids)
                    known = loss.isfinite()
                    sums.add(loss[known], {name: value[known] for name, value in judged.items()})
        finally:
            self.module.train(was)
            self.eval_loader.reset(0)
        return sums.means()

    def eval_full(self) -> tuple[float, float]:
        """Mean loss and accuracy (a fraction) over the whole evaluation set; a point of the
        evaluation curve."""
        loss, accuracy = self.eval_n_steps(max(1, len(self.eval_loader)))
        self.lab.scalars("eval", loss, accuracy)
        return loss, accuracy

    def _to_device(self, batch: Any) -> tuple[Any, Any]:
        if not isinstance(batch, list | tuple) or len(batch) != 2:
            raise TypeError(
                "an Experiment trains on (input, target) pairs, the data set serves "
                f"{type(batch).__name__}; "
                "for other batches write the loop yourself around pilimit_lib.lab.watch"
            )
        return tuple(
            part.to(self.device, non_blocking=True) if isinstance(part, Tensor) else part
            for part in batch
        )

    def _loss(self, output: Tensor, target: Tensor, samples: int) -> Tensor:
        loss = self.criterion(output, target)
        if loss.ndim == 0 or loss.shape[0] != samples:
            raise ValueError(
                f"the criterion returned a loss of shape {list(loss.shape)} for {samples} samples; "
                "one loss per "
                "sample was expected (reduction='none')"
            )
        return loss.flatten(1).mean(1) if loss.ndim > 1 else loss

    def set_learning_rate(self, learning_rate: float) -> None:
        """Change the learning rate of all parameter groups; the optimiser's state stays."""
        checked_learning_rate(learning_rate)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.lab.note("learning rate", what=f"learning rate {learning_rate:g}")

    def display_stats(self) -> None:
        """Print how often each neuron triggers per sample, in training and in evaluation."""
        self.lab.display_stats()

    def neuron_stats(self):
        """The same as a pandas frame."""
        return self.lab.neuron_stats()

    def edit(self) -> AbstractContextManager[NetworkWithOps | ModelOps]:
        """`with exp.edit() as m: m.prune(...); m.add_neurons(...)`: all of them, or on any error
        none."""
        return self.lab.edit()

    def undo(self) -> str:
        """Go back to the moment before the last edit; see `Lab.undo`."""
        return self.lab.undo()

    def report(self, path: str | Path) -> Path:
        """Write one self-contained HTML page about this run."""
        return self.lab.report(path)

    def dump(self, note: str = "") -> int:
        """Write a checkpoint of everything; returns its id."""
        return self.lab.dump(note)

    def load(self, checkpoint_id: int) -> None:
        """Go back to a checkpoint; going on from there equals never having stopped."""
        self.lab.load(checkpoint_id)


class _Sums:
    """Running loss and hits, kept on the device until asked for."""

    def __init__(self) -> None:
        self.loss = self.hits = 0.0
        self.judged = self.samples = 0

    def add(self, loss: Tensor, judged: dict[str, Tensor]) -> None:
        self.loss = self.loss + loss.detach().double().sum()
        self.samples += len(loss)
        if judged:
            self.hits = self.hits + (judged["pred"] == judged["label"]).sum()
            self.judged += len(loss)

    def means(self) -> tuple[float, float]:
        loss = float(self.loss) / self.samples if self.samples else math.nan
        return loss, float(self.hits) / self.judged if self.judged else math.nan


class _Scalars:
    """Curves for TensorBoard. Its writer is opened with the first scalar."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "scalars for TensorBoard need it installed: pip install 'pilimit[lab]', or pass "
                "tensorboard=False"
            ) from error
        self.folder, self.kind, self.writer = folder, SummaryWriter, None

    def __call__(self, which: str, age: int, values: dict[str, float]) -> None:
        if self.writer is None:
            self.writer = self.kind(str(self.folder))
        self.writer.add_scalar(f"{which}-loss", values["loss"], age)
        self.writer.add_scalar(f"{which}-acc", values["accuracy"], age)
        self.writer.add_scalar("model-params", values["parameters"], age)


def _tracked(dataset: Dataset) -> TrackedDataset:
    return dataset if isinstance(dataset, TrackedDataset) else TrackedDataset(dataset)


def _steps(n: int) -> int:
    if isinstance(n, bool) or not hasattr(n, "__index__") or n < 0:
        raise ValueError(f"n={n!r}: a number of steps was expected")
    return int(n)


def checked_learning_rate(learning_rate: float) -> None:
    """Raise unless it is a positive number or zero."""
    if (
        isinstance(learning_rate, bool)
        or not isinstance(learning_rate, int | float)
        or not math.isfinite(learning_rate)
        or learning_rate < 0
    ):
        raise ValueError(
            f"learning_rate={learning_rate!r}: a finite number, at least 0, was expected"
        )
