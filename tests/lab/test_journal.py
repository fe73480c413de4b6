"""The journal: torn lines, full disks, and the branches of a tree."""
import os
import subprocess
import sys
import textwrap

import pytest

from pilimit_lib.lab.journal import Journal, read_journal


def test_a_line_cut_off_by_a_kill_is_dropped_and_the_next_one_is_whole(tmp_path):
    path = tmp_path / "journal.jsonl"
    Journal(path).write("edit", what="one")
    with path.open("a") as file:
        file.write('{"kind": "edit", "wha')
    again = Journal(path)
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
    assert [(e["branch"], e["after"]) for e in journal.events if e["kind"] == "branch"] == [(0, None), (1, 2)]


def test_something_else_is_not_read_as_a_journal(tmp_path):
    (tmp_path / "journal.jsonl").write_text("hello\n")
    with pytest.raises(ValueError, match="not a journal"):
        read_journal(tmp_path / "journal.jsonl")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on file sizes")
def test_a_full_disk_leaves_whole_lines(tmp_path):
    program = f"""
        import resource
        from pilimit_lib.lab.journal import Journal, read_journal
        from pathlib import Path
        path = Path({str(tmp_path / "journal.jsonl")!r})
        journal = Journal(path)
        journal.write("edit", what="one")
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 30, resource.RLIM_INFINITY))
        try:
            journal.write("edit", what="two")
        except OSError as error:
            print("said:", error)
        assert len(journal.events) == 2 == len(read_journal(path))
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        journal.write("edit", what="three")
        assert [e.get("what") for e in read_journal(path)] == [None, "one", "three"]
        print("fine")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(["."] + sys.path)})
    assert "fine" in done.stdout and "could not be written" in done.stdout, done.stdout + done.stderr
