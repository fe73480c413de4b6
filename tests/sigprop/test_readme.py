"""Every block of the README runs, in order, in one namespace."""

import re
from pathlib import Path

import torch

from pilimit_lib import sigprop

README = (Path(sigprop.__file__).parent / "README.md").read_text()


def test_the_readme_runs_as_printed():
    torch.manual_seed(0)
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) >= 5
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["prediction"].shape == (64,) and list(names["early"]) == ["signal", "model.0"]
    assert list(names["by_layer"]) == ["signal", "model.0", "model.1", "output"]
    by_hand = names["by_hand"]
    assert by_hand.train()(names["images"], names["labels"]).shape == (64, 10)
    # What is only defined there must work as well.
    nn, propagators, build = torch.nn, sigprop.propagators, names["build_optimizer"]
    project, layer = nn.Linear(10, 64), nn.Linear(64, 8)
    signal = nn.Sequential(
        sigprop.signals.LabelNumberToOnehot(10), names["MySignal"](project, (10,))
    )
    mine = names["MyPropagator"](layer, optimizer=build(layer))
    net = names["MyModel"](
        nn.Sequential(mine, propagators.Identity(nn.Linear(8, 10))),
        propagators.signals.Loss(signal, optimizer=build(signal), loss=names["Margin"]()),
    )
    before = layer.weight.clone()
    assert net(names["images"].flatten(1), names["labels"]).shape == (64, 10) and not torch.equal(
        before, layer.weight
    )
    assert net.eval()(names["images"].flatten(1)).shape == (64, 10)
