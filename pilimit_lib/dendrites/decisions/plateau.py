"""The plateau logic: a state machine from scores to decisions. Pure Python, no torch: numbers in, a
decision out.

first training ─plateau─► grow ─► [search the starting rate] ─plateau─► beat the best? ─yes─► grow …
                           ▲                                                │ no
                           └──── retry, fresh weights (tries left) ◄────────┤
                                                       finish, best restored ◄┘
"""

import math
import warnings
from dataclasses import asdict, fields

from .decision import Action, Decision, PlateauState, Search
from .rules import CAPACITY_DENDRITES, EveryEpoch, Fixed, Never, Patience, Rules, at

# a learning rate below this share of the last level counts as lowered; slow decay is not a step
STEP_DOWN = 0.9
# patiences without a lower learning rate after which the user is told why nothing happens
STALLED_WAIT = 5


def as_score(score) -> float:
    """A score as a Python number; numbers, numpy numbers and tensors of one element will do."""
    if isinstance(score, (bool, str, bytes)):
        raise TypeError(
            f"the score is {score!r} ({type(score).__name__}); give one number, such as the "
            "validation accuracy"
        )
    try:
        value = float(score)
    except (TypeError, ValueError, RuntimeError):
        shape = f" of shape {list(score.shape)}" if hasattr(score, "shape") else ""
        raise TypeError(
            f"the score is a {type(score).__name__}{shape}; give one number, such as the "
            "validation accuracy"
        ) from None
    if math.isinf(value):
        raise ValueError(
            f"the score is {value}; give a finite number (nan counts as no improvement)"
        )
    return value


class Plateau:
    """Feed it one score per epoch; it says whether to go on, grow, retry or finish."""

    def __init__(self, rules: Rules):
        self.rules = rules
        self.state = PlateauState()

    def observe(self, score: float, lr: float | None = None, *, force: bool = False) -> Decision:
        """Take the score of an epoch of neuron training and the learning rate that follows it
        (None: no scheduler).

        A score that is not a number (nan) never improves. ``force`` acts as if the patience had run
        out.
        """
        s = self.state
        if s.finished:
            return Decision("finish", s.finished)
        if s.phase != "n":
            raise RuntimeError(
                "candidates are being trained: feed their correlations to observe_candidates()"
            )
        s.epoch += 1
        self._note_rate(lr)
        weight = 1.0 / at(self._history.lookback, s.dendrites)
        s.running = (
            score
            if s.running is None or math.isnan(s.running)
            else s.running + weight * (score - s.running)
        )
        new_best = self.improves(s.running, s.best)
        judged = self.improves(s.running, s.cycle_best) if self.rules.reset_best else new_best
        if judged:
            s.cycle_best, s.last_improved = s.running, s.epoch
        if new_best:
            s.best, s.best_epoch, s.accepted = s.running, s.epoch, True
        if s.search is not None and not force:
            return self._searching(s.running, new_best)
        if force or self._due(lr):
            return self._conclude(new_best)
        return Decision("continue", self._waiting(lr), new_best)

    def observe_candidates(
        self, correlations: dict[str, list[float]], *, force: bool = False
    ) -> Decision:
        """Take the correlation of every candidate neuron after an epoch of dendrite training, by
        layer."""
        s, k = self.state, self.state.dendrites
        if s.phase != "p":
            raise RuntimeError(
                "no candidates are being trained: feed the validation score to observe()"
            )
        s.epoch += 1
        share, amount = (
            at(self.rules.candidate_threshold, k),
            at(self.rules.candidate_threshold_raw, k),
        )
        for layer, values in correlations.items():
            best = s.candidate_best.setdefault(layer, [0.0] * len(values))
            for i, value in enumerate(values):
                if value >= best[i] * (1 + share) and value >= best[i] + amount:
                    best[i], s.candidate_improved = value, s.epoch
        if force or s.epoch - max(s.candidate_improved, s.cycle_start) >= at(
            self.rules.candidate_patience, k
        ):
            return self._mature("no candidate improves its correlation any more")
        if self.rules.cap_at_n and s.epoch - s.cycle_start >= (s.first_cycle or 1):
            return self._mature("as many epochs as the first training of the neurons (cap_at_n)")
        return Decision("continue", "candidates are learning")

    def grow_now(self) -> Decision:
        """Begin a new generation without waiting for a plateau, from the network as it is."""
        if self.state.finished or self.state.phase != "n":
            raise RuntimeError(
                f"the run is {'finished' if self.state.finished else 'training candidates'}; it "
                "cannot grow now"
            )
        self.state.accepted = False
        return self._start_generation("grow", "asked for", False)

    def start_rate(self, lr: float | None) -> None:
        """Say which learning rate a (re)started optimiser begins with."""
        self.state.levels = [] if lr is None else [lr]

    def improves(self, score: float, best: float | None) -> bool:
        """Whether a score beats the best by both thresholds; for positive scores s·(1∓thr) against
        best, as documented."""
        if math.isnan(score):
            return False
        if best is None:
            return True
        k = self.state.dendrites
        share, amount = at(self.rules.threshold, k) * abs(score), at(self.rules.threshold_raw, k)
        if self.rules.maximize:
            return score - share > best and score - amount > best
        return score + share < best and score + amount < best

    def at_best(self, before: dict) -> dict:
        """The state to go on from with the network just scored, had nothing been decided;
        ``before``: as it was until then."""
        s = self.state
        return {
            **before,
            "epoch": s.epoch,
            "best": s.best,
            "best_epoch": s.best_epoch,
            "accepted": True,
            "last_improved": s.epoch,
            "search": None,
            "finished": "",
        }

    def state_dict(self) -> dict:
        # asdict() takes ten times as long, and this is done every epoch
        state = dict(vars(self.state))
        best = {layer: list(values) for layer, values in self.state.candidate_best.items()}
        copied = {
            "levels": list(self.state.levels),
            "rates": list(self.state.rates),
            "candidate_best": best,
        }
        return {
            **state,
            **copied,
            "search": None if self.state.search is None else asdict(self.state.search),
        }

    def load_state_dict(self, state: dict) -> None:
        known = {f.name for f in fields(PlateauState)}
        if set(state) != known:
            raise ValueError(
                f"state of a plateau has the entries {sorted(state)}, expected {sorted(known)}"
            )
        search = state["search"]
        self.state = PlateauState(
            **{**state, "search": None if search is None else Search(**search)}
        )

    @property
    def _history(self) -> Patience:
        return self.rules.switch if isinstance(self.rules.switch, Patience) else Patience()

    def _note_rate(self, lr: float | None) -> None:
        levels = self.state.levels
        if lr is not None and (not levels or lr < STEP_DOWN * levels[-1]):
            levels.append(lr)

    def _due(self, lr: float | None) -> bool:
        s, switch = self.state, self.rules.switch
        if self.rules.testing_capacity or isinstance(switch, EveryEpoch):
            return True
        if isinstance(switch, Never):
            return False
        if isinstance(switch, Fixed):
            first = switch.first if s.dendrites == 0 else 0
            return s.epoch - s.cycle_start >= max(at(switch.every, s.dendrites), first)
        return self._patience_over() and not self._must_wait(lr)

    def _patience_over(self) -> bool:
        s, history = self.state, self._history
        patience, grace = at(history.patience, s.dendrites), at(history.grace, s.dendrites)
        return (
            s.epoch - max(s.last_improved, s.cycle_start) >= patience
            and s.epoch - s.cycle_start >= grace + patience
        )

    def _must_wait(self, lr: float | None) -> bool:
        return self.rules.wait_for_lower_lr and lr is not None and len(self.state.levels) < 2

    def _waiting(self, lr: float | None) -> str:
        s = self.state
        if not isinstance(self.rules.switch, Patience) or not self._patience_over():
            return "learning"
        stalled = s.epoch - max(s.last_improved, s.cycle_start)
        if stalled >= STALLED_WAIT * at(self._history.patience, s.dendrites) and not s.warned:
            s.warned = True
            warnings.warn(
                f"the score has stalled for {stalled} epochs, but the scheduler never lowered the "
                "learning rate, and wait_for_lower_lr (dont_give_up_unless_learning_rate_lowered) "
                "forbids growth before; switch it off, or give the scheduler less patience than "
                "Patience.patience (n_epochs_to_switch)",
                stacklevel=4,
            )
        return "waiting for the scheduler to lower the learning rate"

    def _searching(self, score: float, new_best: bool) -> Decision:
        s, t = self.state, self.state.search
        if t.best is None or self.better(score, t.best):
            t.best = score
        if len(s.levels) < 2 and not self._patience_over():
            return Decision(
                "continue",
                f"trying the learning rate {t.skip} steps below the usual start",
                new_best,
            )
        if t.skip and not self.better(t.best, t.previous):
            s.skip, s.levels = t.skip - 1, list(t.previous_levels)
            s.search, s.last_improved = None, s.epoch
            return Decision(
                "commit_rate",
                f"the start {t.skip - 1} steps below the usual learning rate was better",
                new_best,
            )
        if t.skip + 1 < len(s.rates):
            s.search = Search(t.skip + 1, None, t.best, s.levels)
            s.cycle_start = s.last_improved = s.epoch
            s.running, s.levels, s.skip = None, [], t.skip + 1
            return Decision(
                "lower_rate",
                "trying a lower starting learning rate",
                new_best,
                skip=s.skip,
                rate=s.rates[s.skip] / s.rates[0],
            )
        s.search, s.last_improved = None, s.epoch
        return Decision("continue", "the lowest starting learning rate was the best", new_best)

    def better(self, score: float, other: float | None) -> bool:
        """Whether a score is better at all, without thresholds."""
        if math.isnan(score):
            return False
        return (
            other is None
            or math.isnan(other)
            or (score > other if self.rules.maximize else score < other)
        )

    def _conclude(self, new_best: bool) -> Decision:
        s, rules, k = self.state, self.rules, self.state.dendrites
        if s.best is None:
            return self._finish("no score so far was a number", new_best)
        if rules.testing_capacity:
            if k >= CAPACITY_DENDRITES:
                return self._finish(
                    f"capacity test passed with {k} dendrites; for the run itself switch it off: "
                    "GPA.pc.set_testing_dendrite_capacity(False), or "
                    "DendriteConfig(testing_capacity=False)",
                    new_best,
                )
            return self._start_generation("grow", "capacity test", new_best)
        if k == 0 or s.accepted or rules.retain_all:
            if k >= rules.max_dendrites:
                return self._finish(
                    f"the maximum of {rules.max_dendrites} dendrites is reached", new_best
                )
            return self._start_generation(
                "grow",
                "learning has stalled" if k == 0 else "the newest dendrites were kept",
                new_best,
            )
        tries = at(rules.max_tries, k)
        if s.tries < tries:
            return self._start_generation(
                "retry",
                f"the newest dendrites did not beat the best score; try {s.tries + 1} of {tries}",
                new_best,
            )
        s.dendrites -= 1  # the network goes back to what it was before
        return self._finish(f"dendrite {k} did not beat the best score in {tries} tries", new_best)

    def _start_generation(self, action: Action, reason: str, new_best: bool) -> Decision:
        s, rules = self.state, self.rules
        rollback = s.accepted or action == "retry"
        if s.first_cycle is None:
            s.first_cycle = s.epoch
        searching = (
            rules.find_best_lr
            and rules.mode == "joint"
            and isinstance(rules.switch, Patience)
            and not rules.testing_capacity
        )
        s.rates, s.skip = s.rates[: s.skip] + s.levels, 0
        s.search = Search() if searching and len(s.rates) > 1 else None
        s.tries = 1 if action == "grow" else s.tries + 1
        s.dendrites += action == "grow"
        s.cycle_start, s.levels = s.epoch, []
        s.accepted = s.warned = False
        s.running = s.cycle_best = None
        if rules.mode == "correlation":
            s.phase, s.candidate_best = "p", {}
        return Decision(action, reason, new_best, rollback)

    def _mature(self, reason: str) -> Decision:
        s = self.state
        s.phase, s.cycle_start, s.levels = "n", s.epoch, []
        return Decision("mature", reason)

    def _finish(self, reason: str, new_best: bool) -> Decision:
        self.state.finished = reason
        return Decision("finish", reason, new_best, rollback=self.state.best is not None)
