"""Checkpoints of a run in its folder.

latest.pt holds the network as it is and refers to other files of the folder for what the run may go
back to, so that an epoch writes one copy of the network, not four. It is written first: what it
refers to was there before, and the folder is consistent wherever the process dies. Files referred
to hold all of themselves.
"""

import uuid
from pathlib import Path

from ...core import write_bytes
from ..decisions.plateau import Decision
from .packing import FILE, encode, save_state
from .run import Run
from .state import state_of


def write(run: Run, folder: Path, decision: Decision) -> None:
    """Write latest.pt, best_model.pt and the files of a switch, where the settings ask for them."""
    switched, k = decision.action != "continue", run.plateau.state.dendrites
    grown = decision.action in ("grow", "retry")
    kept = decision.new_best and not switched  # the network is what was just kept as the best
    content, token = None, uuid.uuid4().hex
    if kept or switched or run.config.checkpoints == "epoch":
        now = run.best if kept else run.base if grown else None
        state = state_of(run, now)
        content = encode({**(state if kept else _referring(run, state)), "token": token})
    if switched or run.config.checkpoints == "epoch":
        write_bytes(folder / "latest.pt", content)
    if kept:
        write_bytes(folder / "best_model.pt", content)
        run.stored["best"] = (run.best, ["best_model.pt", "now", token])
    elif run.best is not None and run.stored.get("best", (None,))[0] is not run.best:
        _store(run, "best", folder / "best_model.pt")
    if grown:
        if run.best is not None:
            save_state(run.best, folder / f"beforeSwitch_{k - 1}.pt")
        if run.base is None:
            save_state(run.snapshot(), folder / f"switch_{k}.pt")
        else:
            _store(run, "base", folder / f"switch_{k}.pt")
    elif decision.action == "lower_rate":
        _store(run, "trial", folder / f"PBCount_{k}_startSteps_{decision.skip - 1}.pt")


def _store(run: Run, name: str, path: Path) -> None:
    part, token = getattr(run, name), uuid.uuid4().hex
    save_state({**part, "token": token}, path)
    run.stored[name] = (part, [path.name, None, token])


def _referring(run: Run, state: dict) -> dict:
    """A state_of() with references in place of what files of the folder hold."""
    held = {name: place for name, (part, place) in run.stored.items() if state[name] is part}
    return {**state, **{name: {FILE: place} for name, place in held.items()}}
