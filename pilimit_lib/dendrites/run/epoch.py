"""What a run leaves in its folder after each epoch: rows, checkpoints, pictures."""

from pathlib import Path

from ...core import write_bytes
from .. import distributed
from ..decisions.plateau import Decision
from .packing import encode, save_state
from .plot import draw
from .run import Run
from .state import encoded, state_of


def record(run: Run, row: dict, extras: dict, decision: Decision) -> None:
    """Take in an epoch: what is known of it, scores and numbers by kind, and what was decided. Rank
    0 writes."""
    s = run.plateau.state
    row = {
        "epoch": s.epoch,
        "running": row["validation"] if s.running is None else s.running,
        "best": s.best,
        **row,
    }
    named = {
        kind: {name: float(v) for name, v in _by_name(kind, values).items()}
        for kind, values in extras.items()
        if values is not None
    }
    if distributed.is_first():
        run.records.epoch(row, named, run.plateau.better)
        if decision.action != "continue":
            record_switch(run, decision)
        if run.config.save_dir is not None:
            _write(run, Path(run.config.save_dir), decision)
    distributed.wait()


def _by_name(kind: str, values) -> dict:
    return values if isinstance(values, dict) else {kind: values}


def record_switch(run: Run, decision: Decision) -> None:
    s = run.plateau.state
    row = (s.epoch, decision.action, s.dendrites, decision.reason)
    run.records.switch(dict(zip(("epoch", "action", "dendrites", "reason"), row)))


def _write(run: Run, folder: Path, decision: Decision) -> None:
    how, k = run.config.checkpoints, run.plateau.state.dendrites
    switched = decision.action != "continue"
    if switched and how != "never":
        if decision.action in ("grow", "retry") and run.best is not None:
            save_state(run.best, folder / f"beforeSwitch_{k - 1}.pt")
            save_state(run.snapshot(), folder / f"switch_{k}.pt")
        elif decision.action == "lower_rate":
            save_state(run.trial, folder / f"PBCount_{k}_startSteps_{decision.skip - 1}.pt")
    # the network is what was just kept as the best
    unchanged = run.best if decision.new_best and not switched else None
    latest = how == "epoch" or (how == "switch" and switched)
    content = None
    if latest or (unchanged is not None and how != "never"):
        content = encoded(run, state_of(run, unchanged))
    if latest:
        write_bytes(folder / "latest.pt", content)
    if decision.new_best and how != "never":
        best = content if unchanged is not None else encode(run.best)
        write_bytes(folder / "best_model.pt", best)
    drawn = {"never": (), "switch": ("grow", "finish"), "epoch": (decision.action,)}
    if decision.action in drawn[run.config.graphs]:
        draw(run.records.rows, folder / f"{folder.name}.png")
