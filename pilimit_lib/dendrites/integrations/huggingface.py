"""Dendrites in a Hugging Face Trainer.

model = dendritic(AutoModelForSequenceClassification.from_config(config), dendrite_config)
Trainer(model, args, callbacks=[DendriteCallback("eval_accuracy", dendrite_config)], ...).train()
"""

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(
        "the Hugging Face callback needs transformers; install it with: pip install "
        "'pilimit[dendrites]'"
    ) from error

import os
from pathlib import Path

from ..config import DendriteConfig
from ..growth import Growth, StepResult
from ..run.packing import load_state, save_state

FILE = "dendrites.pt"


class DendriteCallback(TrainerCallback):
    """Feeds a metric of every evaluation to a Growth; the trainer's optimiser follows, and training
    stops when growth is finished.

    Set ``eval_strategy="epoch"``. The trainer owns the learning rate: its schedule goes on through
    growth. Each of its checkpoints gets the state of growth beside the rest; resume with a freshly
    converted model and ``trainer.train(resume_from_checkpoint=...)``. ``resume_from``: that folder,
    where it is not one of the trainer's own ``output_dir``.
    """

    def __init__(
        self,
        metric: str,
        config: DendriteConfig | None = None,
        *,
        resume_from: str | os.PathLike | None = None,
    ):
        self.metric, self.config, self.resume_from = metric, config, resume_from
        self.growth: Growth | None = None
        self.last: StepResult | None = None

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.growth = Growth(model, self.config)
        self.growth.attach(_inner(optimizer))
        if state.global_step:
            self.growth.load_progress(load_state(self._file(args, state)))

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if self.growth is None:
            return
        if self.metric not in metrics:
            raise KeyError(
                f"metric '{self.metric}' is not among {sorted(metrics)}; "
                "return it from compute_metrics (the trainer adds 'eval_')"
            )
        self.last = self.growth.step(metrics[self.metric])
        if self.last.complete:
            control.should_training_stop = True

    def on_save(self, args, state, control, **kwargs):
        if self.growth is not None and state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            save_state(self.growth.progress(), folder / FILE)

    def _file(self, args, state) -> Path:
        own = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        path = Path(self.resume_from or own) / FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"training resumes at step {state.global_step}, but there is no {path}, which "
                "holds the state of growth; give DendriteCallback(..., resume_from=folder) the "
                "folder that trainer.train(resume_from_checkpoint=folder) got"
            )
        return path


def _inner(optimizer):
    """The torch optimiser inside Accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
