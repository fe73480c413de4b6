"""What can serve as a local optimiser, and what to write in place of what cannot."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

import torch

_REMEDY = "lambda module: torch.optim.{name}(module.parameters(), lr=1e-3)"


def check_optimizer(optimizer) -> None:
    """Refuse what is not a built optimiser whose `step()` needs nothing."""
    if isinstance(optimizer, type):
        raise TypeError(
            f"optimizer is the class {optimizer.__name__}; build it, as in "
            f"{optimizer.__name__}(module.parameters(), lr=1e-3)"
        )
    if not (hasattr(optimizer, "step") and hasattr(optimizer, "zero_grad")):
        raise TypeError(
            "optimizer must be a built optimiser like Adam(module.parameters()), got "
            f"{type(optimizer).__name__}; functions that build one go to sigprop.wrap, "
            "managers.Preset or Model(..., optimizer=)"
        )
    if _needs_closure(optimizer):
        raise TypeError(
            f"{type(optimizer).__name__} evaluates its loss several times a step, but a layer sees "
            "its streams once, in the forward pass; take an optimiser whose step() needs no "
            "closure, such as torch.optim.SGD or torch.optim.Adam"
        )
    check_dtypes(optimizer)


def check_dtypes(optimizer) -> None:
    """Refuse parameters that were converted (`model.half()`) into what the optimiser cannot
    follow."""
    kind = type(optimizer).__name__
    for group in getattr(optimizer, "param_groups", ()):
        for p in group["params"]:
            if p.dtype is torch.float16 and group.get("eps") and not p.new_tensor(group["eps"]):
                raise ValueError(
                    f"eps={group['eps']} of {kind} is 0 in float16, so that its first step divides "
                    "by 0; pass eps=1e-4, or use bfloat16, or keep parameters in float32 under "
                    "torch.autocast"
                )
            moments = optimizer.state.get(p, {})
            for name, moment in moments.items():
                if getattr(moment, "shape", ()) == p.shape and p.ndim and moment.dtype != p.dtype:
                    raise ValueError(
                        f"{name} of {kind} is {moment.dtype} but its parameter is now {p.dtype}; "
                        "after converting a model that has learnt, call "
                        "model.load_optimizer_state_dict(model.optimizer_state_dict())"
                    )


def check_builder(builder: Callable, name: str = "optimizer") -> None:
    """Refuse what is not a function from a module to its optimiser."""
    called = builder.func if isinstance(builder, functools.partial) else builder
    if isinstance(called, type) and issubclass(called, torch.optim.Optimizer):
        raise TypeError(
            f"{name} is {called.__name__}, which takes parameters; it is called with a module, "
            f"once for each block: pass {name}={_REMEDY.format(name=called.__name__)}"
        )
    if not callable(builder):
        raise TypeError(
            f"{name} must be a function module -> optimiser, got {type(builder).__name__}: pass "
            f"{name}={_REMEDY.format(name='Adam')}"
        )


def _needs_closure(optimizer) -> bool:
    parameters = inspect.signature(optimizer.step).parameters.values()
    return any(
        p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters
    )
