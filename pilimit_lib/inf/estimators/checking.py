"""What an estimator accepts as samples and targets, under scikit-learn from 1.4 on, and the errors
that say so."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import sparse
from sklearn.base import BaseEstimator
from sklearn.utils import validation

CHUNK = 16384  # samples that are looked at, or predicted, at a time


def checked_samples(estimator: BaseEstimator, X: Any, reset: bool) -> np.ndarray:
    """X [n d] of finite floats; an array of float32 or float64 is not copied. `reset`: take
    n_features_in_ from it, instead of comparing."""
    _refuse_sparse(estimator, X)
    X = _validated(estimator, X, reset=reset, **_FLOATS)
    _refuse_missing(estimator, X)
    return X


def checked_pair(
    estimator: BaseEstimator, X: Any, y: Any, reset: bool, numbers: bool
) -> tuple[np.ndarray, np.ndarray]:
    """(X [n d], y) with as many targets as samples. y [n] are labels of any type, or with `numbers`
    finite floats [n] or [n o]."""
    _refuse_sparse(estimator, X)
    if y is None:
        raise ValueError(
            f"{type(estimator).__name__} requires y to be passed, but the target y is None: it "
            "learns from pairs of samples and targets"
        )
    X, y = _validated(
        estimator, X, y, reset=reset, multi_output=numbers, y_numeric=numbers, **_FLOATS
    )
    _refuse_missing(estimator, X)
    return X, y


def _validated(estimator: BaseEstimator, *data: Any, **how: Any) -> Any:
    """scikit-learn moved this from a method to a function in 1.6."""
    if hasattr(validation, "validate_data"):
        return validation.validate_data(estimator, *data, **how)
    return estimator._validate_data(*data, **how)


# The name of this setting changed in scikit-learn 1.6.
_FINITE = "ensure_all_finite" if hasattr(validation, "validate_data") else "force_all_finite"
_FLOATS = {"dtype": [np.float64, np.float32], _FINITE: False}


def _refuse_sparse(estimator: BaseEstimator, X: Any) -> None:
    if sparse.issparse(X):
        rows, columns = X.shape
        raise TypeError(
            f"{type(estimator).__name__} got a sparse matrix of shape {(rows, columns)}, which is "
            "not supported; a dense array was expected: X.toarray(), or TruncatedSVD before it in "
            "a pipeline"
        )


def _refuse_missing(estimator: BaseEstimator, X: np.ndarray) -> None:
    for start in range(0, len(X), CHUNK):
        part = X[start : start + CHUNK]
        finite = np.isfinite(part)
        if not finite.all():
            row, column = np.argwhere(~finite)[0]
            missing = np.isnan(part[row, column])
            found = "NaN" if missing else "infinity"
            remedy = "SimpleImputer or dropna" if missing else "clip or drop such samples"
            raise ValueError(
                f"Input X contains {found}: sample {start + row}, feature {column}. "
                f"{type(estimator).__name__} needs finite numbers: {remedy} before it"
            )


def torch_seed(random: np.random.RandomState) -> int:
    """A seed for torch's generator, drawn from scikit-learn's."""
    return int(random.randint(2**31 - 1))
