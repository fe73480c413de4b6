"""Of the whole suite: seeded generators, hypothesis examples that are the same on every machine,
one thread per worker."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers already fill the cores: with torch's own threads on top the suite takes several times
    # as long. Set for the processes that tests start, too.
    torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))

settings.register_profile(
    "pilimit", derandomize=True, database=None, deadline=None, max_examples=25, print_blob=False
)
settings.load_profile("pilimit")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of data and fixtures beside the repository."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("there is no ../shared beside the repository")
    return folder
