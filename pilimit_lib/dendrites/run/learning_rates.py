"""Learning rates of an optimiser across growth: where they started, back to it, and a share of it.
Parameter groups keep their ratios."""

from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def first_rate(optimizer: Optimizer | None) -> float | None:
    """The highest learning rate among the groups."""
    return (
        None if optimizer is None else max(float(group["lr"]) for group in optimizer.param_groups)
    )


def initial_rates(optimizer: Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def _set(group: dict, key: str, value: float) -> None:
    if isinstance(group.get(key), Tensor):
        group[key].fill_(value)
    else:
        group[key] = value


def restart_rates(optimizer: Optimizer, initial: list[float]) -> None:
    """Back to where each group started; a scheduler built next takes that as its base."""
    for group, rate in zip(optimizer.param_groups, initial, strict=True):
        _set(group, "lr", rate)
        group.pop("initial_lr", None)


def scale_rates(optimizer: Optimizer, scheduler: Any, share: float) -> None:
    """Start at a share of the usual learning rate, without replaying the steps that led there
    before."""
    for group in optimizer.param_groups:
        for key in ("lr", "initial_lr"):
            if key in group:
                _set(group, key, float(group[key]) * share)
    for key in ("base_lrs", "_last_lr"):
        if getattr(scheduler, key, None) is not None:
            setattr(scheduler, key, [rate * share for rate in getattr(scheduler, key)])
