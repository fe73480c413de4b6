"""One row per sample: what the model last said about it, and how that went over the course of
training.

Training dynamics follow Swayamdipta et al., "Dataset Cartography" (2020): mean and spread of the
probability given to the true class. A forgetting event (Toneva et al., 2019) is a sample that was
right when last seen and is wrong now.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..errors import NotFound

COLUMNS: dict[str, tuple[type, float]] = {
    # samples the model had learned from when it made the prediction
    "age": (np.int64, -1),
    # NaN until the sample is seen, so that no comparison matches it
    "loss": (np.float32, np.nan),
    "exposure": (np.int64, 0),
    "denied": (np.bool_, False),
    "pred": (np.int64, -1),
    "label": (np.int64, -1),
    # how often confidence was recorded: the n of the two moments below
    "judged": (np.int64, 0),
    "confidence": (np.float64, np.nan),
    "spread": (np.float64, 0.0),  # sum of squared deviations (Welford)
    "correct": (np.int64, 0),
    "last_correct": (np.int8, -1),
    "forgotten": (np.int64, 0),
    # how often the loss was NaN or infinite; such a prediction leaves nothing else behind
    "nonfinite": (np.int64, 0),
}
ADDED = ("nonfinite",)  # columns that checkpoints of earlier versions lack


def as_array(values: Tensor | np.ndarray | Iterable, dtype: type | None = None) -> np.ndarray:
    """Any vector as a numpy array, off its device and its graph."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = (
            values.float().numpy()
            if values.dtype in (torch.bfloat16, torch.float16)
            else values.numpy()
        )
    elif isinstance(values, set | frozenset):
        values = sorted(values)
    return np.asarray(values if isinstance(values, np.ndarray) else list(values), dtype=dtype)


class Ledger:
    """Arrays of one entry per sample. Everything is vectorised; positions are sample ids."""

    def __init__(self, samples: int) -> None:
        self.size = samples
        self.columns = {
            name: np.full(samples, default, dtype) for name, (dtype, default) in COLUMNS.items()
        }
        self.signals: dict[str, np.ndarray] = {}
        self.tags: dict[str, np.ndarray] = {}
        self.version = 0  # grows whenever it changes who is served

    def __getitem__(self, column: str) -> np.ndarray:
        return self.columns[column]

    def ids(self, wanted: Iterable[int] | Tensor | np.ndarray) -> np.ndarray:
        """`wanted` as an int64 array of known sample ids."""
        found = as_array(wanted)
        if found.size and found.dtype.kind not in "iu":
            raise TypeError(
                f"sample ids are integers, got {found.dtype} values such as {found.flat[0]!r}"
            )
        found = found.astype(np.int64).reshape(-1)
        missing = found[(found < 0) | (found >= self.size)]
        if missing.size:
            raise NotFound(
                f"no such samples: {missing[:10].tolist()}; ids go from 0 to {self.size - 1}"
            )
        return found

    def record(
        self,
        ids: Iterable[int] | Tensor,
        loss: Tensor,
        age: int,
        *,
        pred: Tensor | None = None,
        label: Tensor | None = None,
        confidence: Tensor | None = None,
        **signals: Tensor,
    ) -> None:
        """One prediction for each of `ids` [b]: `loss` [b], optionally `pred`, `label` [b]
        (integers), `confidence` [b] (probability of the true class) and further named `signals`
        [b]. `age`: samples learned from before.

        A loss that is not finite is counted as such and recorded nowhere else, so that a loss of
        NaN in the ledger means that there never was a prediction.
        """
        ids = self.ids(ids)
        given = {"loss": loss, "pred": pred, "label": label, "confidence": confidence, **signals}
        values = {
            name: as_array(value).reshape(-1) for name, value in given.items() if value is not None
        }
        for name, value in values.items():
            if len(value) != len(ids):
                raise ValueError(
                    f"'{name}' holds {len(value)} values for {len(ids)} samples; one per sample "
                    "was expected "
                    "(a loss wants reduction='none')"
                )
        finite = np.isfinite(values["loss"])
        if not finite.all():
            np.add.at(self.columns["nonfinite"], ids[~finite], 1)
            ids, values = ids[finite], {name: value[finite] for name, value in values.items()}
        if len(np.unique(ids)) == len(ids):
            self._record(ids, age, values)
            return
        left = np.arange(len(ids))  # a sampler with replacement: one round per repetition, in order
        while left.size:
            _, first = np.unique(ids[left], return_index=True)
            now = left[np.sort(first)]
            self._record(ids[now], age, {name: value[now] for name, value in values.items()})
            left = np.setdiff1d(left, now)

    def _record(self, ids: np.ndarray, age: int, values: dict[str, np.ndarray]) -> None:
        column = self.columns
        column["exposure"][ids] += 1
        column["age"][ids] = age
        for name in ("loss", "pred", "label"):
            if name in values:
                column[name][ids] = values[name]
        if "pred" in values and "label" in values:
            right = values["pred"] == values["label"]
            column["correct"][ids] += right
            column["forgotten"][ids] += (column["last_correct"][ids] == 1) & ~right
            column["last_correct"][ids] = right
        if "confidence" in values:
            column["judged"][ids] += 1
            count = column["judged"][ids]
            old = np.where(count == 1, 0.0, column["confidence"][ids])
            new = old + (values["confidence"] - old) / count
            column["spread"][ids] += (values["confidence"] - old) * (values["confidence"] - new)
            column["confidence"][ids] = new
        for name, value in values.items():
            if name not in ("loss", "pred", "label", "confidence"):
                self.signals.setdefault(name, np.full(self.size, np.nan, np.float32))[ids] = value

    def deny(self, mask: np.ndarray) -> None:
        """Make `mask` [samples] the set of denied samples; refused where nothing would be left to
        serve."""
        if self.size and mask.all():
            raise ValueError(
                f"this would deny all {self.size} samples and leave nothing to serve; nothing was "
                "changed"
            )
        self.columns["denied"] = mask.copy()
        self.version += 1

    def tag(self, name: str, ids: np.ndarray, on: bool = True) -> None:
        """Mark (or unmark) samples with a word."""
        if on:
            self.tags.setdefault(name, np.zeros(self.size, np.bool_))[ids] = True
        elif name not in self.tags:
            raise NotFound(f"no tag '{name}'; there are {sorted(self.tags)}")
        else:
            self.tags[name][ids] = False

    def variability(self) -> np.ndarray:
        """Standard deviation of the confidence over the times that each sample was seen, NaN where
        never."""
        judged = self.columns["judged"]
        return np.where(judged > 0, np.sqrt(self.columns["spread"] / np.maximum(judged, 1)), np.nan)

    def frame(self) -> pd.DataFrame:
        """One row per sample under the documented names, then signals and tags."""
        seen = self.columns["exposure"] > 0
        judged = seen & (self.columns["last_correct"] >= 0)
        return pd.DataFrame(
            {
                "prediction_age": np.where(seen, self.columns["age"], np.nan),
                "prediction_loss": self.columns["loss"],
                "exposure_amount": self.columns["exposure"],
                "deny_listed": self.columns["denied"],
                "predicted_class": self.columns["pred"],
                "label": self.columns["label"],
                "confidence": self.columns["confidence"],
                "variability": self.variability(),
                "correctness": np.where(
                    judged,
                    self.columns["correct"] / np.maximum(self.columns["exposure"], 1),
                    np.nan,
                ),
                "forgotten": self.columns["forgotten"],
                "nonfinite": self.columns["nonfinite"],
                **self.signals,
                **self.tags,
            },
            index=pd.RangeIndex(self.size, name="sample_id"),
        )

    def state(self) -> dict:
        """All of it as plain tensors."""

        def packed(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
            return {name: torch.from_numpy(values.copy()) for name, values in arrays.items()}

        return {
            "columns": packed(self.columns),
            "signals": packed(self.signals),
            "tags": packed(self.tags),
        }

    def load_state(self, state: dict) -> None:
        """Take over a `state`; it has to speak of as many samples."""
        self.check_state(state)
        fresh = Ledger(self.size).columns  # a column that the state is too old to know
        for part, held in (("columns", fresh), ("signals", {}), ("tags", {})):
            stored = {name: values.numpy().copy() for name, values in state[part].items()}
            setattr(self, part, {**held, **stored})
        self.version += 1

    def check_state(self, state: dict) -> None:
        """Raise unless `state` fits this ledger."""
        samples = len(state["columns"]["denied"])
        if samples != self.size:
            raise ValueError(
                f"the stored ledger speaks of {samples} samples, the data set has {self.size}; "
                "load it with the data set that it was written for"
            )
        strange = sorted((set(state["columns"]) ^ set(COLUMNS)) - {*ADDED})
        kinds = {name: np.dtype(kind) for name, (kind, _) in COLUMNS.items()}
        for part in ("columns", "signals", "tags"):
            for name, values in state[part].items():
                kind = kinds.get(name) if part == "columns" else None
                array = values.numpy()
                if array.shape != (samples,) or kind not in (None, array.dtype):
                    strange.append(name)
        if strange:
            raise ValueError(f"the stored ledger is damaged: {strange} are not columns of its kind")


def hardest(frame: pd.DataFrame, count: int) -> pd.DataFrame:
    """The samples whose own label got the least probability over training, worst first (without
    labels: those of the highest loss). Wrong labels gather here."""
    seen = frame[frame["exposure_amount"] > 0]
    order = ["confidence", "prediction_loss"]
    return seen.sort_values(order, ascending=[True, False], kind="stable").head(count)
