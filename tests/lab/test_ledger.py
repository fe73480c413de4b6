"""The ledger against a plain loop over the same predictions, and who is denied and allowed."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import IterableDataset, TensorDataset

from pilimit_lib.lab import Ledger, NotFound, TrackedDataset


def filled(samples=40, rounds=6, seed=0):
    """A ledger and the predictions it was told of, kept as a list."""
    generator = torch.Generator().manual_seed(seed)
    ledger, told = Ledger(samples), []
    labels = torch.randint(0, 3, (samples,), generator=generator)
    for step in range(rounds):
        ids = torch.randperm(samples, generator=generator)[: samples // 2]
        loss, confidence = (
            torch.rand(len(ids), generator=generator),
            torch.rand(len(ids), generator=generator),
        )
        pred = torch.randint(0, 3, (len(ids),), generator=generator)
        ledger.record(
            ids,
            loss,
            step * 10,
            pred=pred,
            label=labels[ids],
            confidence=confidence,
            margin=loss * 2,
        )
        told.append((ids, loss, pred, labels[ids], confidence, step * 10))
    return ledger, told


def test_dynamics_equal_a_loop_over_each_sample():
    ledger, told = filled()
    for sample in range(ledger.size):
        seen = [
            (float(loss[i]), int(pred[i]), int(label[i]), float(conf[i]), age)
            for ids, loss, pred, label, conf, age in told
            for i in range(len(ids))
            if int(ids[i]) == sample
        ]
        assert ledger["exposure"][sample] == len(seen)
        if not seen:
            assert (
                math.isnan(ledger["loss"][sample])
                and math.isnan(ledger["confidence"][sample])
                and ledger["age"][sample] == -1
            )
            continue
        right = [pred == label for _, pred, label, _, _ in seen]
        assert (
            ledger["loss"][sample] == pytest.approx(seen[-1][0])
            and ledger["age"][sample] == seen[-1][4]
        )
        assert ledger["confidence"][sample] == pytest.approx(np.mean([s[3] for s in seen]))
        assert ledger.variability()[sample] == pytest.approx(np.std([s[3] for s in seen]), abs=1e-9)
        assert ledger["correct"][sample] == sum(right)
        assert ledger["forgotten"][sample] == sum(a and not b for a, b in zip(right, right[1:]))
        assert ledger.signals["margin"][sample] == pytest.approx(2 * seen[-1][0])


def test_a_sample_twice_in_a_batch_counts_twice_in_order():
    once, twice = Ledger(3), Ledger(3)
    given = {
        "pred": torch.tensor([1, 0, 1]),
        "label": torch.tensor([1, 1, 1]),
        "confidence": torch.tensor([0.9, 0.1, 0.5]),
    }
    twice.record([2, 2, 0], torch.tensor([0.1, 0.2, 0.3]), 0, **given)
    for i, sample in enumerate([2, 2, 0]):
        once.record(
            [sample],
            torch.tensor([[0.1, 0.2, 0.3][i]]),
            0,
            **{k: v[i : i + 1] for k, v in given.items()},
        )
    for name in once.columns:
        np.testing.assert_array_equal(once[name], twice[name], err_msg=name)
    assert twice["exposure"].tolist() == [1, 0, 2] and twice["forgotten"][2] == 1


@pytest.mark.parametrize(
    "ids, error, message",
    [
        ([0, 40], NotFound, "no such samples: \\[40\\]"),
        ([-1], NotFound, "no such samples"),
        ([0.5], TypeError, "integers"),
        ([0, 1, 2], ValueError, "'loss' holds 2 values for 3 samples"),
    ],
)
def test_bad_records_change_nothing(ids, error, message):
    ledger, _ = filled()
    before = {name: values.copy() for name, values in ledger.columns.items()}
    with pytest.raises(error, match=message):
        ledger.record(ids, torch.rand(len(ids) if len(ids) < 3 else 2), 99)
    for name in before:
        np.testing.assert_array_equal(before[name], ledger[name])


@pytest.fixture
def data():
    tracked = TrackedDataset(TensorDataset(torch.arange(40.0).view(-1, 1), torch.zeros(40)))
    tracked.ledger, _ = filled(rounds=2)
    return tracked


class TestDenying:
    def test_a_predicate_sees_the_seven_documented_values(self, data):
        calls = {}
        data.deny_samples_with_predicate(
            lambda id, age, loss, times, denied, pred, label: (
                calls.setdefault(id, (age, loss, times, denied, pred, label)) and False
            )
        )
        ledger = data.ledger
        assert list(calls) == list(range(40))
        for sample, (age, loss, times, denied, pred, label) in calls.items():
            assert (age, times, denied, pred, label) == tuple(
                ledger[c][sample] for c in ("age", "exposure", "denied", "pred", "label")
            )
            assert loss == pytest.approx(ledger["loss"][sample], nan_ok=True)

    def test_unseen_samples_match_no_loss(self, data):
        unseen = np.flatnonzero(data.ledger["exposure"] == 0)
        assert len(unseen)
        data.deny_samples_with_predicate(
            lambda id, age, loss, times, denied, pred, label: loss <= 1.5
        )
        assert not data.ledger["denied"][unseen].any() and data.ledger["denied"].sum() == 40 - len(
            unseen
        )

    def test_a_second_deny_replaces_the_first_unless_it_accumulates(self, data):
        data.deny_samples_with_predicate(lambda id, *rest: id < 5)
        assert data.deny_samples_with_predicate(lambda id, *rest: id == 7) == 1
        assert data.deny_samples_with_predicate(lambda id, *rest: id < 5, accumulate=True) == 6

    def test_the_same_selection_four_ways(self, data):
        expected = None
        for selection in (
            lambda id, age, loss, times, denied, pred, label: loss < 0.5,
            lambda frame: frame["prediction_loss"] < 0.5,
            "prediction_loss < 0.5",
            data.get_dataframe(all_samples=True)["prediction_loss"] < 0.5,
        ):
            data.deny(selection)
            expected = data.ledger["denied"].copy() if expected is None else expected
            np.testing.assert_array_equal(data.ledger["denied"], expected)
        assert 0 < expected.sum() < 40

    @pytest.mark.parametrize("factor", [0, 0.5, 1, 3, 7])
    def test_factor_is_allowed_to_denied_over_the_whole_set(self, data, factor):
        denied = data.deny_samples_and_sample_allowed_with_predicate(
            lambda id, *rest: id < 30, factor, seed=0
        )
        assert denied == data.ledger["denied"].sum() and not data.ledger["denied"][30:].any()
        assert 40 - denied >= factor * denied
        assert denied == 30 or 40 - (denied + 1) < factor * (denied + 1), (
            "no more than needed is allowed again"
        )

    def test_which_are_allowed_again_is_random(self, data):
        chosen = set()
        for seed in range(5):
            data.deny_samples_and_sample_allowed_with_predicate(
                lambda id, *rest: id < 30, 3, seed=seed
            )
            chosen.add(tuple(np.flatnonzero(data.ledger["denied"])))
        assert len(chosen) == 5

    def test_refusals_change_nothing(self, data):
        data.denylist_samples({3, 4})
        before, version = data.ledger["denied"].copy(), data.ledger.version
        rebalance = data.deny_samples_and_sample_allowed_with_predicate

        def breaks(id, age, loss, times, denied, pred, label):
            return 1 / (id - 17) > 0

        for call, error, message in [
            (
                lambda: data.deny_samples_with_predicate(lambda *a: True),
                ValueError,
                "all 40 samples",
            ),
            (
                lambda: data.deny_samples_with_predicate(breaks),
                ValueError,
                "ZeroDivisionError for sample 17",
            ),
            (
                lambda: data.deny_samples_with_predicate("no_such_column > 1"),
                ValueError,
                "no_such_column",
            ),
            (
                lambda: data.deny_samples_with_predicate(np.zeros(3, bool)),
                ValueError,
                "40 booleans",
            ),
            (lambda: data.denylist_samples([5, 999]), NotFound, r"\[999\]"),
            (lambda: data.denylist_samples(range(40)), ValueError, "all 40"),
            (lambda: data.allowlist_samples({3, -7}), NotFound, r"\[-7\]"),
            (lambda: rebalance(lambda *a: True, float("nan")), ValueError, "factor"),
            (lambda: rebalance(lambda *a: True, -1), ValueError, "factor"),
        ]:
            with pytest.raises(error, match=message):
                call()
            np.testing.assert_array_equal(before, data.ledger["denied"])
            assert data.ledger.version == version


class TestFrame:
    def test_only_seen_samples_unless_all_are_asked_for(self, data):
        seen = data.ledger["exposure"] > 0
        assert data.get_dataframe().index.tolist() == np.flatnonzero(seen).tolist()
        everything = data.get_dataframe(all_samples=True)
        assert len(everything) == 40 and everything["prediction_loss"][~seen].isna().all()
        assert everything["exposure_amount"][~seen].eq(0).all()

    def test_tags_are_columns_and_can_be_queried(self, data):
        assert data.tag("blurred", [1, 5, 9]) == 3
        assert data.tag("hard", "prediction_loss > 0.9") == (data.ledger["loss"] > 0.9).sum()
        assert data.tagged("blurred").tolist() == [1, 5, 9]
        assert data.query("blurred and exposure_amount >= 0").index.tolist() == [1, 5, 9]
        data.untag("blurred", [5])
        assert data.get_dataframe(all_samples=True).query("blurred").index.tolist() == [1, 9]
        for name in ("label", "two words", ""):
            with pytest.raises(ValueError, match="cannot be a tag"):
                data.tag(name, [1])
        with pytest.raises(NotFound, match="no tag 'sharp'"):
            data.untag("sharp", [1])

    @pytest.mark.parametrize("ending", [".csv", ".parquet"])
    def test_export_reads_back(self, data, tmp_path, ending):
        if ending == ".parquet":
            pytest.importorskip(
                "pyarrow", reason="parquet needs pyarrow: pip install 'pilimit[lab]'"
            )
        data.tag("odd", np.arange(1, 40, 2))
        path = data.export(tmp_path / "deep" / f"ledger{ending}")
        back = (
            pd.read_csv(path, index_col="sample_id") if ending == ".csv" else pd.read_parquet(path)
        )
        pd.testing.assert_frame_equal(
            back,
            data.get_dataframe(all_samples=True),
            check_dtype=False,
            check_index_type=False,
            rtol=1e-6,
        )
        assert [p.name for p in path.parent.iterdir()] == [path.name]

    def test_unknown_formats_are_refused(self, data, tmp_path):
        with pytest.raises(ValueError, match=".csv or .parquet"):
            data.export(tmp_path / "ledger.xlsx")
        assert not list(tmp_path.iterdir())


def test_data_sets_without_positions_are_refused():
    class Endless(IterableDataset):
        def __iter__(self):
            yield 1

    with pytest.raises(TypeError, match="no positions"):
        TrackedDataset(Endless())
    with pytest.raises(ValueError, match="empty"):
        TrackedDataset(TensorDataset(torch.zeros(0)))


@pytest.mark.parametrize(
    "predicate, message",
    [
        (lambda id, age, loss, times, denied, pred, label: None, "returned None for sample 0"),
        (lambda id, age, loss, times, denied, pred, label: "no", "returned 'no' for sample 0"),
        (
            lambda id, age, loss, times, denied, pred, label: float("nan"),
            "returned nan for sample 0",
        ),
        (lambda frame: None, "returned None for the frame"),
        (lambda frame: frame["loss"] < 1, "KeyError.*'loss'.*prediction_loss"),
        (lambda frame: frame["prediction_loss"], "must be 10 booleans"),
        (lambda frame: True, "must be 10 booleans"),
    ],
)
def test_a_predicate_that_does_not_answer_is_an_error(predicate, message):
    data = TrackedDataset(list(range(10)))
    for ask in (data.deny_samples_with_predicate, lambda p: data.tag("odd", p)):
        with pytest.raises(ValueError, match=message):
            ask(predicate)
    assert data.allowed == 10 and not data.ledger.tags


def test_a_predicate_of_one_argument_gets_the_frame():
    from functools import partial

    class Method:
        def high(self, frame):
            return frame.index >= 7

        def __call__(self, frame):
            return frame.index >= 7

    def above(limit, frame):
        return frame.index >= limit

    data = TrackedDataset(list(range(10)))
    for predicate in (lambda df: df.index >= 7, Method().high, Method(), partial(above, 7)):
        assert data.deny_samples_with_predicate(predicate) == 3
        data.allowlist_samples()
    assert data.deny_samples_with_predicate(lambda *row: torch.tensor(row[0] >= 7)) == 3
