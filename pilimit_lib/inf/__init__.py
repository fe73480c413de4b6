"""π-networks: infinitely wide networks that learn features, and the finite networks sampled from
them."""

from .clip import clip_grad_norm_
from .conv.along import FinPiConv1d, InfPiConv1d, InfPiInputConv1d
from .conv.finite import FinPiConv2d
from .conv.layers import InfPiConv2d, InfPiInputConv2d
from .conv.noise import FiniteWidthNoise
from .conv.normalisation import ScalarNorm
from .conv.whitening import whiten_
from .convnets import FinPiConvNetSample, InfPiConvNet, InfPiResNet
from .dual.hermite import hermite_series
from .implementation import implementation
from .layers import FinPiInputLinearReLU, FinPiLinearReLU, InfPiInputLinearReLU, InfPiLinearReLU
from .mlp import FinPiMLPSample, InfMLP
from .moments.layer import InfPiLinear
from .optim import DegreeRates, InfSGD, InputFactors, PiSGD, param_groups, sum_gradients_
from .rows.files import load_rows, save_rows
from .rows.offload import pi_offload
from .rows.shard import gather_rows, shard_rows

__all__ = [
    "DegreeRates",
    "FinPiConv1d",
    "FinPiConv2d",
    "FinPiConvNetSample",
    "FinPiInputLinearReLU",
    "FinPiLinearReLU",
    "FinPiMLPSample",
    "FiniteWidthNoise",
    "InfMLP",
    "InfPiConv1d",
    "InfPiConv2d",
    "InfPiConvNet",
    "InfPiInputConv1d",
    "InfPiInputConv2d",
    "InfPiInputLinearReLU",
    "InfPiLinear",
    "InfPiLinearReLU",
    "InfPiResNet",
    "InfSGD",
    "InputFactors",
    "PiSGD",
    "ScalarNorm",
    "clip_grad_norm_",
    "gather_rows",
    "hermite_series",
    "implementation",
    "load_rows",
    "param_groups",
    "pi_offload",
    "save_rows",
    "shard_rows",
    "sum_gradients_",
    "whiten_",
]
