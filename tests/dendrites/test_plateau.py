"""The plateau logic against the documented rules, as sequences of scores and decisions."""

import json
import math
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pilimit_lib.dendrites.decisions.plateau import Plateau
from pilimit_lib.dendrites.decisions.rules import EveryEpoch, Fixed, Never, Patience, Rules, at


def actions(plateau, scores, lrs=None):
    lrs = lrs or [None] * len(scores)
    return [plateau.observe(score, lr).action for score, lr in zip(scores, lrs, strict=True)]


def test_needs_no_torch():
    code = (
        "import sys, types; sys.modules['torch'] = None\n"
        "for n in ('pilimit_lib', 'pilimit_lib.dendrites'):\n"
        "    m = types.ModuleType(n); m.__path__ = [n.replace('.', '/')]; sys.modules[n] = m\n"
        "from pilimit_lib.dendrites.decisions.plateau import Plateau\n"
        "from pilimit_lib.dendrites.decisions.rules import Rules\n"
        "print(Plateau(Rules()).observe(1.0).action)"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "continue"
    )


def test_history_grows_after_patience_epochs_without_improvement():
    plateau = Plateau(Rules(switch=Patience(patience=3)))
    assert actions(plateau, [1, 2, 2, 2, 2]) == ["continue"] * 4 + ["grow"]
    assert plateau.state.dendrites == 1 and plateau.state.best_epoch == 2


def test_grace_epochs_come_after_growth_only_where_they_are_asked_for():
    plateau = Plateau(Rules(switch=Patience(patience=2, grace=[0, 3]), max_tries=1))
    assert actions(plateau, [1, 1, 1]) == ["continue", "continue", "grow"]
    assert actions(plateau, [1] * 5) == ["continue"] * 4 + ["finish"]


def test_newest_dendrites_must_beat_the_best_else_fresh_weights_then_the_end():
    plateau = Plateau(Rules(switch=Patience(patience=1), max_tries=2))
    assert actions(plateau, [5, 5]) == ["continue", "grow"]
    retry = plateau.observe(4)
    assert (retry.action, retry.rollback, plateau.state.dendrites) == ("retry", True, 1)
    end = plateau.observe(4)
    assert (end.action, end.rollback) == ("finish", True)
    assert plateau.observe(9).action == "finish"


def test_dendrites_that_beat_the_best_are_kept_and_the_tries_start_anew():
    plateau = Plateau(Rules(switch=Patience(patience=1), max_tries=2))
    assert actions(plateau, [5, 5, 4, 6, 6]) == ["continue", "grow", "retry", "continue", "grow"]
    assert (plateau.state.dendrites, plateau.state.tries) == (2, 1)


def test_retain_all_keeps_what_did_not_improve_without_going_back():
    plateau = Plateau(Rules(switch=Patience(patience=1), retain_all=True))
    actions(plateau, [5, 5])
    decision = plateau.observe(4)
    assert (decision.action, decision.rollback) == ("grow", False)


def test_max_dendrites_is_a_hard_bound():
    plateau = Plateau(Rules(switch=EveryEpoch(), max_dendrites=2))
    assert actions(plateau, [1, 2, 3]) == ["grow", "grow", "finish"]
    assert actions(Plateau(Rules(switch=Patience(1), max_dendrites=0)), [1, 1]) == [
        "continue",
        "finish",
    ]


def test_fixed_switch_first_counts_only_if_longer():
    assert actions(Plateau(Rules(switch=Fixed(2, first=4))), range(1, 9)) == ["continue"] * 3 + [
        "grow",
        "continue",
        "grow",
        "continue",
        "grow",
    ]
    assert actions(Plateau(Rules(switch=Fixed(3, first=1))), range(1, 4)) == [
        "continue",
        "continue",
        "grow",
    ]


def test_never_and_capacity():
    assert set(actions(Plateau(Rules(switch=Never())), [1] * 50)) == {"continue"}
    plateau = Plateau(Rules(testing_capacity=True, max_dendrites=1, max_tries=1))
    assert actions(plateau, [3, 2, 1, 0]) == ["grow", "grow", "grow", "finish"]
    assert plateau.state.dendrites == 3


def test_minimizing_zero_and_negative_scores():
    low = Plateau(Rules(maximize=False, threshold=0.1, threshold_raw=0.0))
    assert [low.improves(s, 1.0) for s in (0.95, 0.9)] == [False, True]
    assert not low.improves(1e-9, 0.0)  # a best of zero is a score like any other, not "unset"
    high = Plateau(Rules(threshold=0.0, threshold_raw=0.0))
    assert high.improves(-1.0, -2.0) and not high.improves(-1.0, 0.0)
    # s(1-thr) > s for negative s: no gain without a gain
    assert not Plateau(Rules(threshold=0.1)).improves(-1.0, -1.0)


@settings(max_examples=60, deadline=None)
@given(st.floats(0.01, 100), st.floats(0.01, 100), st.integers(0, 5))
def test_the_documented_formula_for_positive_scores(score, best, dendrites):
    plateau = Plateau(Rules())
    plateau.state.dendrites = dendrites
    share = [1e-3, 1e-4, 0][min(dendrites, 2)]
    assert plateau.improves(score, best) == (score - share * score > best and score - 1e-5 > best)
    low = Plateau(Rules(maximize=False))
    low.state.dendrites = dendrites
    assert low.improves(score, best) == (score + share * score < best and score + 1e-5 < best)


def test_nan_never_improves_and_does_not_poison_the_running_mean():
    plateau = Plateau(Rules(switch=Patience(patience=2, lookback=2)))
    actions(plateau, [math.nan, 1.0])
    assert plateau.state.best == 1.0
    assert actions(plateau, [math.nan, math.nan]) == ["continue", "grow"]


def test_lookback_smooths():
    plateau = Plateau(Rules(switch=Patience(patience=9, lookback=4)))
    actions(plateau, [0.0, 4.0])
    assert plateau.state.best == 1.0


def test_no_growth_before_the_rate_was_lowered_and_one_warning_when_that_never_happens():
    plateau = Plateau(Rules(switch=Patience(patience=2), find_best_lr=False))
    plateau.start_rate(0.1)
    assert actions(plateau, [1] * 6, [0.1] * 5 + [0.01]) == ["continue"] * 5 + ["grow"]
    stuck = Plateau(Rules(switch=Patience(patience=1)))
    stuck.start_rate(0.1)
    with pytest.warns(UserWarning, match="never lowered the learning rate") as caught:
        actions(stuck, [1] * 20, [0.1] * 20)
    assert len(caught) == 1
    free = Plateau(Rules(switch=Patience(patience=2), wait_for_lower_lr=False))
    free.start_rate(0.1)
    assert actions(free, [1] * 3, [0.1] * 3)[-1] == "grow"


def grown_with_rates(**rules):
    plateau = Plateau(Rules(switch=Patience(patience=2), **rules))
    plateau.start_rate(0.1)
    assert actions(plateau, [1, 1, 1], [0.1, 0.1, 0.01])[-1] == "grow"
    plateau.start_rate(0.1)
    return plateau


def test_search_for_the_starting_rate_keeps_the_better_trial():
    plateau = grown_with_rates()
    lower = plateau.observe(3, 0.01)
    assert (lower.action, lower.skip) == ("lower_rate", 1) and lower.rate == pytest.approx(0.1)
    plateau.start_rate(0.01)
    assert plateau.observe(2.0, 0.01).action == "continue"
    # 2.5 < 3: back to the end of trial 0
    assert plateau.observe(2.5, 0.001).action == "commit_rate"
    assert plateau.state.skip == 0 and plateau.state.levels == [0.1, 0.01]


def test_search_goes_on_from_the_lower_start_when_it_was_better():
    plateau = grown_with_rates()
    plateau.observe(3, 0.01)
    plateau.start_rate(0.01)
    decision = plateau.observe(4, 0.001)
    assert (
        decision.action == "continue" and plateau.state.search is None and plateau.state.skip == 1
    )
    actions(plateau, [1, 1], [0.001, 0.001])
    assert plateau.state.dendrites == 2 and plateau.state.rates == [0.1, 0.01, 0.001]


def test_correlation_phase_ends_by_patience_or_cap():
    rules = dict(switch=Patience(patience=1), mode="correlation", candidate_patience=2)
    plateau = Plateau(Rules(**rules))
    actions(plateau, [1, 1])
    assert plateau.state.phase == "p"
    with pytest.raises(RuntimeError, match="observe_candidates"):
        plateau.observe(1.0)
    grown = [plateau.observe_candidates({"fc": [c, 0.0]}).action for c in (0.1, 0.2, 0.205, 0.21)]
    # +10 % at 0.2, then less than that twice
    assert grown == ["continue", "continue", "continue", "mature"]
    capped = Plateau(Rules(**rules, cap_at_n=True))
    actions(capped, [1, 1])
    assert [capped.observe_candidates({"fc": [float(c)]}).action for c in (1, 2)] == [
        "continue",
        "mature",
    ]


@pytest.mark.filterwarnings("ignore:the score has stalled")
@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=60), st.integers(0, 59))
def test_saved_and_loaded_it_decides_the_same(scores, cut):
    rules = Rules(switch=Patience(patience=2), max_tries=2)
    whole, first, second = Plateau(rules), Plateau(rules), Plateau(rules)
    lrs = [0.1 if i % 5 < 3 else 0.01 for i in range(len(scores))]
    expected = [whole.observe(s, lr) for s, lr in zip(scores, lrs)]
    got = [first.observe(s, lr) for s, lr in zip(scores[:cut], lrs)]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    got += [second.observe(s, lr) for s, lr in zip(scores[cut:], lrs[cut:])]
    assert got == expected


def test_bad_settings_are_named():
    for build, text in [
        (lambda: Patience(patience=0), "Patience.patience got 0"),
        (lambda: Rules(max_dendrites=-1), "max_dendrites got -1"),
        (lambda: Rules(mode="pb"), 'give "joint" or "correlation"'),
        (lambda: Rules(threshold=[]), "empty list"),
        (lambda: Rules(threshold=[float("nan")]), "threshold got"),
        (lambda: Fixed(every=0), "Fixed.every"),
    ]:
        with pytest.raises(ValueError, match=text):
            build()
    for build, text in [
        (lambda: Rules(switch=10), "give Patience"),
        (lambda: Rules(retain_all=1), "retain_all"),
        (lambda: Patience(patience=2.5), "whole number"),
        (lambda: Rules(max_tries=True), "max_tries"),
    ]:
        with pytest.raises(TypeError, match=text):
            build()
    with pytest.raises(ValueError, match="entries"):
        Plateau(Rules()).load_state_dict({"epoch": 1})
    assert [at([7, 8], k) for k in range(3)] == [7, 8, 8]
