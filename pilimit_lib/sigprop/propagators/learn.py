"""Propagators that train their block the moment both streams have passed it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from .base import Propagator, check_flow
from .finite import NonFinite, finite, statistics_kept
from .optimizers import check_dtypes, check_optimizer

_NO_NUMBER = "the loss of a propagator must return one number as a tensor, got {}"


class Learn(Propagator):
    """Trains its block locally: nothing flows back to earlier blocks, and later ones see the
    activations before the update.

    A subclass defines `loss_(h1, t1, h0, t0, context)`, or `train_` and `eval_`, each of which
    returns (loss, None, None). `train_` runs in training (unless gradients are switched off),
    `eval_` in evaluation, both only if there is a context. Without such a method it is `loss` that
    is called, as `loss(propagator, h1, t1, h0, t0, context)`.

    `scaler`: a torch.amp.GradScaler of its own, for float16 autocast.

    Activations, losses and gradients that are not finite raise `NonFinite` before the block learns,
    and its running statistics are then as before; `refuses_nonfinite = False` leaves that unread.
    """

    globally_trained = False
    loss_required = False  # whether the constructor insists on a loss
    refuses_nonfinite = True
    class_rows = False  # set by the model when the signal sends one target row per class

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        loss: Callable | None = None,
        *,
        fuse: bool | str = "auto",
        scaler: torch.amp.GradScaler | None = None,
    ):
        super().__init__(module, fuse=fuse)
        if optimizer is not None:
            check_optimizer(optimizer)
        if loss is not None and not callable(loss):
            raise TypeError(
                "loss must be callable as loss(propagator, h1, t1, h0, t0, context), got "
                f"{type(loss).__name__}"
            )
        if loss is None and self.loss_required:
            raise ValueError(
                f"{type(self).__name__} needs a loss, for instance "
                "sigprop.loss.v9_input_target_max_all; "
                "a block that shall not learn goes into Fixed"
            )
        self.optimizer, self.loss, self.scaler = optimizer, loss, scaler
        self.deferred = False
        self.last_loss: Tensor | float | None = None

    def forward(self, input):
        check_flow(input)
        h, t, context = input
        t = self.targets(t)
        h, t = h.detach(), None if t is None else t.detach()
        compare = t is not None and context is not None
        training = self.training and compare and torch.is_grad_enabled()
        with nullcontext() if training and self.needs_graph() else torch.no_grad():
            h1, t1, h0, t0 = self._finite_streams(h, t) if training else self.propagate(h, t)
            if compare:
                learn = self.train_ if training else self.eval_
                self.last_loss = learn(*self._not_ignored(h1, t1, h0, t0, context))[0]
        return self.route(h1.detach(), None if t1 is None else t1.detach(), context)

    def _finite_streams(self, h: Tensor, t: Tensor) -> tuple:
        if not self.refuses_nonfinite:
            return self.propagate(h, t)
        with statistics_kept(self.module):
            streams = self.propagate(h, t)
            if not finite(*streams[:2]):
                raise NonFinite(
                    "a block made infinite or NaN activations; it has not learnt from this batch. "
                    "Lower the learning rate, or normalise inputs and blocks",
                    self,
                )
        return streams

    def _not_ignored(self, h1, t1, h0, t0, context) -> tuple:
        """Streams as a loss gets them; the target stream lacks ignored samples from the signal
        on."""
        if self.kept is None:
            return h1, t1, h0, t0, context
        return h1[self.kept], t1, h0[self.kept], t0, context[self.kept]

    def loss_(self, h1, t1, h0, t0, context) -> Tensor:
        if self.loss is None:
            raise NotImplementedError(
                f"{type(self).__name__} has no loss and defines neither loss_ nor train_ and eval_"
            )
        loss = self.loss(self, h1, t1, h0, t0, context)
        if not isinstance(loss, Tensor):
            raise TypeError(_NO_NUMBER.format(type(loss).__name__))
        if loss.numel() != 1:
            raise TypeError(_NO_NUMBER.format(f"a tensor of shape {list(loss.shape)}"))
        return loss

    def train_(self, h1, t1, h0, t0, context):
        loss = self.loss_(h1, t1, h0, t0, context)
        self.update(loss)
        return loss.detach(), None, None

    def eval_(self, h1, t1, h0, t0, context):
        return self.loss_(h1, t1, h0, t0, context).detach(), None, None

    def needs_graph(self) -> bool:
        """Whether `train_` differentiates: this one only with an optimiser; that of a subclass,
        which may update by other rules, unless it says otherwise."""
        return self.optimizer is not None or type(self).train_ is not Learn.train_

    def update(self, loss: Tensor) -> None:
        """One step of the local optimiser on `loss`, or only its gradient inside
        `model.accumulate()`."""
        if self.optimizer is None:
            return
        if self.refuses_nonfinite and not finite(loss):
            raise NonFinite(
                f"the local loss of a block is {float(loss.detach())}; the block has not learnt "
                "from this batch. Look at the loss, or lower the learning rate",
                self,
            )
        if not self.deferred:
            self.optimizer.zero_grad()
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        if not self.deferred:
            self.step()

    def step(self) -> None:
        """Step the local optimiser on the gradients at hand and drop them, so that they do not add
        up over the depth."""
        if self.optimizer is None:
            return
        self.check_gradients()
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def check_gradients(self) -> None:
        """Refuse, and drop, gradients at hand that are not finite; a scaler does so by itself."""
        if self.optimizer is None or self.scaler is not None or not self.refuses_nonfinite:
            return
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if not finite(*(p.grad for p in parameters)):
            self.optimizer.zero_grad(set_to_none=True)
            raise NonFinite(
                "the local gradient of a block is not finite though its loss is; the block has not "
                "learnt from this batch. Look at the loss, or lower the learning rate",
                self,
            )

    def check(self, rows: int, context: Tensor) -> None:
        """Refuse a batch that the loss cannot work with, before any layer has learnt from it."""
        if self.optimizer is not None:
            check_dtypes(self.optimizer)
        check = getattr(self.loss, "check", None)
        if check is not None:
            check(self, rows, context)


class Loss(Learn):
    """Trains its block by any `loss(propagator, h1, t1, h0, t0, context)`; without an optimiser the
    block stays as it is."""

    loss_required = True
