"""The documented facade is global state: tests that use it get it fresh and leave it so."""

import pytest

from pilimit_lib.dendrites import GPA, spelling


@pytest.fixture
def facade(tmp_path, monkeypatch):
    """GPA with its defaults, silent, in a folder of its own; without pictures, which are slow."""
    monkeypatch.chdir(tmp_path)

    def reset():
        GPA.pc.reset()
        GPA.pai_tracker = type(GPA.pai_tracker)()
        spelling._warned.clear()

    reset()
    GPA.pc.set_silent(True)
    GPA.pc.set_drawing_pai(False)
    yield GPA
    reset()
