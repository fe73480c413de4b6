"""The page of the instruments: its blocks run one after the other, and say what the page says."""

import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[3] / "pilimit_lib/inf/INSTRUMENTS.md"


def test_the_blocks_of_the_page_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 5
    names = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, "INSTRUMENTS.md", "exec"), names)
    shown = capsys.readouterr().out
    assert "False" in shown and "['layers.2']" in shown and "layers.2: its own update" in shown
    assert not (tmp_path / "replay.pt").exists()
    for target in re.findall(r"\]\(([^)#]+)\)", PAGE.read_text(encoding="utf-8")):
        assert (PAGE.parent / target).exists(), target
