"""Many replays at once, compared with one after the other."""

import pytest
import torch

from pilimit_lib.inf.replay import replay, replay_subsets

from .runs import RUNS, SAMPLES, data, named, order, recorded


@pytest.mark.parametrize(("kind", "how"), RUNS, ids=named)
def test_they_are_the_replays_one_by_one(kind, how):
    batches = order(epochs=1) + [torch.tensor([2]), torch.tensor([0, 1])] * ("decay" not in how)
    net, record = recorded(kind, batches, **how)
    (x, y), left_out = data(), torch.zeros(4, SAMPLES, dtype=torch.bool)
    left_out[1, 2] = left_out[2, 5] = left_out[2, 9] = left_out[3, 0] = True
    q = torch.randn(3, 5, dtype=torch.float64)
    found = replay_subsets(record, net, x, y, left_out, q)
    for mask, outputs in zip(left_out, found):
        with torch.no_grad():
            expected = replay(record, net, x, y, without=mask.nonzero()[:, 0])(q)
        torch.testing.assert_close(outputs, expected, rtol=1e-9, atol=1e-11)


def test_refusals():
    net, record = recorded("rows", [torch.tensor([2]), torch.tensor([0, 1])], decay=0.1)
    (x, y), left_out = data(), torch.zeros(1, SAMPLES, dtype=torch.bool)
    with pytest.raises(ValueError, match=f"masks .k, {SAMPLES}. were expected"):
        replay_subsets(record, net, x, y, left_out.long(), x)
    left_out[0, 2] = True
    with pytest.raises(ValueError, match="nothing is left of the batch of step 0"):
        replay_subsets(record, net, x, y, left_out, x)
