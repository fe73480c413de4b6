"""Classification by an infinitely wide network, with the interface of scikit-learn."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.base import ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from torch.nn.functional import cross_entropy

from .checking import checked_pair
from .estimator import PiEstimator


class PiClassifier(ClassifierMixin, PiEstimator):
    """An infinitely wide network that learns features, for two or more classes of labels of any
    type; cross entropy.

        PiClassifier(r=32).fit(X, y).predict_proba(X)          X [n d], y [n]

    Settings and attributes: see `PiEstimator`; beside them `classes_`, sorted. Samples have no
    weights: a sample of weight 2 and one given twice are not the same to mini-batches.
    """

    def fit(self, X: Any, y: Any) -> PiClassifier:
        """Train anew on samples X [n d] with labels y [n]."""
        self._check_settings()
        X, y = self._checked(X, y, reset=True)
        classes = np.unique(y)
        _check_classes(self, classes)
        self._start(X.shape[1], len(classes))
        self.classes_ = classes
        self._train_whole(X, y, self._encode, cross_entropy)
        return self

    def partial_fit(self, X: Any, y: Any, classes: Any = None) -> PiClassifier:
        """One pass over these samples, after those before. The first call needs all `classes` there
        will be. Mean and deviation of the features are of all samples so far."""
        self._check_settings()
        first = not hasattr(self, "network_")
        if first and classes is None:
            raise ValueError(
                "the first call of partial_fit must be told all labels: "
                "partial_fit(X, y, classes=np.unique(all labels))"
            )
        X, y = self._checked(X, y, reset=first)
        known = np.unique(classes) if first else self.classes_
        if not first and classes is not None and not np.array_equal(np.unique(classes), known):
            raise ValueError(
                f"classes are {np.unique(classes)}; those of the first call were {known}"
            )
        unknown = np.setdiff1d(y, known)
        if len(unknown):
            raise ValueError(
                f"y has labels {unknown} that are not among the classes {known}: name all of them "
                "in the first call"
            )
        if first:
            _check_classes(self, known)
            self._start(X.shape[1], len(known))
            self.classes_ = known
        self._train_on(X, y, self._encode, cross_entropy)
        return self

    def predict(self, X: Any) -> np.ndarray:
        """The most probable label of each sample: [n]."""
        outputs = self._outputs(X)
        return self.classes_[outputs.argmax(1)]

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities [n classes], in the order of `classes_`."""
        return torch.from_numpy(self._outputs(X)).softmax(1).numpy()

    def predict_log_proba(self, X: Any) -> np.ndarray:
        """Logarithms of the probabilities [n classes]."""
        return torch.from_numpy(self._outputs(X)).log_softmax(1).numpy()

    def _checked(self, X: Any, y: Any, reset: bool) -> tuple[np.ndarray, np.ndarray]:
        X, y = checked_pair(self, X, y, reset=reset, numbers=False)
        check_classification_targets(y)
        return X, y

    def _encode(self, y: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.classes_, y).astype(np.int64)

    def _strata(self, y: np.ndarray) -> np.ndarray | None:
        """The labels, where both parts can have some of each."""
        counts = np.unique(y, return_counts=True)[1]
        held = self.validation_fraction * len(y)
        return y if counts.min() >= 2 and held >= len(counts) else None


def _check_classes(estimator: PiClassifier, classes: np.ndarray) -> None:
    if len(classes) < 2:
        raise ValueError(
            f"{type(estimator).__name__} needs at least two classes, and y has one class only: "
            f"{classes}"
        )
