"""π-networks: infinitely wide networks that learn features, and the finite networks sampled from them."""
from .clip import clip_grad_norm_
from .hermite import hermite_series
from .layers import FinPiInputLinearReLU, FinPiLinearReLU, InfPiInputLinearReLU, InfPiLinearReLU
from .mlp import FinPiMLPSample, InfMLP
from .moments import InfPiLinear
from .optim import InfSGD, PiSGD, param_groups

__all__ = ["FinPiInputLinearReLU", "FinPiLinearReLU", "FinPiMLPSample", "InfMLP", "InfPiInputLinearReLU", "InfPiLinear",
           "InfPiLinearReLU", "InfSGD", "PiSGD", "clip_grad_norm_", "hermite_series", "param_groups"]
