"""Propagators for the signal: the same rules, another router. The signal makes both streams; the
layers get the pair (h, t)."""

from __future__ import annotations

from torch import Tensor

from . import learn, other


class _SignalRouter:
    """The signal is called with the pair (h, t) and answers (h1, t1, h0, t0); the context goes no
    further."""

    def propagate(self, h: Tensor, t: Tensor | None):
        made = self.module((h, t))
        if not isinstance(made, tuple | list) or len(made) != 4:
            found = (
                f"{len(made)} entries" if isinstance(made, tuple | list) else type(made).__name__
            )
            raise TypeError(
                f"a signal returns (h1, t1, h0, t0), got {found}; after the formatters there must "
                "come a generator, such as sigprop.signals.ProjectionContext"
            )
        h1, t1, _, _ = made
        if t1 is not None and h1.shape[1:] != t1.shape[1:]:
            raise ValueError(
                f"the signal gives input rows of shape {list(h1.shape[1:])} and target rows of "
                f"{list(t1.shape[1:])}"
                "; both enter the same layers, so output_shape must equal the shape of the input "
                "as it enters them"
            )
        return tuple(made)

    def route(self, h: Tensor, t: Tensor | None, context) -> tuple:
        return h, t


class Learn(_SignalRouter, learn.Learn):
    """As propagators.Learn, for the signal."""


class Loss(_SignalRouter, learn.Loss):
    """As propagators.Loss, for the signal: its projections learn."""


class Fixed(_SignalRouter, other.Fixed):
    """As propagators.Fixed, for a signal that is constructed rather than learnt."""
