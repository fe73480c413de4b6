"""The random state of a run, saved and restored."""

import random

import torch

from pilimit_lib.core import load, rng_state, save, set_rng_state


def draw():
    return torch.randn(3).tolist(), random.random(), random.gauss(0, 1), torch.randperm(5).tolist()


def test_draws_repeat_after_a_file(tmp_path):
    random.gauss(0, 1)  # leaves the second number of its pair in the state
    save(rng_state(), tmp_path / "rng.pt")
    expected = draw()
    draw()
    set_rng_state(load(tmp_path / "rng.pt"))
    assert draw() == expected


def test_the_state_is_a_copy():
    state = rng_state()
    expected = draw()
    set_rng_state(state)
    assert draw() == expected
    set_rng_state(state)
    assert draw() == expected
