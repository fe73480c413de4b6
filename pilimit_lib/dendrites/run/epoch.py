"""What a run leaves in its folder after each epoch: rows, checkpoints, pictures."""

from pathlib import Path

from .. import distributed
from ..decisions.plateau import Decision
from ..decisions.rules import Never
from . import checkpoints
from .plot import draw
from .run import Run


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
            folder = Path(run.config.save_dir)
            if run.config.checkpoints != "never":
                checkpoints.write(run, folder, decision)
            if _drawn(run, decision.action):
                draw(run.records.rows, folder / f"{folder.name}.png")
    distributed.wait()


def _by_name(kind: str, values) -> dict:
    return values if isinstance(values, dict) else {kind: values}


def record_switch(run: Run, decision: Decision) -> None:
    s = run.plateau.state
    row = (s.epoch, decision.action, s.dendrites, decision.reason)
    run.records.switch(dict(zip(("epoch", "action", "dendrites", "reason"), row)))


def _drawn(run: Run, action: str) -> bool:
    """Whether a picture is due: at switches, where there are any."""
    if run.config.graphs != "switch":
        return run.config.graphs == "epoch"
    return action in ("grow", "finish") or isinstance(run.config.switch, Never)
