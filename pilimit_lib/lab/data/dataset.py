"""A data set that knows its samples: the ledger, and who is denied or allowed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from ...core import replacing
from ..errors import NotFound
from .items import fingerprint, is_finite
from .ledger import Ledger, as_array, hardest

Predicate = Callable[..., Any]
Selection = Predicate | pd.Series | np.ndarray | Tensor | str


class TrackedDataset(Dataset):
    """The user's data set, unchanged, with a `ledger` beside it. A sample's id is its position,
    whatever the shuffling, so that its length stays when samples are denied: `allowed` counts who
    is left, and `len(loader)` shrinks."""

    def __init__(self, dataset: Dataset) -> None:
        if isinstance(dataset, IterableDataset) or not (
            hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
        ):
            raise TypeError(
                f"{type(dataset).__name__} has no positions, so its samples have no ids that last; "
                "a data set with len() and indexing was expected"
            )
        if len(dataset) == 0:
            raise ValueError(f"{type(dataset).__name__} is empty")
        self.wrapped = dataset
        self.ledger = Ledger(len(dataset))
        self._fingerprint: list[list[list[Any]]] | None = None
        self.listener: Callable[..., None] | None = None  # told of every change of who is served

    def __len__(self) -> int:
        return self.ledger.size

    def __getitem__(self, index: int) -> Any:
        return self.wrapped[index]

    @property
    def allowed(self) -> int:
        """How many samples are served at present."""
        return int((~self.ledger["denied"]).sum())

    def get_dataframe(self, *, all_samples: bool = False) -> pd.DataFrame:
        """The ledger as a frame, one row per sample, indexed by sample id.

        Without `all_samples` only samples that were seen. `prediction_age`: samples the model had
        learned from when it made the prediction; `prediction_loss` is NaN where it made none.
        `confidence`, `variability` and `correctness` are the data map; `forgotten` counts
        forgetting events, `nonfinite` losses that were NaN or infinite. Signals and tags follow
        under their names.
        """
        frame = self.ledger.frame()
        return frame if all_samples else frame[self.ledger["exposure"] > 0]

    def hardest(self, count: int = 24) -> pd.DataFrame:
        """The rows of the samples whose label got the least probability on average, worst first:
        hard or, above all where `predicted_class` differs, wrongly labelled."""
        return hardest(self.get_dataframe(), count)

    def fingerprint(self) -> list[list[list[Any]]]:
        """See `items.fingerprint`; worked out once. The caller keeps the random generators."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self.wrapped)
        return self._fingerprint

    def not_finite(self, ids: Iterable[int] | Tensor) -> list[int]:
        """Those of the samples `ids` whose own data holds NaN or infinity."""
        return [i for i in self.ledger.ids(ids).tolist() if not is_finite(self.wrapped[i])]

    def query(self, expression: str) -> pd.DataFrame:
        """The rows of the whole ledger for which a pandas expression holds: `query("forgotten > 2
        and label == 3")`."""
        try:
            return self.get_dataframe(all_samples=True).query(expression)
        except Exception as error:
            raise ValueError(
                f"the query {expression!r} failed: {error}; columns are "
                f"{list(self.get_dataframe(all_samples=True).columns)}"
            ) from error

    def export(self, path: str | Path, *, all_samples: bool = True) -> Path:
        """Write the frame to a `.csv` or `.parquet` file (the latter needs pyarrow)."""
        path = Path(path)
        if path.suffix not in (".csv", ".parquet"):
            raise ValueError(
                f"cannot export to '{path.name}': the ending says the format, .csv or .parquet"
            )
        if path.suffix == ".parquet" and find_spec("pyarrow") is None:
            raise ImportError("writing parquet needs pyarrow: pip install 'pilimit[lab]'")
        frame = self.get_dataframe(all_samples=all_samples)
        with replacing(path) as beside:
            frame.to_csv(beside) if path.suffix == ".csv" else frame.to_parquet(beside)
        return path

    def matching(self, selection: Selection) -> np.ndarray:
        """Which samples a selection means: bool [samples]. Nothing is changed.

        A selection is a predicate `fn(id, age, loss, times, denied, pred, label)` called once a
        sample, a function `fn(frame)` of one argument, a query string, or a mask. Samples never
        seen have loss NaN and pred, label and age -1.
        """
        if isinstance(selection, str):
            found = self.query(selection).index.to_numpy()
            return np.isin(np.arange(len(self)), found)
        if callable(selection):
            selection = self._called(selection)
        mask = as_array(selection) if np.iterable(selection) else np.asarray(selection)
        if mask.dtype != np.bool_ or mask.shape != (len(self),):
            raise ValueError(
                f"a selection must be {len(self)} booleans, one per sample; got {mask.dtype} of "
                f"shape {mask.shape}"
            )
        return mask

    def _called(self, predicate: Predicate) -> Any:
        if _wants_frame(predicate):
            frame = self.get_dataframe(all_samples=True)
            answer = _asked(predicate, f"(frame) with the columns {list(frame)}", "", frame)
            if answer is None:
                raise ValueError(
                    "the predicate returned None for the frame; a boolean per sample was expected "
                    "(is a `return` missing?). Nothing was changed"
                )
            return answer
        names = ("age", "loss", "exposure", "denied", "pred", "label")
        answers = np.zeros(len(self), np.bool_)
        for sample, row in enumerate(zip(*(self.ledger[name].tolist() for name in names))):
            what = f" for sample {sample}"
            answer = _asked(
                predicate, "(id, age, loss, times, denied, pred, label)", what, sample, *row
            )
            answers[sample] = _truth(answer, what)
        return answers

    def deny_samples_with_predicate(self, predicate: Selection, *, accumulate: bool = False) -> int:
        """Deny the samples that match, and only those (`accumulate`: also those denied already).
        Returns how many are denied.

        The whole predicate is evaluated first: if it raises, or matches everything, nothing
        changes. Takes effect at once, in the middle of an epoch too.
        """
        mask = self.matching(predicate)
        return self._deny(mask | self.ledger["denied"] if accumulate else mask)

    def deny_samples_and_sample_allowed_with_predicate(
        self,
        predicate: Selection,
        allow_to_denied_factor: float,
        *,
        accumulate: bool = False,
        seed: int | None = None,
    ) -> int:
        """Deny what matches, then allow some of it again at random until the data set holds at
        least `allow_to_denied_factor` allowed samples for each denied one. Returns how many are
        denied.

        With a `seed` the choice is its own; without one it draws from torch's global generator.
        """
        factor = allow_to_denied_factor
        if (
            isinstance(factor, bool)
            or not isinstance(factor, int | float)
            or not np.isfinite(factor)
            or factor < 0
        ):
            raise ValueError(
                f"allow_to_denied_factor={factor!r}: a finite number of allowed samples per denied "
                "one, at least 0"
            )
        mask = self.matching(predicate)
        if accumulate:
            mask = mask | self.ledger["denied"]
        bound = int(len(self) / (1 + factor))
        denied = np.flatnonzero(mask)
        if len(denied) > bound:
            generator = None if seed is None else torch.Generator().manual_seed(seed)
            denied = denied[torch.randperm(len(denied), generator=generator)[:bound].numpy()]
        return self._deny(np.isin(np.arange(len(self)), denied))

    def denylist_samples(self, ids: Iterable[int] | Tensor, *, accumulate: bool = True) -> int:
        """Deny these ids as well (`accumulate=False`: these only). Returns how many are denied."""
        mask = np.zeros(len(self), np.bool_)
        mask[self.ledger.ids(ids)] = True
        return self._deny(mask | self.ledger["denied"] if accumulate else mask)

    def allowlist_samples(self, ids: Iterable[int] | Tensor | None = None) -> int:
        """Allow these ids again, or all samples with None. Returns how many are still denied."""
        mask = self.ledger["denied"].copy()
        mask[slice(None) if ids is None else self.ledger.ids(ids)] = False
        return self._deny(mask)

    deny = deny_samples_with_predicate

    def _deny(self, mask: np.ndarray) -> int:
        self.ledger.deny(mask)
        if self.listener is not None:
            self.listener(
                "deny",
                what=f"{int(mask.sum())} of {len(self)} samples denied",
                denied=int(mask.sum()),
            )
        return int(mask.sum())

    def tag(self, name: str, samples: Selection | Iterable[int]) -> int:
        """Give the samples (a selection, or ids) a tag, which becomes a column of the frame;
        returns how many have it."""
        taken = set(self.get_dataframe(all_samples=True).columns) - set(self.ledger.tags)
        if not isinstance(name, str) or not name.isidentifier() or name in taken:
            raise ValueError(
                f"'{name}' cannot be a tag: a word that is no other column of the frame was "
                "expected"
            )
        self.ledger.tag(name, self._chosen(samples))
        return int(self.ledger.tags[name].sum())

    def untag(self, name: str, samples: Selection | Iterable[int] | None = None) -> None:
        """Take the tag from these samples, or from all."""
        chosen = np.arange(len(self)) if samples is None else self._chosen(samples)
        self.ledger.tag(name, chosen, on=False)

    def tagged(self, name: str) -> np.ndarray:
        """Ids of the samples with this tag."""
        if name not in self.ledger.tags:
            raise NotFound(f"no tag '{name}'; there are {sorted(self.ledger.tags)}")
        return np.flatnonzero(self.ledger.tags[name])

    def _chosen(self, samples: Selection | Iterable[int]) -> np.ndarray:
        if callable(samples) or isinstance(samples, str) or as_array(samples).dtype == np.bool_:
            return np.flatnonzero(self.matching(samples))
        return self.ledger.ids(samples)


def _asked(predicate: Predicate, form: str, what: str, *arguments: Any) -> Any:
    try:
        return predicate(*arguments)
    except Exception as error:
        raise ValueError(
            f"the predicate raised {type(error).__name__}{what}: {error}; it is called as "
            f"fn{form}; nothing was changed"
        ) from error


def _truth(answer: Any, what: str) -> bool:
    """The answer as a bool; what is none (None above all, where a `return` is missing) is an
    error."""
    if isinstance(answer, Tensor | np.ndarray) and answer.ndim == 0:
        answer = answer.item()
    if isinstance(answer, bool | np.bool_) or (isinstance(answer, int) and answer in (0, 1)):
        return bool(answer)
    raise ValueError(
        f"the predicate returned {answer!r}{what}; True or False was expected (is a `return` "
        "missing?). Nothing was changed"
    )


def _wants_frame(function: Callable) -> bool:
    """A function of exactly one positional argument speaks of the whole frame; the documented
    predicate has seven."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    required = [
        p
        for p in parameters
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty
    ]
    return len(required) == 1 and not any(p.kind is p.VAR_POSITIONAL for p in parameters)
