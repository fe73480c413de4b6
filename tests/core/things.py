"""A small network with everything an axis can hold: parameters along either dimension, a buffer,
and blocks."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from pilimit_lib.core import Axis, Blocks, Change

# Whether the optimisers of this torch take `named_parameters()`: since 2.6.
NAMES = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 6)
OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.1),
    "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "adam": partial(torch.optim.Adam, lr=0.01),
    "adamw": partial(torch.optim.AdamW, lr=0.01, amsgrad=True),
}


class Hidden(nn.Module):
    """d → h → 2. Its hidden units form an axis: rows of `up`, columns of `down`, a buffer, and a
    log kept in blocks."""

    def __init__(self, units: int = 5, d: int = 3) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(d, units), nn.Linear(units, 2)
        self.register_buffer("usage", torch.rand(units))
        self.log = Blocks.of(torch.rand(units, 2), block_rows=3)
        self.axis = Axis("units").join(self.up, "weight", label="in").join(self.up, "bias")
        self.axis.join(self.down, "weight", dim=1, label="out").join(self, "usage").join(
            self, "log"
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)) * (1 + self.usage))

    def values(self, count: int) -> dict[str, Tensor]:
        """Random new slices for `count` units."""
        return {
            m.label: torch.randn(m.fill_shape(count)).to(m.value.dtype) for m in self.axis.members
        }

    def structure(self) -> dict[str, int]:
        return {"units": self.axis.size}

    def restructure(self, structure: dict[str, int]) -> Change:
        source = torch.arange(structure["units"])
        return self.axis.take(source.where(source < self.axis.size, -1))

    def get_extra_state(self) -> Tensor:
        return self.log.dense()

    def set_extra_state(self, state: Tensor) -> None:
        self.log.set(state)


class Branching(nn.Module):
    """Grows children instead of slices: branches that `restructure` has to create before tensors
    can be loaded."""

    def __init__(self, d: int = 3) -> None:
        super().__init__()
        self.d = d
        self.trunk = nn.Linear(d, 2)
        self.branches = nn.ModuleList()

    def branch(self) -> Change:
        self.branches.append(Hidden(4, self.d))
        return self._added(self.branches[-1])

    def prune(self) -> Change:
        removed = self.branches[-1]
        del self.branches[-1]
        changes = [Change.removing(p) for p in removed.parameters()]
        return sum(changes[1:], changes[0])

    def _added(self, child: nn.Module) -> Change:
        changes = [Change.adding(p, beside=self.trunk.weight) for p in child.parameters()]
        return sum(changes[1:], changes[0])

    def forward(self, x: Tensor) -> Tensor:
        return self.trunk(x) + sum(branch(x) for branch in self.branches)

    def structure(self) -> dict[str, int]:
        return {"branches": len(self.branches)}

    def restructure(self, structure: dict[str, int]) -> Change:
        change = Change()
        while len(self.branches) < structure["branches"]:
            change = change + self.branch()
        while len(self.branches) > structure["branches"]:
            change = change + self.prune()
        return change


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> list[Tensor]:
    """Every tensor of the model and of its optimiser, in a fixed order, cloned."""
    found = [
        value.detach().clone() for value in model.state_dict().values() if isinstance(value, Tensor)
    ]
    for group in optimizer.param_groups if optimizer else ():
        for parameter in group["params"]:
            found += [
                torch.as_tensor(value).clone()
                for _, value in sorted(optimizer.state.get(parameter, {}).items())
                if value is not None
            ]
    return found


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(left, right)
    )


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int = 3,
    seed: int = 0,
    d: int = 3,
    o: int = 2,
) -> None:
    """Some steps of regression on random data that depend on `seed` only."""
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    for _ in range(steps):
        x, y = (torch.randn(6, size, generator=generator).to(dtype) for size in (d, o))
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
