"""Dendrites in a Lightning Trainer.

module.net = dendritic(module.net, config)
Trainer(callbacks=[DendriteCallback(monitor="val_acc", config=config)]).fit(module)
"""

try:
    import lightning.pytorch as pl
except ImportError as error:
    raise ImportError(
        "the Lightning callback needs lightning; install it with: pip install 'pilimit[dendrites]'"
    ) from error

from typing import Any

from ..config import DendriteConfig
from ..growth import Growth, StepResult


class DendriteCallback(pl.Callback):
    """Feeds the monitored metric to a Growth after every validation epoch and stops the trainer
    when growth is finished.

    The module's first optimiser follows growth. ``restart``: after growth let
    ``configure_optimizers`` build optimisers and schedulers anew, which restarts the learning rate
    as the documented system does; else they go on as they are. Checkpoints of the trainer hold the
    growth's state; resume with the same callback and ``ckpt_path``.
    """

    def __init__(self, monitor: str, config: DendriteConfig | None = None, *, restart: bool = True):
        self.monitor, self.config, self.restart = monitor, config, restart
        self.growth: Growth | None = None
        self.last: StepResult | None = None
        self._loaded: dict[str, Any] | None = None

    def on_fit_start(self, trainer, pl_module) -> None:
        if self.growth is not None and self.growth.network is pl_module:
            return
        self.growth = Growth(pl_module, self.config)
        if self._loaded is not None:
            self.growth.load_progress(self._loaded)
            self._loaded = None

    def on_train_start(self, trainer, pl_module) -> None:
        self.growth.attach(_inner(trainer.optimizers[0]))

    def on_validation_end(self, trainer, pl_module) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        metrics = trainer.callback_metrics
        if self.monitor not in metrics:
            raise KeyError(
                f"monitor '{self.monitor}' was not logged; the module logged {sorted(metrics)}. "
                f"Call self.log('{self.monitor}', value) in validation_step"
            )
        self.last = self.growth.step(metrics[self.monitor].detach().cpu())
        if self.last.restructured and self.restart and not self.last.complete:
            trainer.strategy.setup_optimizers(trainer)
            self.growth.attach(_inner(trainer.optimizers[0]))
        if self.last.complete:
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        return {} if self.growth is None else self.growth.progress()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict or None
        if self.growth is not None and self._loaded is not None:
            self.growth.load_progress(self._loaded)
            self._loaded = None


def _inner(optimizer):
    """The torch optimiser inside Lightning's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
