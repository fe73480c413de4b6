"""Propagators for the signal: the same rules, another router. The signal makes both streams; the
layers get the pair (h, t)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import learn
from .base import Propagator


def _propagate(self: Propagator, h: Tensor, t: Tensor | None) -> tuple:
    """The signal is called with the pair (h, t) and answers (h1, t1, h0, t0)."""
    made = self.module((h, t))
    if not isinstance(made, tuple | list) or len(made) != 4:
        found = f"{len(made)} entries" if isinstance(made, tuple | list) else type(made).__name__
        raise TypeError(
            f"a signal returns (h1, t1, h0, t0), got {found}; after the formatters there must "
            "come a generator, such as sigprop.signals.ProjectionContext"
        )
    h1, t1, _, _ = made
    if t1 is not None and h1.shape[1:] != t1.shape[1:]:
        raise ValueError(
            f"the signal gives input rows of shape {list(h1.shape[1:])} and target rows of "
            f"{list(t1.shape[1:])}; both enter the same layers, so output_shape must equal the "
            "shape of the input as it enters them"
        )
    return tuple(made)


def _targets(self: Propagator, t: Tensor | None) -> Tensor | None:
    """The context without samples whose label is ignored: nobody is compared with them."""
    if t is None or self.kept is None or len(t) != len(self.kept):
        return t
    return t[self.kept] if self.kept.any() else None


def _manage(cls: type, manager, module: nn.Module, **options) -> Propagator:
    """Let `manager` wrap the signal `module` in a propagator of this class."""
    return manager.set_signal(module, cls, **options)


def _route(self: Propagator, h: Tensor, t: Tensor | None, context) -> tuple:
    """The context goes no further."""
    return h, t


class Learn(learn.Learn):
    """As propagators.Learn, for the signal."""

    manage = classmethod(_manage)
    targets, propagate, route = _targets, _propagate, _route


class Loss(learn.Learn):
    """As propagators.Loss, for the signal: its projections learn."""

    loss_required = True
    manage = classmethod(_manage)
    targets, propagate, route = _targets, _propagate, _route


class Fixed(Propagator):
    """As propagators.Fixed, for a signal that is constructed rather than learnt."""

    globally_trained = False
    manage = classmethod(_manage)
    targets, propagate, route = _targets, _propagate, _route

    def forward(self, input):
        with torch.no_grad():
            return self.carry(input)
