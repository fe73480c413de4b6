"""What a run leaves in its folder after each epoch: rows, checkpoints, pictures."""

from pathlib import Path
from typing import TYPE_CHECKING

from .. import distributed
from ..decisions.plateau import Decision
from .packing import encode, save_state, write
from .state import encoded, state_of

if TYPE_CHECKING:
    from ..growth import Growth


def record(growth: "Growth", row: dict, extras: dict, decision: Decision) -> None:
    """Take in an epoch: what is known of it, scores and numbers by kind, and what was decided. Rank
    0 writes."""
    s = growth.plateau.state
    row = {
        "epoch": s.epoch,
        "running": row["validation"] if s.running is None else s.running,
        "best": s.best,
        **row,
    }
    named = {
        kind: ({kind: float(v)} if not isinstance(v, dict) else {k: float(x) for k, x in v.items()})
        for kind, v in extras.items()
        if v is not None
    }
    if distributed.is_first():
        growth.records.epoch(row, named, growth.plateau.better)
        switched = decision.action != "continue"
        if switched:
            record_switch(growth, decision)
        if growth.config.save_dir is not None:
            _write(growth, Path(growth.config.save_dir), decision, switched)
    distributed.wait()


def record_switch(growth: "Growth", decision: Decision) -> None:
    state = growth.plateau.state
    growth.records.switch(
        {
            "epoch": state.epoch,
            "action": decision.action,
            "dendrites": state.dendrites,
            "reason": decision.reason,
        }
    )


def _write(growth: "Growth", folder: Path, decision: Decision, switched: bool) -> None:
    how, k = growth.config.checkpoints, growth.plateau.state.dendrites
    if switched and how != "never":
        if decision.action in ("grow", "retry") and growth.best is not None:
            save_state(growth.best, folder / f"beforeSwitch_{k - 1}.pt")
            save_state(growth.snapshot(), folder / f"switch_{k}.pt")
        elif decision.action == "lower_rate":
            save_state(growth.trial, folder / f"PBCount_{k}_startSteps_{decision.skip - 1}.pt")
    # the network is what was just kept as the best
    unchanged = growth.best if decision.new_best and not switched else None
    latest = how == "epoch" or (how == "switch" and switched)
    content = (
        encoded(growth, state_of(growth, unchanged))
        if latest or (unchanged is not None and how != "never")
        else None
    )
    if latest:
        write(folder / "latest.pt", content)
    if decision.new_best and how != "never":
        write(folder / "best_model.pt", content if unchanged is not None else encode(growth.best))
    pictures = {"never": False, "epoch": True, "switch": decision.action in ("grow", "finish")}[
        growth.config.graphs
    ]
    if pictures:
        from .plot import draw

        draw(growth.records.rows, folder / f"{folder.name}.png")
