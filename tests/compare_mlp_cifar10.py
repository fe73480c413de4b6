"""The library against pilimit_orig on real images, as tests; `python -m tests.compare_mlp_cifar10`
prints the table."""

import subprocess
import sys
from pathlib import Path

import pytest

from experiments.tests.compare_mlp import TOLERANCE, compare
from experiments.tests.compare_mlp_cifar10 import CASES, batches, main


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The published files, unpacked from ../shared/data."""
    unpack = Path(__file__).resolve().parents[2] / "shared" / "data" / "unpack.py"
    if not unpack.exists():
        pytest.skip("no CIFAR-10 at ../shared/data")
    folder = tmp_path_factory.mktemp("cifar10")
    subprocess.run(
        [sys.executable, str(unpack), str(folder), "cifar10"], check=True, capture_output=True
    )
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_library_is_the_original_on_images(case, dtype, root):
    assert compare(case, dtype, batches(root)(case, dtype)) < TOLERANCE[dtype]


if __name__ == "__main__":
    sys.exit(main())
