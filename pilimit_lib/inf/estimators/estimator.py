"""What `PiClassifier` and `PiRegressor` have in common: an infinitely wide network as moments,
trained on arrays."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from numbers import Integral, Real

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from sklearn.utils.validation import check_is_fitted, check_random_state
from torch import Tensor
from tqdm import tqdm

from ..mlp import InfMLP
from .checking import CHUNK, checked_samples, torch_seed
from .training import RATES, Course, Loss, Samples, observe, optimizer_for, standardised, train

# what batch_size="auto" stands for: that many steps per epoch, within these sizes
_STEPS, _SMALLEST_BATCH, _LARGEST_BATCH = 16, 8, 64

Encode = Callable[[np.ndarray], np.ndarray]


class PiEstimator(BaseEstimator):
    """An infinitely wide network that learns features, as moments: its size never depends on the
    number of samples.

    Args:
        r, L: rank of the pre-activations and number of hidden π-layers, see `InfMLP`; a layer has
            about r^degree / degree! features. degree, series, activation: of the units, see
            `hermite_series` (`series` is its `fit`). bias_alpha: multiplier of biases, 0: none.
        optimizer: "adam", or "sgd", whose training is the limit of that of finite networks.
        learning_rate: at the start; it falls to zero along a cosine in `fit` and stays in
            `partial_fit`. Default .002 for adam, .1 for sgd.
        weight_decay: of the optimiser. max_norm: of the gradient at most, None for no clipping.
        max_epochs, batch_size: passes over the samples in `fit`; samples per step, "auto" for a
            sixteenth of them, from 8 to 64.
        early_stopping: hold out `validation_fraction` of the samples, stop after `n_iter_no_change`
            epochs in which their loss did not fall by `tol`, and keep the best epoch's network.
        random_state: of initial weights, order and held-out samples. verbose: show progress.

    Attributes:
        network_: the InfMLP. Its inputs are standardised by `scaler_`, per feature. A finite
            network of the same function is `network_.sample(n)`.
        n_iter_, loss_curve_, validation_curve_: epochs, and the loss of each.
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
        random_state: int | np.random.RandomState | None = None,
        verbose: bool = False,
    ) -> None:
        self.r = r
        self.L = L
        self.degree = degree
        self.series = series
        self.activation = activation
        self.bias_alpha = bias_alpha
        self.optimizer = optimizer
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.max_norm = max_norm
        self.max_epochs = max_epochs
        self.batch_size = batch_size
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.tol = tol
        self.random_state = random_state
        self.verbose = verbose

    def _start(self, d: int, outputs: int) -> None:
        """A fresh network for d features, and nothing seen yet."""
        self._random = check_random_state(self.random_state)
        self.scaler_ = StandardScaler()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch_seed(self._random))
            self.network_ = InfMLP(
                d,
                outputs,
                self.r,
                self.L,
                bias_alpha=self.bias_alpha,
                memory="moments",
                degree=self.degree,
                fit=self.series,
                activation=self.activation,
                dtype=torch.float32,
            )
        self._optimizer_state: dict | None = None
        self.n_iter_, self.loss_curve_, self.validation_curve_ = 0, [], []

    def _train_whole(self, X: np.ndarray, y: np.ndarray, encode: Encode, loss: Loss) -> Samples:
        """All epochs of `fit`; returns the samples as the network saw them."""
        observe(self.scaler_, X)
        samples = Samples(X, y, self.scaler_, encode)
        if not self.early_stopping:
            self._train(samples, loss, self.max_epochs)
            return samples
        seen, held = self._split(y)
        self._train(samples.part(seen), loss, self.max_epochs, samples.part(held))
        return samples

    def _train_on(self, X: np.ndarray, y: np.ndarray, encode: Encode, loss: Loss) -> None:
        """One pass over one chunk of samples, for `partial_fit`."""
        observe(self.scaler_, X)
        self._train(Samples(X, y, self.scaler_, encode), loss, 1)

    def _train(
        self, samples: Samples, loss: Loss, epochs: int, held_out: Samples | None = None
    ) -> None:
        optimizer = optimizer_for(
            self.network_, self.optimizer, self.learning_rate, self.weight_decay
        )
        if self._optimizer_state is not None:
            optimizer.load_state_dict(self._optimizer_state)
        with tqdm(
            total=epochs * len(samples),
            desc=type(self).__name__,
            unit="sample",
            unit_scale=True,
            disable=None if self.verbose else True,
        ) as bar:
            course: Course = train(
                self.network_,
                optimizer,
                loss,
                samples,
                self._random,
                epochs=epochs,
                batch_size=self._batch(len(samples)),
                clip=self.max_norm,
                anneal=epochs > 1,
                bar=bar,
                held_out=held_out,
                patience=self.n_iter_no_change,
                tol=self.tol,
            )
        self._optimizer_state = optimizer.state_dict()
        self.n_iter_ += len(course.losses)
        self.loss_curve_ += course.losses
        self.validation_curve_ += [-score for score in course.scores]

    def _batch(self, samples: int) -> int:
        if self.batch_size == "auto":
            return min(_LARGEST_BATCH, max(_SMALLEST_BATCH, samples // _STEPS))
        return self.batch_size

    def _split(self, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(samples to train on, samples held out): sorted indices."""
        parts = train_test_split(
            np.arange(len(y)),
            test_size=self.validation_fraction,
            random_state=torch_seed(self._random),
            stratify=self._strata(y),
        )
        return tuple(np.sort(part) for part in parts)

    def _strata(self, y: np.ndarray) -> np.ndarray | None:
        """Groups of which both parts shall have the same share."""
        return None

    def _outputs(self, X: np.ndarray) -> np.ndarray:
        """The network's outputs [n o] in float64, in which they do not depend on the samples beside
        them."""
        check_is_fitted(self, "network_")
        X = checked_samples(self, X, reset=False)
        network = self._precise()
        with torch.no_grad():
            parts = [
                network(standardised(self.scaler_, X[i : i + CHUNK], torch.float64))
                for i in range(0, len(X), CHUNK)
            ]
        return torch.cat(parts).numpy()

    def _precise(self) -> InfMLP:
        return copy.deepcopy(self.network_).double()

    def _check_settings(self) -> None:
        """Raise where a setting means nothing, before anything has changed. Those of the network
        are checked by `InfMLP`."""
        for name, least in (
            ("r", 1),
            ("L", 0),
            ("max_epochs", 1),
            ("n_iter_no_change", 1),
        ):
            value = getattr(self, name)
            if not _whole(value, least):
                raise ValueError(f"{name} is {value!r}; a whole number from {least} was expected")
        if self.batch_size != "auto" and not _whole(self.batch_size):
            raise ValueError(
                f"batch_size is {self.batch_size!r}; 'auto' or a whole number from 1 was expected"
            )
        for name in ("learning_rate", "max_norm"):
            value = getattr(self, name)
            if value is not None and not _positive(value):
                raise ValueError(f"{name} is {value!r}; a positive number was expected, or None")
        if self.optimizer not in RATES:
            raise ValueError(
                f"optimizer is {self.optimizer!r}; one of {', '.join(RATES)} was expected"
            )
        if not (self.weight_decay == 0 or _positive(self.weight_decay)):
            raise ValueError(
                f"weight_decay is {self.weight_decay!r}; a number that is not negative was expected"
            )
        if not (_positive(self.validation_fraction) and self.validation_fraction < 1):
            raise ValueError(
                f"validation_fraction is {self.validation_fraction!r}; a number between 0 and 1 "
                "was expected"
            )


def _whole(value: object, least: int = 1) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= least


def _positive(value: object) -> bool:
    return isinstance(value, Real) and 0 < value < math.inf


def to_numpy(value: Tensor) -> np.ndarray:
    return value.detach().cpu().numpy()
