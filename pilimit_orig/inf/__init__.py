"""The π-MLP of the paper with hand-written gradients; see pilimit_orig/README.md."""

from pilimit_orig.inf.finpimlp import FinPiMLP
from pilimit_orig.inf.pimlp import InfPiMLP

__all__ = ["FinPiMLP", "InfPiMLP"]
