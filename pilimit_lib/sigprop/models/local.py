"""The optimisers of single layers, taken together: built, scheduled, saved and loaded."""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import nn

from ..propagators import Learn
from ..propagators.optimizers import check_builder, check_optimizer


class Schedule:
    """Schedulers of local optimisers that step as one."""

    def __init__(self, schedulers: dict[str, object]):
        self.schedulers = schedulers

    def step(self, *args) -> None:
        """Step every scheduler; arguments (a metric, say) go to each."""
        for scheduler in self.schedulers.values():
            scheduler.step(*args)

    def state_dict(self) -> dict[str, dict]:
        return {name: scheduler.state_dict() for name, scheduler in self.schedulers.items()}


def optimizer_for(builder: Callable, module: nn.Module):
    """What `builder` makes for `module`, or None for a module without trainable parameters."""
    if not any(p.requires_grad for _, p in module.named_parameters()):
        return None
    optimizer = builder(module)
    if optimizer is not None:
        check_optimizer(optimizer)
    return optimizer


def build(learners: dict[str, Learn], builder: Callable) -> None:
    """Optimisers for those that have none."""
    check_builder(builder)
    built = {
        name: optimizer_for(builder, learner.module)
        for name, learner in learners.items()
        if learner.optimizer is None
    }
    for name, optimizer in built.items():
        learners[name].optimizer = optimizer


def state_dict(learners: dict[str, Learn], schedule: Schedule | None) -> dict:
    return {
        "optimizers": {
            name: p.optimizer.state_dict()
            for name, p in learners.items()
            if p.optimizer is not None
        },
        "scalers": {
            name: p.scaler.state_dict() for name, p in learners.items() if p.scaler is not None
        },
        "schedulers": {} if schedule is None else schedule.state_dict(),
    }


def load_state_dict(learners: dict[str, Learn], schedule: Schedule | None, state: dict) -> None:
    own = {
        "optimizers": {
            name: p.optimizer for name, p in learners.items() if p.optimizer is not None
        },
        "scalers": {name: p.scaler for name, p in learners.items() if p.scaler is not None},
        "schedulers": {} if schedule is None else schedule.schedulers,
    }
    if not isinstance(state, dict) or set(state) != set(own):
        raise ValueError(
            f"not a state of local optimisers (keys {sorted(own)}); pass what "
            "optimizer_state_dict() returned"
        )
    for kind, mine in own.items():
        if set(state[kind]) != set(mine):
            hint = (
                "; call model.schedule(...) before loading, as before saving"
                if kind == "schedulers"
                else ""
            )
            raise ValueError(
                f"{kind} do not match: saved for {sorted(state[kind])}, the model has "
                f"{sorted(mine)}{hint}"
            )
    for name, optimizer in own["optimizers"].items():
        _check_groups(name, optimizer, state["optimizers"][name])
    for kind, mine in own.items():
        for name, one in mine.items():
            one.load_state_dict(copy.deepcopy(state[kind][name]))


def _check_groups(name: str, optimizer, saved: dict) -> None:
    groups = optimizer.param_groups
    sizes = (
        [len(group["params"]) for group in groups],
        [len(group["params"]) for group in saved["param_groups"]],
    )
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"optimiser of '{name}': groups of {sizes[1]} parameters saved, groups of {sizes[0]} "
            "in the model"
        )
    keys = [key for group in saved["param_groups"] for key in group["params"]]
    for key, p in zip(keys, (p for group in groups for p in group["params"])):
        for entry, value in saved["state"].get(key, {}).items():
            # Step counters have no dimension; tensors of the parameter's kind (moments) have its
            # shape.
            if getattr(value, "ndim", 0) == p.ndim and p.ndim and value.shape != p.shape:
                raise ValueError(
                    f"optimiser of '{name}': {entry} was saved with shape {list(value.shape)}, "
                    f"the parameter has {list(p.shape)}"
                )
