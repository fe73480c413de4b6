"""The networks under the path that the original's users know. To read how they are built, see
pilimit_lib/inf/mlp.py."""

from torch.nn import Module as PiNet  # loading a grown network needs no base class of its own here

from pilimit_lib.inf.mlp import FinPiMLPSample, InfMLP

__all__ = ["FinPiMLPSample", "InfMLP", "PiNet"]
