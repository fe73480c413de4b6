"""The lab: look into training, operate on it, go back. For any module; see README.md beside this
file."""

from .data.dataset import TrackedDataset
from .data.ledger import Ledger
from .data.loader import LabLoader
from .edits.plan import Plan
from .errors import NonFinite, NotFound, Refused
from .experiment import Experiment
from .network import NetworkWithOps
from .neurons.counters import TrackingMode
from .neurons.tracked import Conv2dWithNeuronOps, LinearWithNeuronOps
from .provenance import Contributions, Provenance
from .run.checkpoints import CheckpointManager
from .watch import Lab, watch

__all__ = [
    "CheckpointManager",
    "Contributions",
    "Conv2dWithNeuronOps",
    "Experiment",
    "Lab",
    "LabLoader",
    "Ledger",
    "LinearWithNeuronOps",
    "NetworkWithOps",
    "NonFinite",
    "NotFound",
    "Plan",
    "Provenance",
    "Refused",
    "TrackedDataset",
    "TrackingMode",
    "watch",
]
