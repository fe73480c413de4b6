"""The learners that are compared, each with four settings to choose from; inputs are standardised
for all but boosting."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.metrics import accuracy_score, r2_score
from sklearn.metrics.pairwise import laplacian_kernel, rbf_kernel
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from pilimit_lib.inf.estimators import PiClassifier, PiRegressor
from pilimit_lib.inf.gp import ReLUKernel, kernel_ridge

Gram = Callable[[np.ndarray, np.ndarray], np.ndarray]


class KernelMachine(BaseEstimator):
    """Kernel ridge regression; of classes on one-hot targets. `ridge` is relative to the kernel's
    mean diagonal."""

    def __init__(self, gram: Gram, ridge: float, classes: bool) -> None:
        self.gram, self.ridge, self.classes = gram, ridge, classes

    def fit(self, X: np.ndarray, y: np.ndarray) -> KernelMachine:
        self.X_ = X
        if self.classes:
            self.labels_ = np.unique(y)
            targets = (y[:, None] == self.labels_).astype(float)
        else:
            targets = np.asarray(y, float)[:, None]
        self.mean_ = targets.mean(0)
        K = torch.from_numpy(self.gram(X, X))
        targets = torch.from_numpy(targets - self.mean_)
        self.coefficients_ = kernel_ridge(K, targets, [self.ridge], progress=False)[0].numpy()
        return self

    def predict(self, X: np.ndarray) -> np.ndarray:
        out = self.gram(X, self.X_) @ self.coefficients_ + self.mean_
        return self.labels_[out.argmax(1)] if self.classes else out[:, 0]

    def score(self, X: np.ndarray, y: np.ndarray) -> float:
        return (accuracy_score if self.classes else r2_score)(y, self.predict(X))


class FeatureMachine(BaseEstimator):
    """xRFM: kernel ridge regression whose metric is learned; holds a fifth of the samples out."""

    def __init__(self, bandwidth: float, reg: float, classes: bool) -> None:
        self.bandwidth, self.reg, self.classes = bandwidth, reg, classes

    def fit(self, X: np.ndarray, y: np.ndarray) -> FeatureMachine:
        from xrfm import xRFM

        self.labels_ = np.unique(y) if self.classes else None
        target = np.searchsorted(self.labels_, y) if self.classes else np.asarray(y, np.float32)
        if not self.classes:
            self.mean_, self.scale_ = target.mean(), target.std()
            target = ((target - self.mean_) / self.scale_)[:, None]
        held = np.random.RandomState(0).permutation(len(y)) < len(y) // 5
        params = {
            "model": {"kernel": "l2", "bandwidth": self.bandwidth, "exponent": 1.0},
            "fit": {"reg": self.reg, "iters": 3, "verbose": False, "early_stop_rfm": True},
        }
        self.model_ = xRFM(
            rfm_params=params,
            device="cpu",
            tuning_metric="accuracy" if self.classes else "mse",
            verbose=False,
            random_state=0,
        )
        X = X.astype(np.float32)
        self.model_.fit(X[~held], target[~held], X[held], target[held])
        return self

    def predict(self, X: np.ndarray) -> np.ndarray:
        out = np.asarray(self.model_.predict(X.astype(np.float32))).ravel()
        return self.labels_[out.astype(int)] if self.classes else out * self.scale_ + self.mean_

    def score(self, X: np.ndarray, y: np.ndarray) -> float:
        return (accuracy_score if self.classes else r2_score)(y, self.predict(X))


def learners() -> dict[str, Callable[[bool, int, int], list[Any]]]:
    """Name to (classes, features, seed) -> four candidates."""
    found = {
        "π": _pi,
        "MLP": _mlp,
        "RBF": partial(_kernels, rbf_kernel),
        "Laplace": partial(_kernels, laplacian_kernel),
        "NTK": _ntk,
        "boosting": _boosting,
    }
    if importlib.util.find_spec("xrfm") is not None:
        found["xRFM"] = _xrfm
    return found


def standardised(learner: Any) -> Any:
    return make_pipeline(StandardScaler(), learner)


def _pi(classes: bool, d: int, seed: int) -> list[Any]:
    kind = PiClassifier if classes else PiRegressor
    return [
        standardised(kind(r, max_epochs=epochs, early_stopping=stop, random_state=seed))
        for r, epochs, stop in ((8, 20, False), (32, 10, False), (32, 40, False), (32, 40, True))
    ]


def _mlp(classes: bool, d: int, seed: int) -> list[Any]:
    kind = MLPClassifier if classes else MLPRegressor
    return [
        standardised(_Quiet(kind((width,) * 2, max_iter=50, alpha=alpha, random_state=seed)))
        for width in (64, 256)
        for alpha in (1e-4, 1.0)
    ]


class _Quiet(BaseEstimator):
    """An MLP whose number of epochs is a setting: that it is reached is no warning."""

    def __init__(self, learner: Any) -> None:
        self.learner = learner

    def fit(self, X: np.ndarray, y: np.ndarray) -> _Quiet:
        scale = y.std() if isinstance(self.learner, MLPRegressor) else None
        self.shift_ = (y.mean(), scale) if scale else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.learner.fit(X, (y - y.mean()) / scale if scale else y)
        return self

    def predict(self, X: np.ndarray) -> np.ndarray:
        out = self.learner.predict(X)
        return out * self.shift_[1] + self.shift_[0] if self.shift_ else out

    def score(self, X: np.ndarray, y: np.ndarray) -> float:
        return (r2_score if self.shift_ else accuracy_score)(y, self.predict(X))


def _kernels(kernel: Callable, classes: bool, d: int, seed: int) -> list[Any]:
    return [
        standardised(KernelMachine(partial(kernel, gamma=gamma / d), ridge, classes))
        for gamma in (0.1, 0.5)
        for ridge in (1e-3, 1e-1)
    ]


def _ntk(classes: bool, d: int, seed: int) -> list[Any]:
    return [
        standardised(KernelMachine(_NTK(depth), ridge, classes))
        for depth in (1, 3)
        for ridge in (1e-3, 1e-1)
    ]


class _NTK:
    def __init__(self, depth: int) -> None:
        self.kernel = ReLUKernel(depth, ntk=True, varw=2.0, varb=0.1)

    def __call__(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return self.kernel(torch.from_numpy(x), torch.from_numpy(y)).numpy()


def _boosting(classes: bool, d: int, seed: int) -> list[Any]:
    kind = HistGradientBoostingClassifier if classes else HistGradientBoostingRegressor
    return [
        kind(learning_rate=rate, max_iter=steps, max_leaf_nodes=leaves, random_state=seed)
        for rate, steps, leaves in ((0.1, 100, 31), (0.1, 100, 8), (0.05, 100, 8), (0.1, 30, 8))
    ]


def _xrfm(classes: bool, d: int, seed: int) -> list[Any]:
    return [
        standardised(FeatureMachine(bandwidth, reg, classes))
        for bandwidth in (5.0, 20.0)
        for reg in (1e-3, 1e-1)
    ]
