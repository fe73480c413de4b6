"""The code of the room's README runs as it is printed, and what it says comes of it."""

import re
from pathlib import Path

import pilimit_lib.dendrites
from pilimit_lib.dendrites import GPA, dendritic_layers

README = Path(pilimit_lib.dendrites.__file__).with_name("README.md")


def test_quick_starts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    engine, facade = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    names: dict = {}
    exec(engine, names)
    layers = dendritic_layers(names["growth"].model)
    assert names["done"] and [len(layer.dendrites) for _, layer in layers] in ([0, 0], [1, 1])
    GPA.pc.reset()
    exec(facade, names)
    assert not names["complete"] and GPA.pai_tracker.member_vars["num_epochs_run"] == 1
    GPA.pc.reset()
