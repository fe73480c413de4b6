"""The lab: look into training, operate on it, go back. For any module; see README.md beside this
file."""

from .checkpoints import CheckpointManager
from .dataset import TrackedDataset
from .errors import NotFound, Refused
from .experiment import Experiment
from .ledger import Ledger
from .loader import LabLoader
from .modules import Conv2dWithNeuronOps, LinearWithNeuronOps, NetworkWithOps
from .neurons import TrackingMode
from .plan import Plan
from .provenance import Contributions, Provenance
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
    "NotFound",
    "Plan",
    "Provenance",
    "Refused",
    "TrackedDataset",
    "TrackingMode",
    "watch",
]
