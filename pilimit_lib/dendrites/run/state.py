"""A whole run as a state, and back: everything that growth may go back to, so that a fresh process
continues identically."""

from ...core import restore, rng_state, set_rng_state
from ..conversion import dendritic_layers
from ..decisions.plateau import Plateau
from . import phases
from .run import Run


def state_of(run: Run, now: dict | None = None) -> dict:
    """The whole run: network, optimiser, scheduler, decisions so far, what it may go back to,
    random states, records."""
    for _, layer in dendritic_layers(run.network):
        layer.clear_processors()
    return {
        "now": run.snapshot() if now is None else now,
        "best": run.best,
        "base": run.base,
        "trial": run.trial,
        "candidates": run.candidates,
        "pending": list(run.pending or (None, None)),
        "plateau": run.plateau.state_dict(),
        "seed": run.seed,
        "frozen": list(run.frozen),
        "records": run.records.state_dict(),
        "rng": rng_state(),
    }


def take_up(run: Run, state: dict) -> None:
    """Go back to a state_of(); on any error network and optimiser are left as they were."""
    if not isinstance(state, dict) or not {"now", "plateau", "best", "seed"} <= set(state):
        raise ValueError(
            "not the state of a Growth; pass what growth.state_dict() returned, or "
            "growth.load(path)"
        )
    now = state["now"]
    if now is not None and run.optimizer is not None and "optimizer" not in now:
        raise ValueError(
            "the run was saved without an optimiser; build this Growth without one too, and attach "
            "it afterwards"
        )
    plateau = Plateau(run.config)
    plateau.load_state_dict(state["plateau"])
    extras = {} if now is None else restore(run.network, now, run.optimizer)
    run.plateau, run.seed, run.frozen = plateau, state["seed"], list(state["frozen"])
    run.best, run.base, run.trial = state["best"], state["base"], state["trial"]
    run.candidates = dict(state["candidates"])
    kind, value = state["pending"]
    run.pending = None if kind is None else (kind, value)
    if now is not None and run.optimizer is None and "optimizer" in now and kind is None:
        run.pending = ("state", now)
    phases.set_trainable(run)
    run.wrap_again()
    run.restart_average()
    if run.scheduler is not None and extras.get("scheduler") is not None:
        run.scheduler.load_state_dict(extras["scheduler"])
    run.records.load_state_dict(state["records"])
    if state["rng"] is not None:
        set_rng_state(state["rng"])
    run.restart_clock()


def take_up_best(run: Run, state: dict) -> None:
    """The best network that a run wrote (best_model.pt), with the decisions up to then; the caller
    enters the phase that they speak of."""
    extras = run.restore(state)
    if "plateau" in extras:
        run.plateau.load_state_dict(extras["plateau"])
        run.best = state
    if run.optimizer is None and "optimizer" in state:
        run.pending = ("state", state)
