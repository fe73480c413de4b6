"""A whole run as a state, and back: everything that growth may go back to, so that a fresh process
continues identically."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ...core import restore, rng_state, set_rng_state
from ..conversion import dendritic_layers
from ..decisions.plateau import Plateau
from . import phases
from .packing import encode, pack

if TYPE_CHECKING:
    from ..growth import Growth


def state_of(growth: "Growth", now: dict | None = None) -> dict:
    """The whole run: network, optimiser, scheduler, decisions so far, what it may go back to,
    random states, records."""
    for _, layer in dendritic_layers(growth.network):
        layer.clear_processors()
    kind, value = growth.pending or (None, None)
    return {
        "now": growth.snapshot() if now is None else now,
        "best": growth.best,
        "base": growth.base,
        "trial": growth.trial,
        "candidates": growth.candidates,
        "pending": [kind, value],
        "plateau": growth.plateau.state_dict(),
        "seed": growth.seed,
        "frozen": list(growth.frozen),
        "records": growth.records.state_dict(),
        "rng": rng_state(),
    }


def take_up(growth: "Growth", state: dict) -> None:
    """Go back to a state_dict(); on any error network and optimiser are left as they were."""
    if not isinstance(state, dict) or not {"now", "plateau", "best", "seed"} <= set(state):
        raise ValueError(
            "not the state of a Growth; pass what growth.state_dict() returned, or "
            "growth.load(path)"
        )
    now = state["now"]
    if now is not None and growth.optimizer is not None and "optimizer" not in now:
        raise ValueError(
            "the run was saved without an optimiser; build this Growth without one too, and attach "
            "it afterwards"
        )
    plateau = Plateau(growth.config)
    plateau.load_state_dict(state["plateau"])
    extras = restore(growth.network, now, growth.optimizer) if now is not None else {}
    growth.plateau, growth.seed, growth.frozen = plateau, state["seed"], list(state["frozen"])
    growth.best, growth.base, growth.trial, growth.candidates = (
        state["best"],
        state["base"],
        state["trial"],
        dict(state["candidates"]),
    )
    kind, value = state["pending"]
    growth.pending = (kind, value) if kind is not None else None
    if now is not None and growth.optimizer is None and "optimizer" in now and kind is None:
        growth.pending = ("state", now)
    phases.set_trainable(growth)
    growth.wrap_again()
    if growth.scheduler is not None and extras.get("scheduler") is not None:
        growth.scheduler.load_state_dict(extras["scheduler"])
    growth.records.load_state_dict(state["records"])
    if state["rng"] is not None:
        set_rng_state(state["rng"])
    growth.restart_clock()


def take_up_best(growth: "Growth", state: dict) -> None:
    """Begin from the best network that a run wrote (best_model.pt), with the decisions up to
    then."""
    restore(growth.network, state, growth.optimizer if "optimizer" in state else None)
    if "plateau" in state["extras"]:
        growth.plateau.load_state_dict(state["extras"]["plateau"])
        growth.best = state
    if growth.optimizer is None and "optimizer" in state:
        growth.pending = ("state", state)
    growth._enter(restart=False)


def encoded(growth: "Growth", state: dict) -> bytes:
    """A state_dict as the content of a file. What a run may go back to changes rarely, so each such
    part is packed once."""
    parts = {name: state.pop(name) for name in ("now", "best", "base", "trial")}
    growth._packed = {
        key: value
        for key, value in growth._packed.items()
        if any(value[0] is part for part in parts.values())
    }
    for part in parts.values():
        if part is not None and id(part) not in growth._packed:
            growth._packed[id(part)] = (part, pack(part))
    packed = {
        name: None if part is None else growth._packed[id(part)][1] for name, part in parts.items()
    }
    return encode({**state, **packed})


def plain_state(value: Any) -> Any:
    """State of a scheduler without what a checkpoint must not hold: functions, and references to
    the optimiser."""
    if isinstance(value, dict):
        return {k: plain_state(v) for k, v in value.items() if not callable(v)}
    if (
        isinstance(value, Iterable)
        and not isinstance(value, (str, bytes))
        and not hasattr(value, "shape")
    ):
        return [plain_state(v) for v in value if not callable(v)]
    return value
