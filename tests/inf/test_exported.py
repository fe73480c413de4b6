"""Networks that torch.export saved: a fresh process that imports the library, and nothing else,
loads and runs them."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from pilimit_lib.inf import InfMLP, InfPiConvNet

NETWORKS = {
    "mlp": lambda: (InfMLP(6, 3, 5, 2, memory="moments", degree=3), torch.randn(4, 6)),
    "convnet": lambda: (
        InfPiConvNet(3, 4, (5, 6), pools=(2,), shortcuts=(), degree=2),
        torch.randn(2, 3, 8, 8),
    ),
}
SCRIPT = """
import sys, torch
import pilimit_lib.inf
program = torch.export.load(sys.argv[1])
x, expected = torch.load(sys.argv[2], weights_only=True)
torch.testing.assert_close(program.module()(x), expected)
"""


@pytest.mark.skipif(
    not hasattr(torch.compiler, "set_stance"), reason="needs the exporter of torch 2.6 or later"
)
@pytest.mark.filterwarnings("ignore")  # the exporter of some torch versions warns about itself
@pytest.mark.parametrize("kind", NETWORKS)
def test_a_saved_program_loads_in_a_fresh_process(kind, tmp_path):
    torch.manual_seed(0)
    net, x = NETWORKS[kind]()
    nn.init.normal_(net.layers[-1].V)
    program, numbers = tmp_path / "net.pt2", tmp_path / "numbers.pt"
    torch.export.save(torch.export.export(net, (x,), strict=False), program)
    torch.save((x, net(x).detach()), numbers)
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(program), str(numbers)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
