"""What the plateau logic decides after an epoch, and the state that it decides from."""

from dataclasses import dataclass, field
from typing import Literal

Action = Literal["continue", "grow", "retry", "lower_rate", "commit_rate", "mature", "finish"]


@dataclass(frozen=True)
class Decision:
    """What to do after an epoch: ``new_best`` says that the network just scored is the best so far,
    ``rollback`` that it must be restored first."""

    action: Action
    reason: str
    new_best: bool = False
    rollback: bool = False
    skip: int = 0  # lower_rate: how many levels below the usual start
    rate: float = 1.0  # lower_rate: start at this share of the usual learning rate


@dataclass
class Search:
    """A search for the learning rate that a grown network starts with: trial ``skip`` starts that
    many levels lower."""

    skip: int = 0
    best: float | None = None
    previous: float | None = None
    previous_levels: list[float] = field(default_factory=list)


@dataclass
class PlateauState:
    epoch: int = 0
    dendrites: int = 0
    tries: int = 0
    phase: str = "n"  # n: neurons learn; p: candidate dendrites learn by correlation
    best: float | None = None
    best_epoch: int = 0
    running: float | None = None
    cycle_best: float | None = None
    cycle_start: int = 0
    last_improved: int = 0
    accepted: bool = False  # the newest generation has beaten the best score before it
    first_cycle: int | None = None
    # learning rates of this generation, each a step below the last
    levels: list[float] = field(default_factory=list)
    # the same for the generation before, from the usual start on
    rates: list[float] = field(default_factory=list)
    skip: int = 0  # this generation started at rates[skip]
    search: Search | None = None
    candidate_best: dict[str, list[float]] = field(default_factory=dict)
    candidate_improved: int = 0
    warned: bool = False
    finished: str = ""
