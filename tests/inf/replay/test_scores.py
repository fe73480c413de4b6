"""Scores of attributions, compared with scipy's and scikit-learn's."""

import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from pilimit_lib.inf.replay.scores import (
    auc,
    linear_datamodelling_score,
    random_subsets,
    spearman,
)


def test_rank_correlation_and_auc_are_those_of_others():
    one, other = torch.randn(20, 3).round(decimals=1), torch.randn(20, 3)
    expected = [spearmanr(one[:, i], other[:, i]).statistic for i in range(3)]
    torch.testing.assert_close(spearman(one, other), torch.tensor(expected, dtype=torch.float64))
    bad = torch.rand(20) < 0.3
    assert auc(one[:, 0], bad) == pytest.approx(roc_auc_score(bad, one[:, 0]))
    assert spearman(torch.ones(4, 1), torch.arange(4.0)[:, None]).item() == 0


def test_a_linear_world_is_predicted_and_its_opposite_is_not():
    effects = torch.randn(30, 4)
    left_out = random_subsets(30, 0.1, 25, seed=0)
    assert left_out.sum(1).tolist() == [3] * 25
    retrained = 5 + left_out.float() @ effects
    score = linear_datamodelling_score(effects, left_out, retrained)
    torch.testing.assert_close(score, torch.ones(4, dtype=torch.float64))
    assert (linear_datamodelling_score(-effects, left_out, retrained) < -0.99).all()
    assert random_subsets(30, 0.001, 2, seed=1).sum(1).tolist() == [1, 1]


def test_refusals():
    masks = random_subsets(5, 0.4, 3, seed=0)
    with pytest.raises(ValueError, match=r"a mask \[3, 4\]"):
        linear_datamodelling_score(torch.zeros(4, 2), masks, torch.zeros(3, 2))
    with pytest.raises(ValueError, match="the same queries"):
        linear_datamodelling_score(torch.zeros(5, 2), masks, torch.zeros(3, 1))
    with pytest.raises(ValueError, match="between 0 and 1"):
        random_subsets(5, 1.0, 2, seed=0)
    with pytest.raises(ValueError, match="some of both kinds"):
        auc(torch.zeros(3), torch.zeros(3, dtype=torch.bool))
