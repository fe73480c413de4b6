"""What a model is: a signal and a network of propagators, called like any network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..functional.contrast import check_rows, not_ignored
from ..propagators import Learn, NonFinite, Propagator
from ..propagators.base import propagators_in
from . import exits, local, nonfinite, trial


class Model(nn.Module):
    """Base of models. A subclass defines `forward(input)` on the pair (x, context) and returns the
    output.

    Every model is called as `model(x, y)`, `model((x, y))`, `model(x)` or `model(x, None)`; without
    labels only in evaluation. `signal` is a signal in a propagator, `model` the propagators of the
    layers. `optimizer` is a function that takes a module and gives its optimiser (or None): every
    learning propagator that has none yet gets one.

    A batch with infinite or NaN numbers is refused (`NonFinite`) before a layer has learnt from it.
    `nonfinite = "skip"` passes over such batches, counted in `skipped`: the output is then what
    inference makes of them, with zeros for what is not finite, and no gradient reaches a parameter.
    "allow" looks at nothing.

    Samples with the label -100 (F.cross_entropy's ignored one) pass through the network, but no
    layer learns from them.

    `parameters()` are those that the caller's global loss trains; `named_parameters()` and
    `state_dict()` cover everything.
    """

    def __init__(self, model: nn.Module, signal: nn.Module, optimizer: Callable | None = None):
        super().__init__()
        remedies = {
            "model": "layers in sigprop.propagators.Loss, the last in Identity (or call "
            "sigprop.wrap)",
            "signal": "the signal in sigprop.propagators.signals.Loss or .Fixed",
        }
        for part, (name, remedy) in zip((model, signal), remedies.items()):
            if not isinstance(part, nn.Module) or not any(True for _ in propagators_in(part)):
                raise TypeError(
                    f"{name} must contain propagators, got {type(part).__name__} without any; "
                    f"wrap {remedy}"
                )
        self.model, self.signal = model, signal
        self._schedule: local.Schedule | None = None
        self._tried = False
        self.nonfinite, self.skipped = "raise", 0
        if optimizer is not None:
            self.build_optimizers(optimizer)

    def __call__(self, input, context=None):
        if isinstance(input, tuple | list):
            if len(input) != 2 or context is not None:
                beside = "" if context is None else " beside a context"
                raise TypeError(
                    f"call model(x, y) or model((x, y)), got a {type(input).__name__} of "
                    f"{len(input)} entries{beside}"
                )
            input, context = input
        kept = None
        try:
            kept = self._check(input, context)
            if kept is not None:
                self._set_kept(kept)
            if self.training and not self._tried and isinstance(input, Tensor):
                trial.fits(self, input)
                self._tried = True
            return super().__call__((input, context))
        except NonFinite as error:
            if self.nonfinite == "skip":
                self.skipped += 1
                return nonfinite.inferred(self, input)
            nonfinite.locate(self, error)
            raise
        finally:
            if kept is not None:
                self._set_kept(None)

    def _set_kept(self, kept: Tensor | None) -> None:
        for _, propagator in propagators_in(self):
            propagator.kept = kept

    @property
    def nonfinite(self) -> str:
        return self._nonfinite

    @nonfinite.setter
    def nonfinite(self, mode: str) -> None:
        if mode not in nonfinite.MODES:
            raise ValueError(f"nonfinite is one of {nonfinite.MODES}, got {mode!r}")
        self._nonfinite = mode

    def _check(self, x, context) -> Tensor | None:
        """Refuse everything that can be refused before the first layer has learnt. Returns which
        samples [b] are not ignored; None: all."""
        if context is None:
            if self.training:
                raise ValueError(
                    "training needs the context (labels): call model(x, y); for inference call "
                    "model.eval() before"
                )
            return None
        if self.training and self.nonfinite != "allow":
            nonfinite.check_batch(x, context)
        rows, kept = len(x) if isinstance(x, Tensor) else 0, None
        if isinstance(x, Tensor) and isinstance(context, Tensor):
            check_rows(x, context)
            kept = not_ignored(context)
        class_rows = any(
            getattr(m, "class_rows", False)
            for m in self.signal.modules()
            if not isinstance(m, Propagator)
        )
        if kept is not None:
            rows, context = int(kept.sum()), context[kept]
        for learner in self.learners().values():
            learner.class_rows = class_rows
            learner.refuses_nonfinite = self.nonfinite != "allow"
            if rows:
                learner.check(rows, context)
        return kept

    def flow(self, x: Tensor, context: Tensor | None, target: Tensor | None = None) -> Tensor:
        """One pass; the target stream starts from `target`, or from the context itself."""
        h, t = self.signal((x, context if target is None else target, context))
        return self.model((h, t, context))[0]

    @classmethod
    def manage(cls, manager, module: nn.Module, **options):
        """Let `manager` make a model of this class of `module`."""
        return manager.set_model(module, cls, **options)

    def learners(self) -> dict[str, Learn]:
        """The propagators that learn locally, by their path in the model, the signal first."""
        parts = (("signal", self.signal), ("model", self.model))
        return {
            name: p
            for path, part in parts
            for name, p in propagators_in(part, path)
            if isinstance(p, Learn)
        }

    def global_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters that the caller's loss trains: all that no local propagator owns, each
        once."""
        owned = {
            id(p)
            for _, propagator in propagators_in(self)
            if not propagator.globally_trained
            for p in _all(propagator)
        }
        return (p for p in _all(self) if id(p) not in owned)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The globally trained parameters, so that `Adam(model.parameters())` is the optimiser of
        the output layer."""
        return self.global_parameters() if recurse else super().parameters(recurse=False)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of all parameters, local ones too."""
        for p in _all(self):
            if set_to_none:
                p.grad = None
            elif p.grad is not None:
                p.grad.detach_().zero_()

    def requires_grad_(self, requires_grad: bool = True):
        """Set it for all parameters, local ones too."""
        for p in _all(self):
            p.requires_grad_(requires_grad)
        return self

    def build_optimizers(self, builder: Callable) -> None:
        """Give each learner without an optimiser `builder(module)`; blocks without trainable
        parameters get none."""
        local.build(self.learners(), builder)

    def local_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """The optimisers that step inside of the forward pass, by the path of their propagator."""
        return {
            name: learner.optimizer
            for name, learner in self.learners().items()
            if learner.optimizer is not None
        }

    def schedule(self, builder: Callable) -> local.Schedule:
        """A learning-rate scheduler `builder(optimizer)` for every local optimiser; call `.step()`
        of the result."""
        self._schedule = local.Schedule(
            {name: builder(optimizer) for name, optimizer in self.local_optimizers().items()}
        )
        return self._schedule

    def optimizer_state_dict(self) -> dict:
        """State of all local optimisers, their gradient scalers and schedulers: plain tensors and
        builtins."""
        return local.state_dict(self.learners(), self._schedule)

    def load_optimizer_state_dict(self, state: dict) -> None:
        """Take up an `optimizer_state_dict`; on any mismatch nothing is changed."""
        local.load_state_dict(self.learners(), self._schedule, state)

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Inside, forward passes add up local gradients and no local optimiser steps;
        `local_step()` then steps them all."""
        learners = list(self.learners().values())
        try:
            for learner in learners:
                learner.deferred = True
            yield
        finally:
            for learner in learners:
                learner.deferred = False

    def local_step(self) -> None:
        """Step all local optimisers on the gradients that `accumulate` left, and drop these.

        If any of them is not finite, all are dropped and none steps.
        """
        learners = list(self.learners().values())
        try:
            for learner in learners:
                learner.check_gradients()
        except NonFinite as error:
            for learner in learners:
                if learner.optimizer is not None:
                    learner.optimizer.zero_grad(set_to_none=True)
            if self.nonfinite == "skip":
                self.skipped += 1
                return
            nonfinite.locate(self, error)
            raise
        for learner in learners:
            learner.step()

    def exits(
        self, x: Tensor, num_classes: int | None = None, upto: str | None = None
    ) -> dict[str, Tensor]:
        """What each layer predicts by itself: similarities [b classes] to one target row per class,
        and "output" [b ...].

        `upto` names the learner after which the computation stops: an early exit.
        """
        return exits.predict(self, x, num_classes, upto)

    def compile_blocks(self, **options) -> None:
        """torch.compile every block in place; names and checkpoints stay. Streams of blocks with
        batch norm then run apart."""
        for _, propagator in propagators_in(self):
            if hasattr(propagator, "module"):
                if any(
                    isinstance(m, nn.modules.batchnorm._BatchNorm)
                    for m in propagator.module.modules()
                ):
                    propagator.fuse = False
                propagator.module.compile(**options)


def _all(module: nn.Module) -> Iterator[nn.Parameter]:
    return (p for _, p in module.named_parameters())
