"""The journal: torn lines, full disks, and the branches of a tree."""

import pytest

from pilimit_lib.lab.run.journal import Journal, read_journal

from .conftest import full_disk


def test_a_line_cut_off_by_a_kill_is_dropped_and_the_next_one_is_whole(tmp_path):
    path = tmp_path / "journal.jsonl"
    Journal(path).write("edit", what="one")
    with path.open("a") as file:
        file.write('{"kind": "edit", "wha')
    torn = path.read_bytes()
    again = Journal(path)
    assert path.read_bytes() == torn, "reading changes nothing: somebody may be writing that line"
    assert [event["kind"] for event in again.events] == ["branch", "edit"]
    again.write("edit", what="two")
    assert [event.get("what") for event in read_journal(path)] == [None, "one", None, "two"]
    assert [event["branch"] for event in read_journal(path)] == [0, 0, 1, 1]


def test_branches_name_the_checkpoint_they_grew_out_of(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    journal.write("train", loss=1.0)
    journal.fork(4)
    journal.fork(2)  # loaded twice, nothing happened in between
    journal.write("train", loss=0.5)
    assert [(e["branch"], e["after"]) for e in journal.events if e["kind"] == "branch"] == [
        (0, None),
        (1, 2),
    ]


def test_something_else_is_not_read_as_a_journal(tmp_path):
    for text in ("hello\n", "3\n", '{"kind": "edit"}\n', '{"kind": 3, "branch": 0}\n'):
        (tmp_path / "journal.jsonl").write_text(text)
        with pytest.raises(ValueError, match="journal.jsonl is not a journal"):
            read_journal(tmp_path / "journal.jsonl")


def test_a_full_disk_leaves_whole_lines(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.write("edit", what="one")
    with (
        full_disk(path.stat().st_size + 30),
        pytest.raises(OSError, match="journal .* could not be written: the disk is full"),
    ):
        journal.write("edit", what="two")
    assert len(journal.events) == 2 == len(read_journal(path))
    journal.write("edit", what="three")
    assert [e.get("what") for e in read_journal(path)] == [None, "one", "three"]
