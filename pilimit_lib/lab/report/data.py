"""What the page shows, from a living run or from a run's folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from ..data.ledger import Ledger
from ..run.checkpoints import CheckpointManager
from ..run.journal import read_journal
from ..run.session import Session
from .stats import neuron_frame, neuron_rows, thumbnails

CURVES = ("train", "eval")


@dataclass(frozen=True)
class RunView:
    """A run at one moment. `samples` is None where no ledger is known, `neurons` may be empty."""

    name: str
    age: int
    steps: int
    settings: dict[str, Any]
    events: list[dict[str, Any]]
    checkpoints: CheckpointManager | None
    samples: pd.DataFrame | None
    neurons: pd.DataFrame
    pictures: dict[int, Tensor]
    moment: str

    @classmethod
    def of(cls, session: Session) -> RunView:
        """The run as it stands."""
        found = thumbnails(session)
        samples = (
            None
            if session.loader is None
            else session.loader.dataset.get_dataframe(all_samples=True)
        )
        return cls(
            session.name,
            session.age,
            session.steps,
            session.settings(),
            list(session.journal.events),
            session.chkpt_manager,
            samples,
            neuron_frame(session),
            dict(zip(found["ids"], found["images"])),
            "the present state",
        )

    @classmethod
    def of_folder(cls, folder: Path, checkpoint_id: int | None = None) -> RunView:
        """A run's folder, ledger and neurons from one of its checkpoints."""
        if not (folder / "journal.jsonl").is_file():
            raise FileNotFoundError(f"{folder} is not a run of the lab: it has no journal.jsonl")
        manager, events = (
            CheckpointManager(folder / "checkpoints"),
            read_journal(folder / "journal.jsonl"),
        )
        last = max(
            (event for event in events if "age" in event),
            key=lambda event: event["time"],
            default={"age": 0, "step": 0},
        )
        if checkpoint_id is None and not len(manager):
            return cls(
                folder.name,
                last["age"],
                last["step"],
                {},
                events,
                manager,
                None,
                pd.DataFrame(),
                {},
                "no checkpoint yet",
            )
        chosen = max(manager) if checkpoint_id is None else checkpoint_id
        state = manager.read(chosen)
        manager.current = chosen
        network, stored = state["network"], state["ledgers"].get("train")
        samples = None
        if stored is not None:
            ledger = Ledger(len(stored["columns"]["denied"]))
            ledger.load_state(stored)
            samples = ledger.frame()
        neurons = neuron_rows(
            [
                (layer, network["neurons"][layer], f"{layer}.weight" in network["frozen"])
                for layer in state["layers"]
            ]
        )
        pictures = dict(zip(state["thumbnails"]["ids"], state["thumbnails"]["images"]))
        return cls(
            state["settings"]["name"],
            network["age"],
            network["steps"],
            state["settings"],
            events,
            manager,
            samples,
            neurons,
            pictures,
            f"checkpoint {chosen}",
        )

    def curve(self, kind: str) -> pd.DataFrame:
        """Points of a curve: branch, age, loss, accuracy."""
        columns = ["branch", "age", "loss", "accuracy"]
        points = [event for event in self.events if event["kind"] == kind]
        return pd.DataFrame(
            [{key: event[key] for key in columns} for event in points], columns=columns
        )

    def branches(self) -> dict[int, int | None]:
        """The checkpoint that each branch grew out of; None for a fresh start."""
        return {
            event["branch"]: event["after"] for event in self.events if event["kind"] == "branch"
        }

    def root_of(self, branch: int) -> tuple[int, float] | None:
        """Branch and age of the point at which `branch` left another one."""
        after = self.branches().get(branch)
        if after is None or self.checkpoints is None or after not in self.checkpoints:
            return None
        entry = self.checkpoints.entry(after)
        return entry.get("branch", 0), entry.get("age", 0)

    def timeline(self) -> list[dict[str, Any]]:
        """What was done to the run: everything that is no point of a curve."""
        return [event for event in self.events if event["kind"] not in (*CURVES, "branch")]
