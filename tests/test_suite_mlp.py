"""Infinite against finite networks over hyper-parameters, as tests; the table is printed by
`python -m tests.test_suite_mlp`."""

import pytest

from experiments.tests.test_suite_mlp import SUITE, compare, main


@pytest.mark.parametrize("name", SUITE)
def test_finite_networks_tend_to_the_infinite_one(name):
    s = SUITE[name]
    found = compare(s)
    assert found["wide"] < 0.4 * found["moved"], found
    expected = (s.wide / s.narrow) ** 0.5
    assert expected / 2.5 < found["narrow"] / found["wide"] < 2.5 * expected, found


if __name__ == "__main__":
    main()
