"""When a network grows and when it stops: validated settings of the plateau logic. No torch in
here.

A setting typed ``Schedule`` may be one number or a sequence; entry k holds while the network has k
dendrites, the last entry from there on.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

Schedule = float | Sequence[float]


def at(value, dendrites: int):
    """The value of a setting while the network has that many dendrites."""
    if isinstance(value, (list, tuple)):
        return value[min(dendrites, len(value) - 1)]
    return value


def check_number(name: str, value, *, low=None, whole=False, schedule=False, above=None) -> None:
    """Raise unless the setting is a finite number in range (or, for schedules, a sequence of
    such)."""
    entries = value if schedule and isinstance(value, (list, tuple)) else [value]
    wanted = "a whole number" if whole else "a number"
    if low is not None:
        wanted += f" ≥ {low}"
    if above is not None:
        wanted += f" > {above}"
    if schedule:
        wanted += ", or a list of such (one for each number of dendrites)"
    if not entries:
        raise ValueError(f"{name} is an empty list; give {wanted}")
    for entry in entries:
        if isinstance(entry, bool) or not isinstance(entry, int if whole else (int, float)):
            raise TypeError(f"{name} got {value!r} ({type(value).__name__}); give {wanted}")
        if (
            not math.isfinite(entry)
            or (low is not None and entry < low)
            or (above is not None and entry <= above)
        ):
            raise ValueError(f"{name} got {value!r}; give {wanted}")


@dataclass(frozen=True)
class Patience:
    """Grow when the score has not improved for ``patience`` epochs.

    ``lookback`` L smooths the score by a running mean of weight 1/L (1: none); ``grace`` adds
    epochs after each growth before the patience counts.
    """

    patience: Schedule = 10
    lookback: Schedule = 1
    grace: Schedule = 0

    def __post_init__(self):
        check_number("Patience.patience", self.patience, low=1, whole=True, schedule=True)
        check_number("Patience.lookback", self.lookback, low=1, schedule=True)
        check_number("Patience.grace", self.grace, low=0, whole=True, schedule=True)


@dataclass(frozen=True)
class Fixed:
    """Grow every ``every`` epochs; the first time after ``first`` epochs if that is longer."""

    every: Schedule = 250
    first: int = 0

    def __post_init__(self):
        check_number("Fixed.every", self.every, low=1, whole=True, schedule=True)
        check_number("Fixed.first", self.first, low=0, whole=True)


@dataclass(frozen=True)
class EveryEpoch:
    """Grow after every epoch: a quick test that the network can grow at all."""


@dataclass(frozen=True)
class Never:
    """Never grow and never finish; scores are recorded only."""


History = Patience  # its name of before
SWITCHES = (Patience, Fixed, EveryEpoch, Never)
CAPACITY_DENDRITES = 3  # what a capacity test adds before it reports success


@dataclass(frozen=True)
class Rules:
    """Settings of the plateau logic.

    switch              when to grow: Patience, Fixed, EveryEpoch or Never
    maximize            whether a higher score is better
    threshold,          a score improves when it beats the best by this share of itself and by this
    threshold_raw       amount
    max_dendrites       generations of dendrites after which the network is finished
    max_tries           attempts, each with fresh random weights, that one generation has to beat
                        the best score
    retain_all          keep dendrites that did not improve the score
    reset_best          judge patience within one generation instead of against the best score of
                        all
    testing_capacity    grow after every epoch, keep all, finish after three generations
    find_best_lr        after growth try the starting learning rate, then one step lower, and keep
                        the better (needs a scheduler)
    wait_for_lower_lr   no growth before the scheduler has lowered the learning rate in this
                        generation
    mode                "joint": everything is trained by the task loss; "correlation": cascade
                        correlation (our reading), see correlation.py
    candidate_patience, candidate_threshold, candidate_threshold_raw, cap_at_n
                        when the correlation phase ends: no neuron improved by the share and the
                        amount for so many epochs, or (cap_at_n) after as many epochs as the first
                        training of the neurons took
    """

    switch: Patience | Fixed | EveryEpoch | Never = Patience()
    maximize: bool = True
    threshold: Schedule = (1e-3, 1e-4, 0.0)
    threshold_raw: Schedule = 1e-5
    max_dendrites: int = 100
    max_tries: Schedule = 2
    retain_all: bool = False
    reset_best: bool = False
    testing_capacity: bool = False
    find_best_lr: bool = True
    wait_for_lower_lr: bool = True
    mode: str = "joint"
    candidate_patience: Schedule = 10
    candidate_threshold: Schedule = 0.1
    candidate_threshold_raw: Schedule = 1e-5
    cap_at_n: bool = False

    def __post_init__(self):
        if not isinstance(self.switch, SWITCHES):
            raise TypeError(
                f"switch got {self.switch!r}; give Patience(...), Fixed(...), EveryEpoch() or "
                "Never()"
            )
        check_number("threshold", self.threshold, low=0, schedule=True)
        check_number("threshold_raw", self.threshold_raw, low=0, schedule=True)
        check_number("max_dendrites", self.max_dendrites, low=0, whole=True)
        check_number("max_tries", self.max_tries, low=1, whole=True, schedule=True)
        check_number(
            "candidate_patience", self.candidate_patience, low=1, whole=True, schedule=True
        )
        check_number("candidate_threshold", self.candidate_threshold, low=0, schedule=True)
        check_number("candidate_threshold_raw", self.candidate_threshold_raw, low=0, schedule=True)
        if self.mode not in ("joint", "correlation"):
            raise ValueError(f'mode got {self.mode!r}; give "joint" or "correlation"')
        for field in fields(self):
            if field.type is bool and not isinstance(getattr(self, field.name), bool):
                raise TypeError(
                    f"{field.name} got {getattr(self, field.name)!r}; give True or False"
                )
