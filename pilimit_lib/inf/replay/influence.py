"""What leaving samples out would do, by differentiating through the whole training.

Sample i's loss has a weight w_i in every batch that it is in. With weights as variables the run is
a function of them, and its derivative at w = 1 predicts what training without i leads to:

    query(trained without i) - query(trained)  ≈  -∂ query / ∂ w_i

The derivative is taken in reverse, from the last step to the first. For rows the states in between
lie in the network itself, as a step only appends; see `tape`. Index legend: q queries, n samples,
o rank out.

Sources: Hara et al. 2019; Bae et al. 2024 (unrolled differentiation); Ilyas & Engstrom 2025.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .record import RunRecord
from .retrain import Loss, cross_entropy_each, hidden, states
from .tape import Tape, require_appending, state_of

SAME = 0.01  # relative difference of the parameters of a run and its replay


@dataclass(frozen=True)
class Influence:
    """The predicted change of each query if a sample were left out: `values` [n q] for `ids`
    [n]."""

    ids: Tensor
    values: Tensor

    def without(self, samples: Tensor) -> Tensor:
        """The predicted change [q] if all these samples were left out: the sum of theirs."""
        return self.values[torch.isin(self.ids, samples)].sum(0)


def influence(
    record: RunRecord,
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    queries: Tensor,
    targets: Tensor,
    *,
    query: Loss = cross_entropy_each,
    loss: Loss = cross_entropy_each,
    average: str = "kept",
    progress: bool | None = None,
) -> Influence:
    """The predicted change of `query` on each of `queries` [q ...], `targets` [q ...], for each
    sample that the run of `record` learned from, if it were left out.

    Args:
        net, x, y, loss, average: as in `replay`.
        query: (outputs [q o], targets) to what is asked about each query [q].

    Raises ValueError where the replay is not `net`: the record, data, loss, clipping or average are
    not those of its training.

    The run is replayed once, with a copy of all ordinary parameters in memory for each step (of
    rows: the input layer and biases; of moments and finite networks everything), and walked back
    once at about `q` times the cost of training. Rows must not have been merged, folded or sharded.
    """
    work = copy.deepcopy(net)
    require_appending(work)
    path = [
        state_of(trained, optimizer)
        for trained, optimizer in states(record, work, x, y, loss, average, progress)
    ]
    _require_same(work, net)
    tape = Tape(work, record, loss, average)
    adjoint = tape.of_queries(path[-1], queries, targets, query)
    ids = record.samples()
    place = torch.full((int(ids.max()) + 1,), -1)
    place[ids] = torch.arange(len(ids))
    values = torch.zeros(len(ids), len(queries), dtype=torch.float64)
    steps = range(len(record) - 1, -1, -1)
    for step in tqdm(steps, desc="influence", disable=hidden(progress), leave=False):
        batch = record.ids[step]
        adjoint, weights = tape.back(path[step], adjoint, step, x[batch], y[batch])
        values.index_add_(0, place[batch], -weights.T.double().cpu())
    return Influence(ids, values)


def _require_same(replayed: nn.Module, net: nn.Module) -> None:
    """Raise where the replay of a whole run did not lead to its network, but for rounding."""
    found, expected = replayed.state_dict(), net.state_dict()
    for name, value in expected.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        size, same = torch.linalg.vector_norm(value), found[name].shape == value.shape
        if not same or torch.linalg.vector_norm(found[name] - value) > SAME * size:
            raise ValueError(
                f"the replay is not the network: {name} differs. The record, x, y, loss, average "
                "and the clipping that the Recorder was told must be those of its training (and "
                "nothing random, such as dropout, in it)"
            )
