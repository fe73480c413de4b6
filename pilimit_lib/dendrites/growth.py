"""Growth of a network while it learns: one call per epoch.

net = dendritic(net, config)
growth = Growth(net, config, optimizer=lambda ps: Adam(ps, 1e-3),
                scheduler=lambda o: ReduceLROnPlateau(o, patience=5))
while not done:
    train_epoch(growth.model, growth.optimizer)
    done = growth.step(validate(growth.model)).complete
"""

import os
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from . import distributed
from .config import DendriteConfig
from .conversion import dendritic_layers
from .decisions.plateau import Decision, as_score
from .layers.dimensions import raise_dimension_errors
from .run import epoch, optimizers, phases, state
from .run.learning_rates import first_rate, initial_rates, restart_rates
from .run.packing import load_state, save_state
from .run.run import Run


@dataclass(frozen=True)
class StepResult:
    """What an epoch led to. After ``restructured`` use ``model`` and the growth's ``optimizer``
    anew; after ``complete`` the best network is in."""

    model: nn.Module
    restructured: bool
    complete: bool
    reason: str
    action: str
    added: tuple[str, ...] = ()


class Growth(Run):
    """Watches the score of a dendritic network and grows it when learning stalls.

    ``optimizer``: a factory ``parameters -> Optimizer``, or an optimiser, which then follows every
    growth without restarts of its learning rate. ``scheduler``: a factory ``optimizer ->
    scheduler``, stepped here once per epoch (with the score, if it is a ReduceLROnPlateau) and
    built anew after growth. ``select``: ``network -> names`` of the layers to grow (default: all;
    see preview). ``wrap``: how to wrap the network for several processes; a model that is given
    wrapped in DDP is wrapped so again. ``average``: a moving average of the network's weights,
    which begins anew from the network as it is after every change of it. ``losses``: ``network ->
    losses`` of some training batches, for dendrites that begin by gradient
    (DendriteConfig(init="gradient")); they are looked at, nothing is trained.
    """

    def __init__(
        self,
        model: nn.Module,
        config: DendriteConfig | None = None,
        *,
        optimizer: Optimizer | Callable[[list], Optimizer] | None = None,
        scheduler: Callable[[Optimizer], Any] | None = None,
        select: Callable[[nn.Module], Collection[str]] | None = None,
        wrap: Callable[[nn.Module], nn.Module] | None = None,
        average: AveragedModel | None = None,
        losses: Callable[[nn.Module], Iterable[Tensor]] | None = None,
    ):
        network = distributed.unwrap(model)
        layers = [layer for _, layer in dendritic_layers(network)]
        if not layers:
            raise ValueError(
                f"{type(network).__name__} has no dendritic layers; call dendritic(model, config) "
                "first"
            )
        if scheduler is not None and not callable(scheduler):
            raise TypeError(
                f"scheduler got a {type(scheduler).__name__}; give a factory: "
                f"lambda optimizer: {type(scheduler).__name__}(optimizer, ...)"
            )
        given = isinstance(optimizer, Optimizer)
        if scheduler is not None and (optimizer is None or given):
            raise TypeError(
                "a scheduler factory needs an optimiser factory: optimizer=lambda parameters: "
                "Adam(parameters, lr)"
            )
        config = config or layers[0].config
        _check_losses(config, losses)
        for layer in layers:
            layer.config = config
        super().__init__(model, config, select, wrap, losses)
        self.make_optimizer = None if given else optimizer
        self.make_scheduler = scheduler
        if average is not None:
            self.follow_average(average)
        if given:
            self.optimizer = optimizer
        elif optimizer is not None:
            self._build()

    def step(
        self,
        score: float,
        *,
        extra: dict[str, float] | None = None,
        test: dict[str, float] | float | None = None,
        also: dict[str, dict[str, float]] | None = None,
        force: bool = False,
    ) -> StepResult:
        """Take the validation score of an epoch, and grow, retry, go back or finish where the rules
        say so.

        ``extra`` and ``test`` scores are recorded and drawn beside it, ``also`` (kinds of numbers
        by name) is recorded only. ``force`` acts as if the patience had run out.
        """
        started, trained = time.perf_counter(), self.trained_seconds()
        raise_dimension_errors(layer for _, layer in dendritic_layers(self.network))
        phases.name_bypassed(self)
        score = distributed.agree([as_score(score)], self.config.reduce_scores, self.device)[0]
        if self.plateau.state.finished:
            return StepResult(self.model, False, True, self.plateau.state.finished, "finish")
        if self.pending is not None and self.pending[0] == "fresh":
            # nobody set up an optimiser after growth: the old one has followed and goes on
            self.pending = None
        before = self.plateau.state_dict()
        row = {
            "validation": score,
            "phase": before["phase"],
            "dendrites": before["dendrites"],
            "parameters": self.parameter_count(),
            "learning_rate": first_rate(self.optimizer),
            "train_seconds": trained,
            "bookkeeping_seconds": self.bookkeeping,
            "correlation": None,
        }
        try:
            if before["phase"] == "p":
                scores = phases.candidate_scores(self)
                row["correlation"] = max((max(v) for v in scores.values()), default=0.0)
                decision = self.plateau.observe_candidates(scores, force=force)
            else:
                optimizers.step_scheduler(self.scheduler, score)
                lr = None if self.scheduler is None else first_rate(self.optimizer)
                decision = self.plateau.observe(score, lr, force=force)
            if decision.new_best:
                self.best = self.snapshot(plateau=self.plateau.at_best(before))
            result = self._act(decision)
        except Exception:
            self.plateau.load_state_dict(before)
            raise
        row["new_best"] = decision.new_best
        epoch.record(self, row, {"extra": extra, "test": test, **(also or {})}, decision)
        self.restart_clock()
        self.bookkeeping = self._clock - started
        return result

    def grow_now(self) -> StepResult:
        """Grow the network as it is, whatever the score."""
        before = self.plateau.state_dict()
        try:
            decision = self.plateau.grow_now()
            result = self._act(decision)
        except Exception:
            self.plateau.load_state_dict(before)
            raise
        epoch.record_switch(self, decision)
        return result

    def reconfigure(self, config: DendriteConfig) -> None:
        """Change settings during the run; what the conversion already did stays."""
        if config.mode != self.config.mode and self.plateau.state.dendrites:
            raise ValueError(
                f"mode cannot change from '{self.config.mode}' to '{config.mode}' once the network "
                "has dendrites"
            )
        _check_losses(config, self.losses)
        if config.save_dir != self.config.save_dir:
            raise ValueError(
                f"save_dir cannot change during a run ('{self.config.save_dir}' to "
                f"'{config.save_dir}')"
            )
        self.config = self.plateau.rules = config
        for _, layer in dendritic_layers(self.network):
            layer.config = config

    def _act(self, decision: Decision) -> StepResult:
        action, added = decision.action, ()
        if action in ("grow", "retry"):
            if decision.rollback:
                self.restore(self.best)
            added = phases.add_dendrites(self)
            self._enter(restart=True)
            searching = self.plateau.state.search is not None or self.plateau.state.phase == "p"
            self.base, self.trial = (self.snapshot() if searching else None), None
        elif action == "lower_rate":
            self.trial = self.snapshot()
            self.restore(self.base)
            self.pending = ("rate", decision.rate)
            self._enter(restart=True)
        elif action == "commit_rate":
            self.restore(self.trial)
            self.pending = ("state", self.trial)
            self.base = self.trial = None
            self._enter(restart=False)
        elif action == "mature":
            phases.mature(self)
            self._enter(restart=True)
            self.base = None
        elif action == "finish":
            if decision.rollback:
                self.restore(self.best)
            self.base = self.trial = None
            self._enter(restart=False)
        elif self.plateau.state.search is None and self.plateau.state.phase == "n":
            self.base = self.trial = None
        complete, restructured = action == "finish", action != "continue"
        return StepResult(self.model, restructured, complete, decision.reason, action, added)

    def attach(self, optimizer: Optimizer, scheduler: Any = None) -> None:
        """Work with this optimiser (and scheduler) from now on, at the learning rate or in the
        state that growth left pending."""
        optimizers.attach(self, optimizer, scheduler)

    def _build(self) -> None:
        """Optimiser and scheduler from their factories, over what is trainable now."""
        optimizer = self.make_optimizer([p for p in self.network.parameters() if p.requires_grad])
        self._initial = initial_rates(optimizer)
        self._attach_with_scheduler(optimizer)

    def _attach_with_scheduler(self, optimizer: Optimizer) -> None:
        self.attach(optimizer, self.make_scheduler(optimizer) if self.make_scheduler else None)

    def _enter(self, restart: bool) -> None:
        """After a change of the network: flags for the phase, the same weights everywhere, the
        wrapper, learning rates."""
        phases.set_trainable(self)
        distributed.synchronise(self.network)
        for _, layer in dendritic_layers(self.network):
            layer.clear_processors()
        self.wrap_again()
        self.restart_average()
        if self.make_optimizer is None:
            if restart and self.pending is None and self.optimizer is not None:
                self.pending = ("fresh", None)
        elif restart and self.config.optimizer_state == "reset":
            self._build()
        else:
            if restart:
                restart_rates(self.optimizer, self._initial)
            self._attach_with_scheduler(self.optimizer)

    def state_dict(self) -> dict:
        """The whole run: network, optimiser, scheduler, decisions so far, what it may go back to,
        random states, records."""
        return state.state_of(self)

    def load_state_dict(self, saved: dict) -> None:
        """Go back to a state_dict(); on any error network and optimiser are left as they were."""
        state.take_up(self, saved)

    def load_best(self, saved: dict) -> None:
        """Begin from the best network that a run wrote (best_model.pt), with the decisions up to
        then."""
        state.take_up_best(self, saved)
        self._enter(restart=False)

    def progress(self) -> dict:
        """Everything of state_dict() but the network and optimiser as they are now: for trainers
        that save those themselves."""
        return {k: v for k, v in self.state_dict().items() if k not in ("now", "rng")}

    def load_progress(self, saved: dict) -> None:
        """Take up what progress() gave, for a network that the trainer has restored."""
        self.load_state_dict({**saved, "now": None, "rng": None})

    def save(self, path: str | os.PathLike) -> None:
        """Write the whole run to a file (rank 0 writes, all wait); load() in a fresh process
        continues identically."""
        saved = self.state_dict()
        if distributed.is_first():
            save_state(saved, path)
        distributed.wait()

    def load(self, path: str | os.PathLike) -> None:
        """Continue a run from a file that it wrote, or begin from the best network that it wrote;
        the network must be built and converted with the same arguments."""
        saved = load_state(path)
        if "plateau" not in saved and "structure" in saved:
            self.load_best(saved)
            return
        self.load_state_dict(saved)
        folder = self.config.save_dir
        if folder is not None and Path(folder).resolve() == Path(path).resolve().parent:
            self.stored = {k: (saved[k], place) for k, place in saved.get("references", {}).items()}


def _check_losses(config: DendriteConfig, losses: Callable | None) -> None:
    if config.init == "gradient" and losses is None:
        raise ValueError(
            'init="gradient" looks at errors before it grows: give Growth(losses=lambda net: '
            "(F.cross_entropy(net(x), y) for x, y in batches)), the losses of some training "
            'batches, or begin with init="standardised"'
        )
