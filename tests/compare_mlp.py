"""The library against pilimit_orig, as tests: `python -m tests.compare_mlp` prints the table."""

import sys

import pytest
import torch

from experiments.tests.compare_mlp import (
    CASES,
    TOLERANCE,
    Case,
    compare,
    difference,
    random_data,
    start,
    table,
    train,
)
from pilimit_lib.inf import InfMLP


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_library_is_the_original(case, dtype):
    assert compare(case, dtype) < TOLERANCE[dtype]


def test_a_difference_would_be_seen():
    """The same comparison with a learning rate that is off by a thousandth."""
    case = Case("control", steps=5)
    x, y, test_x = random_data(case, torch.float64)
    orig = start(case, 16, 3, torch.float64)
    net = InfMLP.from_pilimit_orig(orig.state())
    theirs_slower = Case("control", steps=5, lr=case.lr * 1.001)
    worst = train(case, orig, net, x, y, test_x)
    other = InfMLP.from_pilimit_orig(start(case, 16, 3, torch.float64).state())
    train(theirs_slower, start(case, 16, 3, torch.float64), other, x, y, test_x)
    with torch.no_grad():
        assert worst < 1e-12 and difference(other(test_x), orig.predict(test_x)) > 1e-5


if __name__ == "__main__":
    sys.exit(1 if table(CASES) else 0)
