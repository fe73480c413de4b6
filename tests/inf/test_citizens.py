"""The table of docs/TORCH.md, cell by cell: what the page says is what runs."""

import pytest
import torch

from . import citizens

PAGE = citizens.cells(citizens.PAGE.read_text(encoding="utf-8"))

pytestmark = [
    # torch's forward mode still compiles a part of itself by torch.jit.script, which it deprecates
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning"),
]


def test_the_page_has_every_tool_and_kind_in_order():
    assert list(PAGE) == [(tool, kind) for tool in citizens.TOOLS for kind in citizens.KINDS]


@pytest.mark.parametrize("kind", citizens.KINDS)
@pytest.mark.parametrize("tool", citizens.TOOLS)
def test_a_cell_is_what_runs(tool, kind):
    if tool == "safetensors":
        pytest.importorskip("safetensors", reason="safetensors is not installed here")
    if tool in ("torch.compile", "torch.export") and not hasattr(torch.compiler, "set_stance"):
        pytest.skip("the table is of the compiler of torch 2.6 and later")
    assert citizens.outcome(tool, kind) == PAGE[tool, kind]
