"""Growth of a network while it learns: one call per epoch.

net = dendritic(net, config)
growth = Growth(net, config, optimizer=lambda ps: Adam(ps, 1e-3), scheduler=lambda o:
ReduceLROnPlateau(o, patience=5)) while not done:
    train_epoch(growth.model, growth.optimizer)
    done = growth.step(validate(growth.model)).complete
"""

import os
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from pilimit_lib.core import restore, snapshot

from . import distributed
from .config import DendriteConfig
from .conversion import dendritic_layers
from .decisions.plateau import Decision, Plateau
from .decisions.scores import as_score
from .layers.dimensions import DimensionError
from .run import epoch as journal
from .run import phases
from .run import state as resume
from .run.learning_rates import first_rate, initial_rates, restart_rates, scale_rates
from .run.packing import load_state, write
from .run.tables import Records


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


class Growth:
    """Watches the score of a dendritic network and grows it when learning stalls.

    ``optimizer``: a factory ``parameters -> Optimizer``, or an optimiser, which then follows every
    growth without restarts of its learning rate. ``scheduler``: a factory ``optimizer ->
    scheduler``, stepped here once per epoch (with the score, if it is a ReduceLROnPlateau) and
    built anew after growth. ``select``: ``network -> names`` of the layers to grow (default: all;
    see preview). ``wrap``: how to wrap the network for several processes; a model that is given
    wrapped in DDP is wrapped so again.
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
    ):
        self.network = distributed.unwrap(model)
        layers = [layer for _, layer in dendritic_layers(self.network)]
        if not layers:
            raise ValueError(
                f"{type(self.network).__name__} has no dendritic layers; call dendritic(model, "
                "config) first"
            )
        self.config = config or layers[0].config
        for layer in layers:
            layer.config = self.config
        if scheduler is not None and not callable(scheduler):
            raise TypeError(
                f"scheduler got a {type(scheduler).__name__}; give a factory: "
                f"lambda optimizer: {type(scheduler).__name__}(optimizer, ...)"
            )
        if scheduler is not None and (optimizer is None or isinstance(optimizer, Optimizer)):
            raise TypeError(
                "a scheduler factory needs an optimiser factory: optimizer=lambda parameters: "
                "Adam(parameters, lr)"
            )
        self.make_optimizer = None if isinstance(optimizer, Optimizer) else optimizer
        self.make_scheduler, self.select, self.wrap = scheduler, select, wrap
        self.plateau = Plateau(self.config)
        self.records = Records(self.config.save_dir if distributed.is_first() else None)
        self.seed = self.config.seed if self.config.seed is not None else phases.initial_seed()
        self.frozen = [name for name, p in self.network.named_parameters() if not p.requires_grad]
        self.best: dict | None = None
        self.base: dict | None = None
        self.trial: dict | None = None
        self.candidates: dict[str, dict] = {}
        self.pending: tuple[str, Any] | None = None
        self.optimizer: Optimizer | None = None
        self.scheduler: Any = None
        self._bookkeeping = 0.0
        self._packed: dict[int, tuple[dict, dict]] = {}
        self.restart_clock()
        self._model = model if wrap is None or model is not self.network else wrap(self.network)
        if isinstance(optimizer, Optimizer):
            self.optimizer = optimizer
        elif optimizer is not None:
            self._build()

    @property
    def model(self) -> nn.Module:
        """The network, wrapped for several processes if it was given so."""
        return self._model

    # --- the one call per epoch
    # ------------------------------------------------------------------------------------------------

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
        started = time.perf_counter()
        trained = (self._stopped or started) - self._clock
        self._raise_dimension_errors()
        score = distributed.agree([as_score(score)], self.config.reduce_scores, self._device())[0]
        if self.plateau.state.finished:
            return StepResult(self.model, False, True, self.plateau.state.finished, "finish")
        if self.pending is not None and self.pending[0] == "fresh":
            # nobody set up an optimiser after growth: the old one has followed and goes on
            self.pending = None
        before = self.plateau.state_dict()
        parameters, lr, correlation = self.parameter_count(), first_rate(self.optimizer), None
        try:
            if before["phase"] == "p":
                decision, correlation = self._observe_candidates(force)
            else:
                self._step_scheduler(score)
                decision = self.plateau.observe(
                    score,
                    first_rate(self.optimizer) if self.scheduler is not None else None,
                    force=force,
                )
            if decision.new_best:
                self.best = self.snapshot(plateau=self.plateau.at_best(before))
            result = self._act(decision)
        except Exception:
            self.plateau.load_state_dict(before)
            raise
        row = {
            "validation": score,
            "phase": before["phase"],
            "dendrites": before["dendrites"],
            "parameters": parameters,
            "learning_rate": lr,
            "train_seconds": trained,
            "bookkeeping_seconds": self._bookkeeping,
            "correlation": correlation,
            "new_best": decision.new_best,
        }
        journal.record(self, row, {"extra": extra, "test": test, **(also or {})}, decision)
        self.restart_clock()
        self._bookkeeping = self._clock - started
        return result

    def grow_now(self) -> StepResult:
        """Grow the network as it is, whatever the score."""
        decision = self.plateau.grow_now()
        result = self._act(decision)
        journal.record_switch(self, decision)
        return result

    def restart_clock(self) -> None:
        """Training time counts from now."""
        self._clock, self._stopped = time.perf_counter(), None

    def stop_clock(self) -> None:
        """Training time stops counting now."""
        self._stopped = time.perf_counter()

    def adopt(self, model: nn.Module) -> None:
        """Take over the wrapper that the caller uses around the same network."""
        if distributed.unwrap(model) is not self.network:
            raise ValueError(
                f"the model given ({type(model).__name__}) is not the network of this Growth"
            )
        self._model = model

    def reconfigure(self, config: DendriteConfig) -> None:
        """Change settings during the run; what the conversion already did stays."""
        if config.mode != self.config.mode and self.plateau.state.dendrites:
            raise ValueError(
                f"mode cannot change from '{self.config.mode}' to '{config.mode}' once the network "
                "has dendrites"
            )
        if config.save_dir != self.config.save_dir:
            raise ValueError(
                f"save_dir cannot change during a run ('{self.config.save_dir}' to "
                f"'{config.save_dir}')"
            )
        self.config = self.plateau.rules = config
        for _, layer in dendritic_layers(self.network):
            layer.config = config

    def _act(self, decision: Decision) -> StepResult:
        action, added, restructured = decision.action, (), decision.action != "continue"
        if action in ("grow", "retry"):
            if decision.rollback:
                self._restore(self.best)
            added = phases.add_dendrites(self, action)
            self._enter(restart=True)
            searching = self.plateau.state.search is not None or self.plateau.state.phase == "p"
            self.base, self.trial = (self.snapshot() if searching else None), None
        elif action == "lower_rate":
            self.trial = self.snapshot()
            self._restore(self.base)
            self.pending = ("rate", decision.rate)
            self._enter(restart=True)
        elif action == "commit_rate":
            self._restore(self.trial)
            self.pending, self.trial, self.base = ("state", self.trial), None, None
            self._enter(restart=False)
        elif action == "mature":
            phases.mature(self)
            self._enter(restart=True)
            self.base = None
        elif action == "finish":
            if decision.rollback:
                self._restore(self.best)
            self.base = self.trial = None
            self._enter(restart=False)
        elif self.plateau.state.search is None and self.plateau.state.phase == "n":
            self.base = self.trial = None
        return StepResult(
            self.model, restructured, action == "finish", decision.reason, action, added
        )

    def _observe_candidates(self, force: bool) -> tuple[Decision, float]:
        scores = phases.candidate_scores(self)
        return self.plateau.observe_candidates(scores, force=force), max(
            (max(v) for v in scores.values()), default=0.0
        )

    # --- optimiser and scheduler
    # ----------------------------------------------------------------------------------------------

    def attach(self, optimizer: Optimizer, scheduler: Any = None) -> None:
        """Work with this optimiser (and scheduler) from now on, at the learning rate or in the
        state that growth left pending."""
        self.optimizer, self.scheduler = optimizer, scheduler
        kind, value = self.pending or (None, None)
        self.pending = None
        if kind == "rate":
            scale_rates(optimizer, scheduler, value)
        elif kind == "state" and "optimizer" in value:
            extras = restore(self.network, value, optimizer)
            if scheduler is not None and extras.get("scheduler") is not None:
                scheduler.load_state_dict(extras["scheduler"])
        if kind != "state":
            self.plateau.start_rate(first_rate(optimizer) if scheduler is not None else None)

    @property
    def starts_anew(self) -> bool:
        """Whether the next optimiser attached begins as it was built, not at a rate or in a state
        that growth left pending."""
        return self.pending is None or self.pending[0] == "fresh"

    def _build(self) -> None:
        """Optimiser and scheduler from their factories, over what is trainable now."""
        optimizer = self.make_optimizer([p for p in self.network.parameters() if p.requires_grad])
        self._initial = initial_rates(optimizer)
        self.attach(
            optimizer, self.make_scheduler(optimizer) if self.make_scheduler is not None else None
        )

    def _enter(self, restart: bool) -> None:
        """After a change of the network: flags for the phase, the same weights everywhere, the
        wrapper, learning rates."""
        phases.set_trainable(self)
        distributed.synchronise(self.network)
        for _, layer in dendritic_layers(self.network):
            layer.clear_processors()
        self.wrap_again()
        if self.make_optimizer is None:
            if restart and self.pending is None and self.optimizer is not None:
                self.pending = ("fresh", None)
            return
        if not restart:
            self.attach(
                self.optimizer,
                self.make_scheduler(self.optimizer) if self.make_scheduler is not None else None,
            )
        elif self.config.optimizer_state == "reset":
            self._build()
        else:
            restart_rates(self.optimizer, self._initial)
            self.attach(
                self.optimizer,
                self.make_scheduler(self.optimizer) if self.make_scheduler is not None else None,
            )

    def wrap_again(self) -> None:
        """The network in the wrapper for several processes, which must be built anew when
        parameters have changed."""
        self._model = (
            self.wrap(self.network)
            if self.wrap is not None
            else distributed.rewrap(self._model, self.network)
        )

    def _step_scheduler(self, score: float) -> None:
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(score)
        elif self.scheduler is not None:
            self.scheduler.step()

    # --- checkpoints
    # ----------------------------------------------------------------------------------------------------------

    def snapshot(self, **extras: Any) -> dict:
        """The network, its optimiser and scheduler, as plain tensors and builtins."""
        scheduler = (
            None if self.scheduler is None else resume.plain_state(self.scheduler.state_dict())
        )
        return snapshot(self.network, self.optimizer, scheduler=scheduler, **extras)

    def _restore(self, state: dict) -> None:
        restore(self.network, state, self.optimizer if "optimizer" in state else None)

    def state_dict(self) -> dict:
        """The whole run: network, optimiser, scheduler, decisions so far, what it may go back to,
        random states, records."""
        return resume.state_of(self)

    def load_state_dict(self, state: dict) -> None:
        """Go back to a state_dict(); on any error network and optimiser are left as they were."""
        resume.take_up(self, state)

    def load_best(self, state: dict) -> None:
        """Begin from the best network that a run wrote (best_model.pt), with the decisions up to
        then."""
        resume.take_up_best(self, state)

    def progress(self) -> dict:
        """Everything of state_dict() but the network and optimiser as they are now: for trainers
        that save those themselves."""
        state = self.state_dict()
        return {key: value for key, value in state.items() if key not in ("now", "rng")}

    def load_progress(self, state: dict) -> None:
        """Take up what progress() gave, for a network that the trainer has restored."""
        self.load_state_dict({**state, "now": None, "rng": None})

    def save(self, path: str | os.PathLike) -> None:
        """Write the whole run to a file (rank 0 writes, all wait); load() in a fresh process
        continues identically."""
        state = self.state_dict()
        if distributed.is_first():
            write(path, resume.encoded(self, state))
        distributed.wait()

    def load(self, path: str | os.PathLike) -> None:
        """Continue a run from a file; the network must be built and converted with the same
        arguments."""
        self.load_state_dict(load_state(path))

    # --- records
    # --------------------------------------------------------------------------------------------------------------

    def parameter_count(self) -> int:
        """Parameters of the network as it is now, frozen ones too, shared ones once."""
        return sum(p.numel() for p in self.network.parameters())

    # --- checks
    # ---------------------------------------------------------------------------------------------------------------

    def _raise_dimension_errors(self) -> None:
        problems = [
            layer.dimension_error
            for _, layer in dendritic_layers(self.network)
            if layer.dimension_error is not None
        ]
        if problems:
            for _, layer in dendritic_layers(self.network):
                layer.dimension_error = None
            raise DimensionError(
                f"{len(problems)} layers have wrong dimensions:\n"
                + "\n".join(f"  {p}" for p in problems)
            )

    def _device(self):
        return next((p.device for p in self.network.parameters()), None)
