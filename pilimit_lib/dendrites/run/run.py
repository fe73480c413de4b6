"""The state of a growing network: what it is now, what it may go back to, what was decided."""

import time
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from ...core import restore, snapshot
from .. import distributed
from ..config import DendriteConfig
from ..decisions.plateau import Plateau
from .tables import RunTables


class Run:
    """What operations on a run read and change; Growth is the user's face of it.

    ``best``: the best network so far; ``base`` and ``trial``: where a search for the learning rate
    starts from, and the end of its last trial; ``candidates``: the best weights of each candidate
    in a correlation phase. ``pending``: what the next optimiser that is attached begins with,
    ("rate", share), ("state", snapshot) or ("fresh", None).
    """

    def __init__(
        self,
        model: nn.Module,
        config: DendriteConfig,
        select: Callable[[nn.Module], Collection[str]] | None,
        wrap: Callable[[nn.Module], nn.Module] | None,
        losses: Callable[[nn.Module], Iterable[Tensor]] | None = None,
    ):
        self.network = distributed.unwrap(model)
        self.config, self.select, self.wrap = config, select, wrap
        self.losses = losses
        self.plateau = Plateau(config)
        self.records = RunTables(config.save_dir if distributed.is_first() else None)
        self.seed = distributed.initial_seed() if config.seed is None else config.seed
        self.frozen = [name for name, p in self.network.named_parameters() if not p.requires_grad]
        self.best: dict | None = None
        self.base: dict | None = None
        self.trial: dict | None = None
        self.candidates: dict[str, dict] = {}
        self.pending: tuple[str, Any] | None = None
        self.optimizer: Optimizer | None = None
        self.scheduler: Any = None
        self.average: AveragedModel | None = None
        self.bypassed: set[str] = set()  # layers that were named as such
        self.bookkeeping = 0.0
        # best, base, trial where a file of the folder holds them: the part, and a reference to it
        self.stored: dict[str, tuple[dict, list]] = {}
        self.restart_clock()
        self._model = model if wrap is None or model is not self.network else wrap(self.network)

    @property
    def model(self) -> nn.Module:
        """The network, wrapped for several processes if it was given so."""
        return self._model

    @property
    def starts_anew(self) -> bool:
        """Whether the next optimiser attached begins as it was built, not at a rate or in a state
        that growth left pending."""
        return self.pending is None or self.pending[0] == "fresh"

    def adopt(self, model: nn.Module) -> None:
        """Take over the wrapper that the caller uses around the same network."""
        if distributed.unwrap(model) is not self.network:
            raise ValueError(
                f"the model given ({type(model).__name__}) is not the network of this Growth"
            )
        self._model = model

    def wrap_again(self) -> None:
        """The network in the wrapper for several processes, which must be built anew when
        parameters have changed."""
        if self.wrap is not None:
            self._model = self.wrap(self.network)
        else:
            self._model = distributed.rewrap(self._model, self.network)

    def follow_average(self, average: AveragedModel) -> None:
        """Let a moving average of the network's weights begin anew at every change of it; it would
        go on with the weights of a smaller network, or of one that was left."""
        if not isinstance(average, AveragedModel):
            raise TypeError(
                f"the average is a {type(average).__name__}; give "
                "torch.optim.swa_utils.AveragedModel(network, ...)"
            )
        self.average = average

    def restart_average(self) -> None:
        """The average is the network as it is now."""
        if self.average is not None:
            distributed.unwrap(self.average.module).load_state_dict(self.network.state_dict())
            self.average.n_averaged.zero_()

    def snapshot(self, **extras: Any) -> dict:
        """The network, its optimiser and scheduler, as plain tensors and builtins."""
        scheduler = None if self.scheduler is None else _plain(self.scheduler.state_dict())
        return snapshot(self.network, self.optimizer, scheduler=scheduler, **extras)

    def restore(self, state: dict) -> dict:
        """Bring network and optimiser to a snapshot; returns its extras."""
        return restore(self.network, state, self.optimizer if "optimizer" in state else None)

    def restart_clock(self) -> None:
        """Training time counts from now."""
        self._clock, self._stopped = time.perf_counter(), None

    def stop_clock(self) -> None:
        """Training time stops counting now."""
        self._stopped = time.perf_counter()

    def trained_seconds(self) -> float:
        """Training time since the clock was restarted."""
        return (self._stopped or time.perf_counter()) - self._clock

    def parameter_count(self) -> int:
        """Parameters of the network as it is now, frozen ones too, shared ones once."""
        return sum(p.numel() for p in self.network.parameters())

    @property
    def device(self) -> torch.device | None:
        return next((p.device for p in self.network.parameters()), None)


def _plain(value: Any) -> Any:
    """State of a scheduler without what a checkpoint must not hold: functions, and references to
    the optimiser."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items() if not callable(v)}
    if isinstance(value, (str, bytes)) or hasattr(value, "shape"):
        return value
    if hasattr(value, "__iter__"):
        return [_plain(v) for v in value if not callable(v)]
    return value
