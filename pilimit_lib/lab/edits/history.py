"""Edits as steps that can be taken together, or taken back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..network import NetworkWithOps
from ..run.journal import Journal
from ..run.state import network_state, set_network_state
from .ops import ModelOps
from .rollback import Memento

if TYPE_CHECKING:
    from ..watch import Lab


class History:
    """What `undo` goes back to: the state of the network before each of the last `depth` edits."""

    def __init__(self, lab: Lab, depth: int) -> None:
        self.lab, self.depth = lab, depth
        self.editing = False
        self.states: list[tuple[str, dict[str, Any]]] = []

    def remember(self, summary: str, before: dict[str, Any]) -> None:
        """Keep the state before an edit that has succeeded."""
        self.states = [*self.states, (summary, before)][-self.depth :] if self.depth else []

    @contextmanager
    def one(self, summary: str) -> Iterator[None]:
        """Around one edit: remembered, put on the timeline, and new plans afterwards."""
        before = None if self.editing or not self.depth else network_state(self.lab)
        yield
        if before is not None:
            self.remember(summary, before)
        self.lab.forget_plans()
        self.lab.note("edit", what=summary)

    @contextmanager
    def block(self) -> Iterator[NetworkWithOps | ModelOps]:
        """All edits inside the `with`, or on any error none; one step of undo."""
        lab = self.lab
        if self.editing:
            raise RuntimeError("an edit() inside an edit()")
        before, state = (
            Memento([lab.module, *lab.neurons.values()], lab.optimizer),
            network_state(lab),
        )
        journal, lab.journal = lab.journal, Journal()
        self.editing = True
        try:
            yield lab.model
        except BaseException:
            before.restore()
            lab.forget_plans()
            lab.journal = journal
            raise
        finally:
            self.editing = False
        notes, lab.journal = lab.journal.events, journal
        happened = [event for event in notes if event["kind"] != "branch"]
        for event in happened:
            journal.write(
                **{key: value for key, value in event.items() if key not in ("branch", "time")}
            )
        if happened:
            self.remember(f"{len(happened)} edits", state)

    def undo(self) -> str:
        """Go back to the state before the last edit; returns what was undone."""
        if not self.states:
            raise LookupError(f"there is no edit to undo (undo_depth is {self.depth})")
        summary, state = self.states[-1]
        set_network_state(self.lab, state)
        self.states.pop()
        self.lab.note("undo", what=summary)
        return summary
