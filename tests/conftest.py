"""Determinism of the whole suite: seeded generators, and hypothesis examples that are the same on every machine."""
from pathlib import Path

import pytest
import torch
from hypothesis import settings

settings.register_profile("pilimit", derandomize=True, database=None, deadline=None, max_examples=25, print_blob=False)
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
