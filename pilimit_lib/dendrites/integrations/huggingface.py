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

from ..config import DendriteConfig
from ..growth import Growth, StepResult


class DendriteCallback(TrainerCallback):
    """Feeds a metric of every evaluation to a Growth; the trainer's optimiser follows, and training
    stops when growth is finished.

    Set ``eval_strategy="epoch"``. The trainer owns the learning rate: its schedule goes on through
    growth. A model that grew is saved by the trainer as it is; load it into a freshly converted one
    with load_state_dict, which makes the dendrites first.
    """

    def __init__(self, metric: str, config: DendriteConfig | None = None):
        self.metric, self.config = metric, config
        self.growth: Growth | None = None
        self.last: StepResult | None = None

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.growth = Growth(model, self.config)
        self.growth.attach(_inner(optimizer))

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


def _inner(optimizer):
    """The torch optimiser inside Accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
