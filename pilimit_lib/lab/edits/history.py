"""Edits that are taken together or not at all, and edits that are taken back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..run.journal import Journal
from ..run.session import Session
from .rollback import Rollback, remember


@contextmanager
def edit_block(session: Session) -> Iterator[None]:
    """All edits inside the `with`, or on any error none; one step of undo."""
    if session.editing:
        raise RuntimeError("an edit() inside an edit()")
    before = Rollback(session)
    journal, session.journal = session.journal, Journal()
    session.editing = True
    try:
        yield
    except BaseException:
        before.restore(session)
        session.journal = journal
        raise
    finally:
        session.editing = False
    events, session.journal = session.journal.events, journal
    happened = [event for event in events if event["kind"] != "branch"]
    for event in happened:
        fields = {key: value for key, value in event.items() if key not in ("branch", "time")}
        journal.write(**fields)
    if happened:
        remember(session, f"{len(happened)} edits", before)


def undo(session: Session) -> str:
    """Go back to the moment before the last edit; returns what was undone."""
    if not session.past:
        raise LookupError(f"there is no edit to undo (undo_depth is {session.undo_depth})")
    summary, before = session.past[-1]
    before.check(session)
    before.restore(session)
    session.module.zero_grad(set_to_none=True)
    session.past.pop()
    session.note("undo", what=summary)
    return summary
