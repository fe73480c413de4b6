"""The contract of growable things, filled in by core's own examples."""

import torch

from pilimit_lib.core import follow
from tests.contracts import GrowableContract

from .things import Branching, Hidden


class TestUnitsAdded(GrowableContract):
    def build(self):
        return Hidden(), torch.randn(4, 3, generator=torch.Generator().manual_seed(1))

    def grow(self, model):
        return model.axis.append(model.values(3))


class TestUnitsRemovedAndReordered(TestUnitsAdded):
    def grow(self, model):
        return model.axis.keep(torch.arange(model.axis.size - 1).flip(0))


class TestBranchesAdded(TestUnitsAdded):
    """Children that restructure creates are restructured in turn: the new branch has grown
    itself."""

    def build(self):
        return Branching(), super().build()[1]

    def grow(self, model):
        change = model.branch()
        return change + model.branches[-1].axis.append(model.branches[-1].values(2))


class TestBranchesRemoved(TestBranchesAdded):
    def build(self):
        model, x = super().build()
        model.branch()
        model.branch()
        return model, x

    def grow(self, model):
        return model.prune()


def test_a_child_that_grows_right_after_it_was_added_is_followed():
    model = Branching()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    change = model.branch()
    follow(optimizer, change + model.branches[-1].axis.append(model.branches[-1].values(2)))
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
