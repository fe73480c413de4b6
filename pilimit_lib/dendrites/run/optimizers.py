"""The optimiser and scheduler of a run: attached, built from factories, restarted at growth."""

from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from ...core import restore
from .learning_rates import first_rate, scale_rates
from .run import Run


def attach(run: Run, optimizer: Optimizer, scheduler: Any = None) -> None:
    """Work with this optimiser (and scheduler) from now on, at the learning rate or in the state
    that growth left pending."""
    run.optimizer, run.scheduler = optimizer, scheduler
    kind, value = run.pending or (None, None)
    run.pending = None
    if kind == "rate":
        scale_rates(optimizer, scheduler, value)
    elif kind == "state" and "optimizer" in value:
        extras = restore(run.network, value, optimizer)
        if scheduler is not None and extras.get("scheduler") is not None:
            scheduler.load_state_dict(extras["scheduler"])
    if kind != "state":
        run.plateau.start_rate(None if scheduler is None else first_rate(optimizer))


def step_scheduler(scheduler: Any, score: float) -> None:
    if isinstance(scheduler, ReduceLROnPlateau):
        scheduler.step(score)
    elif scheduler is not None:
        scheduler.step()
