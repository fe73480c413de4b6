"""Regression by an infinitely wide network, with the interface of scikit-learn, and with error
bars."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.base import RegressorMixin
from sklearn.preprocessing import StandardScaler
from sklearn.utils.validation import check_is_fitted
from torch.nn.functional import mse_loss

from ..gp.linear import LinearPosterior
from ..gp.readout import readout_features, readout_posterior, set_readout
from .checking import checked_pair, checked_samples, torch_seed
from .estimator import PiEstimator, to_numpy
from .training import Samples, observe, standardised

FEATURE_BATCH = 1024  # samples whose readout features are held at a time


class PiRegressor(RegressorMixin, PiEstimator):
    """An infinitely wide network that learns features, for one or more numbers per sample; squared
    error.

        mean, std = PiRegressor().fit(X, y).predict(X, return_std=True)    X [n d], y [n] or [n o]

    Targets are standardised inside. Settings and attributes: see `PiEstimator`; beside them

        posterior: after training, put a Gaussian posterior over the readout in its place, with the
            noise and the prior of the highest marginal likelihood; see `gp.linear_posterior`. Then
            `posterior_`, `noise_std_` [o] and `log_marginal_likelihood_` (of the targets as given)
            are there. Features count as fixed, so errors that they make alike are not in `std`.
    """

    def __init__(
        self,
        r: int = 32,
        L: int = 1,
        *,
        degree: int = 2,
        series: str = "minimax",
        activation: str = "relu",
        bias_alpha: float = 1.0,
        optimizer: str = "adam",
        learning_rate: float | None = None,
        weight_decay: float = 0.0,
        max_norm: float | None = 1.0,
        max_epochs: int = 100,
        batch_size: int | str = "auto",
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 10,
        tol: float = 1e-4,
        posterior: bool = True,
        random_state: int | np.random.RandomState | None = None,
        verbose: bool = False,
    ) -> None:
        super().__init__(
            r,
            L,
            degree=degree,
            series=series,
            activation=activation,
            bias_alpha=bias_alpha,
            optimizer=optimizer,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            max_norm=max_norm,
            max_epochs=max_epochs,
            batch_size=batch_size,
            early_stopping=early_stopping,
            validation_fraction=validation_fraction,
            n_iter_no_change=n_iter_no_change,
            tol=tol,
            random_state=random_state,
            verbose=verbose,
        )
        self.posterior = posterior

    def fit(self, X: Any, y: Any) -> PiRegressor:
        """Train anew on samples X [n d] with targets y [n] or [n o]."""
        self._check_settings()
        X, y = checked_pair(self, X, y, reset=True, numbers=True)
        self._begin(X, y)
        observe(self.target_scaler_, _columns(y))
        samples = self._train_whole(X, y, self._encode, mse_loss)
        if self.posterior:
            self._take_posterior(samples)
        return self

    def partial_fit(self, X: Any, y: Any) -> PiRegressor:
        """One pass over these samples, after those before; mean and deviation of features and
        targets are of all samples so far. A posterior is of features that no longer move: see
        `fit_posterior`."""
        self._check_settings()
        first = not hasattr(self, "network_")
        X, y = checked_pair(self, X, y, reset=first, numbers=True)
        if first:
            self._begin(X, y)
        else:
            self._check_outputs(y)
        self._forget_posterior()
        observe(self.target_scaler_, _columns(y))
        self._train_on(X, y, self._encode, mse_loss)
        return self

    def fit_posterior(self, X: Any, y: Any) -> PiRegressor:
        """Give the readout its Gaussian posterior for these samples, with the features as they are
        now."""
        check_is_fitted(self, "network_")
        X, y = checked_pair(self, X, y, reset=False, numbers=True)
        self._check_outputs(y)
        self._take_posterior(Samples(X, y, self.scaler_, self._encode))
        return self

    def predict(
        self, X: Any, return_std: bool = False
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Targets [n] or [n o]; with `return_std` also the standard deviation of a new observation,
        noise included."""
        outputs = self._outputs(X)
        mean = self.target_scaler_.inverse_transform(outputs)
        if not return_std:
            return self._shaped(mean)
        if not hasattr(self, "posterior_"):
            raise ValueError(
                "there is no posterior: fit with posterior=True, or call fit_posterior(X, y) after "
                "partial_fit"
            )
        return self._shaped(mean), self._shaped(self._deviation(X))

    def _begin(self, X: np.ndarray, y: np.ndarray) -> None:
        self._forget_posterior()
        self._one_dimensional = y.ndim == 1
        self.n_outputs_ = _columns(y).shape[1]
        self.target_scaler_ = StandardScaler()
        self._start(X.shape[1], self.n_outputs_)

    def _check_outputs(self, y: np.ndarray) -> None:
        if _columns(y).shape[1] != self.n_outputs_:
            raise ValueError(
                f"y has {_columns(y).shape[1]} targets per sample; this estimator was fitted with "
                f"{self.n_outputs_}"
            )

    def _encode(self, y: np.ndarray) -> np.ndarray:
        return (_columns(y) - self.target_scaler_.mean_) / self.target_scaler_.scale_

    def _shaped(self, values: np.ndarray) -> np.ndarray:
        return values[:, 0] if self._one_dimensional else values

    def _forget_posterior(self) -> None:
        for name in ("posterior_", "noise_std_", "log_marginal_likelihood_"):
            if hasattr(self, name):
                delattr(self, name)

    def _take_posterior(self, samples: Samples) -> None:
        precise = Samples(samples.X, samples.y, samples.scaler, samples.encode, dtype=torch.float64)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch_seed(self._random))
            found: LinearPosterior = readout_posterior(
                self._precise(), lambda: precise.batches(FEATURE_BATCH)
            )
        set_readout(self.network_, found)
        self.posterior_ = found
        scale = self.target_scaler_.scale_
        self.noise_std_ = to_numpy(found.noise.sqrt()) * scale
        evidence = to_numpy(found.log_marginal_likelihood()) - found.samples * np.log(scale)
        self.log_marginal_likelihood_ = float(evidence.sum())

    @torch.no_grad()
    def _deviation(self, X: Any) -> np.ndarray:
        X, network = checked_samples(self, X, reset=False), self._precise()
        variances = []
        for i in range(0, len(X), FEATURE_BATCH):
            x = standardised(self.scaler_, X[i : i + FEATURE_BATCH], torch.float64)
            variances.append(self.posterior_.variance(readout_features(network, x)))
        total = torch.cat(variances) + self.posterior_.noise
        return to_numpy(total.sqrt()) * self.target_scaler_.scale_

    def __sklearn_tags__(self) -> Any:
        """Of scikit-learn from 1.6 on."""
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def _more_tags(self) -> dict[str, bool]:
        """Of scikit-learn before 1.6."""
        return {"multioutput": True}


def _columns(y: np.ndarray) -> np.ndarray:
    return y[:, None] if y.ndim == 1 else y
