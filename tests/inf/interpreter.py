"""Whether kernels can be run by the interpreter of Triton here."""

import pytest


def needs_interpreter() -> None:
    """Skip the test where there is none, or one that refuses what kernels of Triton do."""
    triton = pytest.importorskip("triton", reason="triton is not installed here")
    major, minor = triton.__version__.split(".")[:2]
    if (int(major), int(minor)) < (3, 1):
        pytest.skip("the interpreter of triton 3.0 refuses tl.arange of a constant")
