"""Infinitely wide networks as estimators: scikit-learn's own contract, and what it does not say."""

from __future__ import annotations

import importlib
import pickle
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import sparse
from sklearn.base import clone
from sklearn.datasets import load_digits, make_friedman1
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from pilimit_lib.inf import InfMLP, estimators
from pilimit_lib.inf.estimators import PiClassifier, PiRegressor

SMALL = dict(r=4, max_epochs=12, batch_size=100, learning_rate=0.03)


def contract(*learners):
    """`parametrize_with_checks`, whose generator (before scikit-learn 1.6) pytest warns of."""
    mark = parametrize_with_checks(list(learners)).mark
    names, checks = mark.args
    return pytest.mark.parametrize(names, list(checks), **mark.kwargs)


@contract(PiClassifier(**SMALL), PiRegressor(**SMALL))
def test_the_contract_of_scikit_learn(estimator, check):
    check(estimator)


@pytest.mark.slow
@contract(PiClassifier(), PiRegressor())
def test_the_contract_of_scikit_learn_with_defaults(estimator, check):
    check(estimator)


@pytest.fixture(scope="module")
def digits():
    X, y = load_digits(return_X_y=True)
    return X[:600], y[:600], X[600:900], y[600:900]


@pytest.fixture(scope="module")
def curve():
    X, y = make_friedman1(300, noise=1.0, random_state=0)
    return X[:200], y[:200], X[200:], y[200:]


def test_it_learns_digits(digits):
    X, y, X_test, y_test = digits
    learner = PiClassifier(r=16, max_epochs=10, learning_rate=0.01, random_state=0).fit(X, y)
    assert learner.score(X_test, y_test) > 0.75
    assert np.allclose(learner.predict_proba(X_test).sum(1), 1)
    assert np.allclose(np.log(learner.predict_proba(X_test)), learner.predict_log_proba(X_test))
    assert learner.n_iter_ == 10 and learner.loss_curve_[-1] < learner.loss_curve_[0]


def test_it_learns_what_a_linear_model_can_not(curve):
    X, y, X_test, y_test = curve
    settings = dict(r=12, max_epochs=40, learning_rate=0.01, batch_size=40)
    learner = PiRegressor(**settings, random_state=0).fit(X, y)
    assert learner.score(X_test, y_test) > Ridge().fit(X, y).score(X_test, y_test) + 0.03


def test_labels_of_any_type_are_given_back(digits):
    X, y, _, _ = digits
    numbers = PiClassifier(**SMALL, random_state=0).fit(X, y)
    names = np.array([f"digit {value}" for value in range(10)])
    for labels in (names[y], names[y].astype(object), y + 0.0, y * 100 - 300):
        named = PiClassifier(**SMALL, random_state=0).fit(X, labels)
        assert np.array_equal(named.predict(X), labels[named_index(named, numbers, X, y, labels)])
    even = PiClassifier(**SMALL, random_state=0).fit(X, y % 2 == 0)
    assert even.predict(X).dtype == bool and even.predict_proba(X).shape == (len(X), 2)


def named_index(named, numbers, X, y, labels):
    """For each sample one that has the label which the classifier of numbers predicts: classes
    sort alike in all of these types."""
    first = {value: np.flatnonzero(y == value)[0] for value in np.unique(y)}
    return [first[value] for value in numbers.predict(X)]


def test_predictions_are_the_networks():
    X, y = make_friedman1(50, random_state=0)
    learner = PiRegressor(**SMALL, random_state=0).fit(X, y)
    assert isinstance(learner.network_, InfMLP)
    x = torch.from_numpy(StandardScaler().fit_transform(X)).float()
    with torch.no_grad():
        outputs = learner.network_(x)[:, 0].numpy() * y.std() + y.mean()
    assert np.allclose(outputs, learner.predict(X), atol=1e-4)
    assert learner.network_.sample(64)(x).shape == (50, 1)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_seed_is_a_result_and_leaves_torchs_alone(digits, optimizer):
    X, y, X_test, _ = digits
    settings = SMALL | {"optimizer": optimizer, "early_stopping": True, "learning_rate": None}
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, again = (PiClassifier(**settings, random_state=5).fit(X, y) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    other = PiClassifier(**settings, random_state=6).fit(X, y)
    assert np.array_equal(first.predict_proba(X_test), again.predict_proba(X_test))
    assert not np.allclose(first.predict_proba(X_test), other.predict_proba(X_test))


def test_early_stopping_keeps_the_best_epoch(curve):
    X, y, _, _ = curve
    settings = dict(r=8, max_epochs=200, learning_rate=0.03, batch_size=60, random_state=0)
    settings["early_stopping"] = True
    learner = PiRegressor(**settings, n_iter_no_change=3, posterior=False).fit(X, y)
    losses = learner.validation_curve_
    assert learner.n_iter_ == len(losses) < 200
    assert len(losses) - 1 - int(np.argmin(losses)) == 3
    seen, held = learner._split(y)
    assert len(held) == 20 and not set(seen) & set(held)


def test_partial_fit_goes_on_over_chunks(digits):
    X, y, X_test, y_test = digits
    learner = PiClassifier(r=16, learning_rate=0.01, batch_size=32, random_state=0)
    for _ in range(4):
        for part in range(0, 600, 200):
            rows = slice(part, part + 200)
            learner.partial_fit(X[rows], y[rows], classes=range(10))
    assert learner.score(X_test, y_test) > 0.75
    assert learner.n_iter_ == 12
    assert np.allclose(learner.scaler_.mean_, X.mean(0))
    with pytest.raises(ValueError, match="not among the classes"):
        learner.partial_fit(X, y + 5)
    with pytest.raises(ValueError, match="first call"):
        learner.partial_fit(X, y, classes=range(9))
    with pytest.raises(ValueError, match="classes="):
        PiClassifier().partial_fit(X, y)


def test_partial_fit_of_a_chunk_is_one_epoch_without_annealing(curve):
    X, y, X_test, _ = curve
    settings = SMALL | {"max_epochs": 1, "posterior": False, "random_state": 0}
    whole, part = PiRegressor(**settings).fit(X, y), PiRegressor(**settings).partial_fit(X, y)
    assert np.array_equal(whole.predict(X_test), part.predict(X_test))
    resumed = pickle.loads(pickle.dumps(part)).partial_fit(X, y)
    assert np.array_equal(part.partial_fit(X, y).predict(X_test), resumed.predict(X_test))


def test_pipelines_grids_clones_and_pickles(curve):
    X, y, X_test, _ = curve
    learner = make_pipeline(StandardScaler(), PiRegressor(**SMALL, random_state=0))
    grid = GridSearchCV(learner, {"piregressor__r": [2, 6]}, cv=2).fit(X, y)
    again = pickle.loads(pickle.dumps(grid))
    assert np.array_equal(grid.predict(X_test), again.predict(X_test))
    fitted = grid.best_estimator_[-1]
    assert clone(fitted).get_params() == fitted.get_params()
    with pytest.raises(NotFittedError):
        clone(fitted).predict(X)


def test_scales_of_features_and_targets_do_not_matter(curve):
    X, y, X_test, _ = curve
    plain = PiRegressor(**SMALL, random_state=0).fit(X, y)
    scale = 10.0 ** np.arange(-5, 5)
    other = PiRegressor(**SMALL, random_state=0).fit(X * scale + 1, y * 1e6 - 3)
    assert np.allclose(
        other.predict(X_test * scale + 1), plain.predict(X_test) * 1e6 - 3, rtol=1e-2
    )


def test_a_sample_alone_is_predicted_as_among_others(curve):
    X, y, X_test, _ = curve
    learner = PiRegressor(**SMALL, random_state=0).fit(X, y)
    one_by_one = [learner.predict(x[None])[0] for x in X_test]
    assert np.allclose(learner.predict(X_test), one_by_one, rtol=1e-10)


def test_error_bars_cover_and_grow_away_from_the_samples(curve):
    X, y, X_test, y_test = curve
    learner = PiRegressor(r=8, max_epochs=30, batch_size=40, random_state=0).fit(X, y)
    mean, std = learner.predict(X_test, return_std=True)
    assert np.array_equal(mean, learner.predict(X_test)) and mean.shape == std.shape == (100,)
    assert (np.abs(mean - y_test) < 2 * std).mean() > 0.8
    assert (std > learner.noise_std_).all()
    assert learner.predict(X_test * 10, return_std=True)[1].mean() > 2 * std.mean()


def test_the_likelihood_is_that_of_the_targets_as_given(curve):
    X, y, _, _ = curve
    Y = np.c_[y, y]
    one = PiRegressor(**SMALL, random_state=0).fit(X, y)
    scaled = PiRegressor(**SMALL, random_state=0).fit(X, y * 8)
    assert one.log_marginal_likelihood_ - scaled.log_marginal_likelihood_ == pytest.approx(
        len(y) * np.log(8)
    )
    two = PiRegressor(**SMALL, random_state=0).fit(X, Y)
    mean, std = two.predict(X, return_std=True)
    assert mean.shape == std.shape == Y.shape and two.noise_std_.shape == (2,)
    assert two.log_marginal_likelihood_ == pytest.approx(2 * one.log_marginal_likelihood_, rel=0.2)


def test_a_posterior_of_features_that_move_is_refused(curve):
    X, y, _, _ = curve
    learner = PiRegressor(**SMALL).fit(X, y).partial_fit(X, y)
    with pytest.raises(ValueError, match="fit_posterior"):
        learner.predict(X, return_std=True)
    learner.fit_posterior(X, y).predict(X, return_std=True)
    with pytest.raises(ValueError, match="2 targets per sample"):
        learner.partial_fit(X, np.c_[y, y])


@pytest.mark.parametrize("kind", [PiClassifier, PiRegressor])
def test_errors_name_thing_place_and_remedy(kind):
    X, y = np.random.rand(40, 3), np.arange(40) % 2
    with pytest.raises(TypeError, match=r"sparse matrix of shape \(40, 3\).*toarray"):
        kind().fit(sparse.csr_array(X), y)
    for value, found in ((np.nan, "NaN.*SimpleImputer"), (np.inf, "infinity.*clip")):
        broken = X.copy()
        broken[7, 2] = value
        with pytest.raises(ValueError, match=f"{found}") as caught:
            kind().fit(broken, y)
        assert "sample 7, feature 2" in str(caught.value)
    for setting, value in (
        ("r", 0),
        ("L", -1),
        ("max_epochs", 1.5),
        ("learning_rate", 0),
        ("batch_size", 0),
        ("batch_size", "all"),
        ("optimizer", "lbfgs"),
        ("validation_fraction", 1),
        ("weight_decay", -1),
    ):
        with pytest.raises(ValueError, match=f"{setting} is {value!r}"):
            kind(**{setting: value}).fit(X, y)
    with pytest.raises(ArithmeticError, match="lower learning_rate"):
        kind(learning_rate=1e30, max_norm=None, random_state=0).fit(X, y)


def test_progress_goes_to_a_terminal_only_when_asked(curve, capfd):
    X, y, _, _ = curve
    PiRegressor(**SMALL, verbose=True).fit(X, y)
    assert capfd.readouterr().err == ""  # no terminal


def test_importing_the_networks_loads_no_scikit_learn():
    code = "import sys, pilimit_lib.inf; print('sklearn' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_page_runs(capsys):
    page = Path(estimators.__file__).with_name("README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 5
    names: dict = {}
    for block in blocks:
        if "import gpytorch" in block and not imported("gpytorch"):
            continue
        exec(compile(block, "README.md", "exec"), names)
    assert "(100,)" in capsys.readouterr().out


def imported(name: str) -> bool:
    """Whether a package is there, and imported now, whatever it warns of in doing so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return bool(importlib.import_module(name))
        except ImportError:
            return False
