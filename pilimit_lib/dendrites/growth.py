"""Growth of a network while it learns: one call per epoch.

    net = dendritic(net, config)
    growth = Growth(net, config, optimizer=lambda ps: Adam(ps, 1e-3), scheduler=lambda o: ReduceLROnPlateau(o, patience=5))
    while not done:
        train_epoch(growth.model, growth.optimizer)
        done = growth.step(validate(growth.model)).complete
"""

import math
import os
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from pilimit_lib.core import restore, rng_state, set_rng_state, snapshot

from . import distributed, phases
from .config import DendriteConfig
from .convert import dendritic_layers
from .dimensions import DimensionError
from .files import load_state, save_state
from .plateau import Decision, Plateau
from .rates import first_rate, initial_rates, restart_rates, scale_rates
from .records import Records


@dataclass(frozen=True)
class StepResult:
    """What an epoch led to. After ``restructured`` use ``model`` and the growth's ``optimizer`` anew; after ``complete`` the best network is in."""

    model: nn.Module
    restructured: bool
    complete: bool
    reason: str
    action: str
    added: tuple[str, ...] = ()


class Growth:
    """Watches the score of a dendritic network and grows it when learning stalls.

    ``optimizer``: a factory ``parameters -> Optimizer``, or an optimiser, which then follows every growth without restarts of its
    learning rate. ``scheduler``: a factory ``optimizer -> scheduler``, stepped here once per epoch (with the score, if it is a
    ReduceLROnPlateau) and built anew after growth. ``select``: ``network -> names`` of the layers to grow (default: all; see
    preview). ``wrap``: how to wrap the network for several processes; a model that is given wrapped in DDP is wrapped so again.
    """

    def __init__(self, model: nn.Module, config: DendriteConfig | None = None, *,
                 optimizer: Optimizer | Callable[[list], Optimizer] | None = None, scheduler: Callable[[Optimizer], Any] | None = None,
                 select: Callable[[nn.Module], Collection[str]] | None = None, wrap: Callable[[nn.Module], nn.Module] | None = None):
        self.network = distributed.unwrap(model)
        layers = [layer for _, layer in dendritic_layers(self.network)]
        if not layers:
            raise ValueError(f"{type(self.network).__name__} has no dendritic layers; call dendritic(model, config) first")
        self.config = config or layers[0].config
        for layer in layers:
            layer.config = self.config
        if scheduler is not None and not callable(scheduler):
            raise TypeError(f"scheduler got a {type(scheduler).__name__}; give a factory: lambda optimizer: {type(scheduler).__name__}(optimizer, ...)")
        if scheduler is not None and (optimizer is None or isinstance(optimizer, Optimizer)):
            raise TypeError("a scheduler factory needs an optimiser factory: optimizer=lambda parameters: Adam(parameters, lr)")
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

    # --- the one call per epoch ------------------------------------------------------------------------------------------------

    def step(self, score: float, *, extra: dict[str, float] | None = None, test: dict[str, float] | float | None = None,
             also: dict[str, dict[str, float]] | None = None, force: bool = False) -> StepResult:
        """Take the validation score of an epoch, and grow, retry, go back or finish where the rules say so.

        ``extra`` and ``test`` scores are recorded and drawn beside it, ``also`` (kinds of numbers by name) is recorded only.
        ``force`` acts as if the patience had run out.
        """
        started = time.perf_counter()
        trained = (self._stopped or started) - self._clock
        self._raise_dimension_errors()
        score = distributed.agree([as_score(score)], self.config.reduce_scores, self._device())[0]
        if self.plateau.state.finished:
            return StepResult(self.model, False, True, self.plateau.state.finished, "finish")
        before = self.plateau.state_dict()
        phase, dendrites, parameters = before["phase"], before["dendrites"], self.parameter_count()
        lr, correlation = first_rate(self.optimizer), None
        try:
            if phase == "p":
                decision, correlation = self._observe_candidates(force)
            else:
                self._step_scheduler(score)
                decision = self.plateau.observe(score, first_rate(self.optimizer) if self.scheduler is not None else None, force=force)
            if decision.new_best:
                s = self.plateau.state
                self.best = self.snapshot(plateau={**before, "epoch": s.epoch, "best": s.best, "best_epoch": s.best_epoch, "accepted": True,
                                                   "last_improved": s.epoch, "search": None, "finished": ""})
            result = self._act(decision)
        except Exception:
            self.plateau.load_state_dict(before)
            raise
        s = self.plateau.state
        row = {"epoch": s.epoch, "validation": score, "running": s.running if s.running is not None else score, "best": s.best, "phase": phase,
               "learning_rate": lr, "parameters": parameters, "dendrites": dendrites, "train_seconds": trained, "correlation": correlation,
               "new_best": decision.new_best, "bookkeeping_seconds": self._bookkeeping}
        self._record(row, {"extra": extra, "test": test, **(also or {})}, decision)
        self.restart_clock()
        self._bookkeeping = self._clock - started
        return result

    def grow_now(self) -> StepResult:
        """Grow the network as it is, whatever the score."""
        decision = self.plateau.grow_now()
        result = self._act(decision)
        self._record_switch(decision)
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
            raise ValueError(f"the model given ({type(model).__name__}) is not the network of this Growth")
        self._model = model

    def reconfigure(self, config: DendriteConfig) -> None:
        """Change settings during the run; what the conversion already did stays."""
        if config.mode != self.config.mode and self.plateau.state.dendrites:
            raise ValueError(f"mode cannot change from '{self.config.mode}' to '{config.mode}' once the network has dendrites")
        if config.save_dir != self.config.save_dir:
            raise ValueError(f"save_dir cannot change during a run ('{self.config.save_dir}' to '{config.save_dir}')")
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
        return StepResult(self.model, restructured, action == "finish", decision.reason, action, added)

    def _observe_candidates(self, force: bool) -> tuple[Decision, float]:
        scores = phases.candidate_scores(self)
        return self.plateau.observe_candidates(scores, force=force), max((max(v) for v in scores.values()), default=0.0)

    # --- optimiser and scheduler ----------------------------------------------------------------------------------------------

    def attach(self, optimizer: Optimizer, scheduler: Any = None) -> None:
        """Work with this optimiser (and scheduler) from now on, at the learning rate or in the state that growth left pending."""
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

    def _build(self) -> None:
        """Optimiser and scheduler from their factories, over what is trainable now."""
        optimizer = self.make_optimizer([p for p in self.network.parameters() if p.requires_grad])
        self._initial = initial_rates(optimizer)
        self.attach(optimizer, self.make_scheduler(optimizer) if self.make_scheduler is not None else None)

    def _enter(self, restart: bool) -> None:
        """After a change of the network: flags for the phase, the same weights everywhere, the wrapper, learning rates."""
        phases.set_trainable(self)
        distributed.synchronise(self.network)
        for _, layer in dendritic_layers(self.network):
            layer.clear_processors()
        self._model = self.wrap(self.network) if self.wrap is not None else distributed.rewrap(self._model, self.network)
        if self.make_optimizer is None:
            return
        if not restart:
            self.attach(self.optimizer, self.make_scheduler(self.optimizer) if self.make_scheduler is not None else None)
        elif self.config.optimizer_state == "reset":
            self._build()
        else:
            restart_rates(self.optimizer, self._initial)
            self.attach(self.optimizer, self.make_scheduler(self.optimizer) if self.make_scheduler is not None else None)

    def _step_scheduler(self, score: float) -> None:
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(score)
        elif self.scheduler is not None:
            self.scheduler.step()

    # --- checkpoints ----------------------------------------------------------------------------------------------------------

    def snapshot(self, **extras: Any) -> dict:
        """The network, its optimiser and scheduler, as plain tensors and builtins."""
        scheduler = None if self.scheduler is None else plain_state(self.scheduler.state_dict())
        return snapshot(self.network, self.optimizer, scheduler=scheduler, **extras)

    def _restore(self, state: dict) -> None:
        restore(self.network, state, self.optimizer if "optimizer" in state else None)

    def state_dict(self, now: dict | None = None) -> dict:
        """The whole run: network, optimiser, scheduler, decisions so far, what it may go back to, random states, records."""
        for _, layer in dendritic_layers(self.network):
            layer.clear_processors()
        kind, value = self.pending or (None, None)
        return {"now": self.snapshot() if now is None else now, "best": self.best, "base": self.base, "trial": self.trial, "candidates": self.candidates,
                "pending": [kind, value], "plateau": self.plateau.state_dict(), "seed": self.seed, "frozen": list(self.frozen),
                "records": self.records.state_dict(), "rng": rng_state()}

    def load_state_dict(self, state: dict) -> None:
        """Go back to a state_dict(); on any error network and optimiser are left as they were."""
        if not isinstance(state, dict) or not {"now", "plateau", "best", "seed"} <= set(state):
            raise ValueError("not the state of a Growth; pass what growth.state_dict() returned, or growth.load(path)")
        now = state["now"]
        if now is not None and self.optimizer is not None and "optimizer" not in now:
            raise ValueError("the run was saved without an optimiser; build this Growth without one too, and attach it afterwards")
        plateau = Plateau(self.config)
        plateau.load_state_dict(state["plateau"])
        extras = restore(self.network, now, self.optimizer) if now is not None else {}
        self.plateau, self.seed, self.frozen = plateau, state["seed"], list(state["frozen"])
        self.best, self.base, self.trial, self.candidates = state["best"], state["base"], state["trial"], dict(state["candidates"])
        kind, value = state["pending"]
        self.pending = (kind, value) if kind is not None else None
        if now is not None and self.optimizer is None and "optimizer" in now:
            self.pending = ("state", now)
        phases.set_trainable(self)
        self._model = self.wrap(self.network) if self.wrap is not None else distributed.rewrap(self._model, self.network)
        if self.scheduler is not None and extras.get("scheduler") is not None:
            self.scheduler.load_state_dict(extras["scheduler"])
        self.records.load_state_dict(state["records"])
        if state["rng"] is not None:
            set_rng_state(state["rng"])
        self.restart_clock()

    def load_best(self, state: dict) -> None:
        """Begin from the best network that a run wrote (best_model.pt), with the decisions up to then."""
        restore(self.network, state, self.optimizer if "optimizer" in state else None)
        if "plateau" in state["extras"]:
            self.plateau.load_state_dict(state["extras"]["plateau"])
            self.best = state
        if self.optimizer is None and "optimizer" in state:
            self.pending = ("state", state)
        self._enter(restart=False)

    def progress(self) -> dict:
        """Everything of state_dict() but the network and optimiser as they are now: for trainers that save those themselves."""
        state = self.state_dict()
        return {key: value for key, value in state.items() if key not in ("now", "rng")}

    def load_progress(self, state: dict) -> None:
        """Take up what progress() gave, for a network that the trainer has restored."""
        self.load_state_dict({**state, "now": None, "rng": None})

    def save(self, path: str | os.PathLike) -> None:
        """Write the whole run to a file (rank 0 writes, all wait); load() in a fresh process continues identically."""
        state = self.state_dict()
        if distributed.is_first():
            save_state(state, path)
        distributed.wait()

    def load(self, path: str | os.PathLike) -> None:
        """Continue a run from a file; the network must be built and converted with the same arguments."""
        self.load_state_dict(load_state(path))

    # --- records --------------------------------------------------------------------------------------------------------------

    def parameter_count(self) -> int:
        """Parameters of the network as it is now, frozen ones too, shared ones once."""
        return sum(p.numel() for p in self.network.parameters())

    def _record(self, row: dict, extras: dict, decision: Decision) -> None:
        named = {kind: ({kind: float(v)} if not isinstance(v, dict) else {k: float(x) for k, x in v.items()})
                 for kind, v in extras.items() if v is not None}
        if distributed.is_first():
            self.records.epoch(row, named, self.plateau.better)
            switched = decision.action != "continue"
            if switched:
                self._record_switch(decision)
            if self.config.save_dir is not None:
                self._write(Path(self.config.save_dir), decision, switched)
        distributed.wait()

    def _record_switch(self, decision: Decision) -> None:
        state = self.plateau.state
        self.records.switch({"epoch": state.epoch, "action": decision.action, "dendrites": state.dendrites, "reason": decision.reason})

    def _write(self, folder: Path, decision: Decision, switched: bool) -> None:
        how, k = self.config.checkpoints, self.plateau.state.dendrites
        if decision.new_best and how != "never":
            save_state(self.best, folder / "best_model.pt")
        if switched and how != "never":
            if decision.action in ("grow", "retry") and self.best is not None:
                save_state(self.best, folder / f"beforeSwitch_{k - 1}.pt")
                save_state(self.snapshot(), folder / f"switch_{k}.pt")
            elif decision.action == "lower_rate":
                save_state(self.trial, folder / f"PBCount_{k}_startSteps_{decision.skip - 1}.pt")
        if how == "epoch" or (how == "switch" and switched):
            unchanged = self.best if decision.new_best and not switched else None  # the network is what was just kept as the best
            save_state(self.state_dict(unchanged), folder / "latest.pt")
        pictures = {"never": False, "epoch": True, "switch": decision.action in ("grow", "finish")}[self.config.graphs]
        if pictures:
            from .picture import draw
            draw(self.records.rows, folder / f"{folder.name}.png")

    # --- checks ---------------------------------------------------------------------------------------------------------------

    def _raise_dimension_errors(self) -> None:
        problems = [layer.dimension_error for _, layer in dendritic_layers(self.network) if layer.dimension_error is not None]
        if problems:
            for _, layer in dendritic_layers(self.network):
                layer.dimension_error = None
            raise DimensionError(f"{len(problems)} layers have wrong dimensions:\n" + "\n".join(f"  {p}" for p in problems))

    def _device(self):
        return next((p.device for p in self.network.parameters()), None)


def as_score(score) -> float:
    """A score as a Python number; numbers, numpy numbers and tensors of one element will do."""
    if isinstance(score, bool) or isinstance(score, (str, bytes)):
        raise TypeError(f"the score is {score!r} ({type(score).__name__}); give one number, such as the validation accuracy")
    try:
        value = float(score)
    except (TypeError, ValueError, RuntimeError):
        shape = f" of shape {list(score.shape)}" if hasattr(score, "shape") else ""
        raise TypeError(f"the score is a {type(score).__name__}{shape}; give one number, such as the validation accuracy") from None
    if math.isinf(value):
        raise ValueError(f"the score is {value}; give a finite number (nan counts as no improvement)")
    return value


def plain_state(value: Any) -> Any:
    """State of a scheduler without what a checkpoint must not hold: functions, and references to the optimiser."""
    if isinstance(value, dict):
        return {k: plain_state(v) for k, v in value.items() if not callable(v)}
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes)) and not hasattr(value, "shape"):
        return [plain_state(v) for v in value if not callable(v)]
    return value
