"""The code of the room's README runs as it is printed."""

import re
from pathlib import Path

import torch

import pilimit_lib.dendrites
from pilimit_lib.dendrites import GPA, dendritic_layers
from tests.dendrites.helpers import mlp

README = Path(pilimit_lib.dendrites.__file__).with_name("README.md")


def test_quick_starts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    engine, facade = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    scores = iter([1.0] * 12 + [2.0] * 500)

    def train_epoch(model, optimizer):
        optimizer.zero_grad()
        model(torch.randn(4, 5)).square().mean().backward()
        optimizer.step()

    names = {"net": mlp(), "train_epoch": train_epoch, "validate": lambda model: next(scores)}
    exec(engine, names)
    assert names["done"] and [
        len(layer.dendrites) for _, layer in dendritic_layers(names["net"])
    ] == [1, 1]
    GPA.pc.reset()
    names = {"model": mlp(), "torch": torch, "accuracy": 0.5, "test_accuracy": 0.4}
    exec(facade, names)
    assert not names["complete"] and GPA.pai_tracker.member_vars["num_epochs_run"] == 1
    GPA.pc.reset()
