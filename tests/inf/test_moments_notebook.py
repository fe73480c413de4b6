"""The walk-through runs from top to bottom, within its two minutes, and every picture comes out."""

from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks" / "pilimit_intro.ipynb"


@pytest.mark.filterwarnings("ignore")  # the machinery's own; those of the cells arrive as output
def test_the_walk_through_runs():
    nbformat = pytest.importorskip(
        "nbformat", reason="the notebook needs nbformat: pip install -e .[test]"
    )
    nbclient = pytest.importorskip(
        "nbclient", reason="running the notebook needs nbclient: pip install -e .[test]"
    )
    pytest.importorskip(
        "ipykernel", reason="running the notebook needs ipykernel: pip install -e .[test]"
    )
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    # A cell takes seconds; the limit is only there to end one that hangs, on a busy machine too.
    nbclient.NotebookClient(
        notebook, timeout=1200, resources={"metadata": {"path": str(NOTEBOOK.parents[1])}}
    ).execute()
    outputs = [
        output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    ]
    assert not [
        output for output in outputs if output.output_type == "stream" and output.name == "stderr"
    ]
    pictures = [output for output in outputs if "image/png" in getattr(output, "data", {})]
    assert len(pictures) == 5


def test_it_is_stored_without_outputs():
    nbformat = pytest.importorskip(
        "nbformat", reason="the notebook needs nbformat: pip install -e .[test]"
    )
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    assert not any(
        cell.outputs or cell.execution_count for cell in cells if cell.cell_type == "code"
    )
