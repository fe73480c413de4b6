"""π-networks: infinitely wide networks that learn features, and the finite networks sampled from
them."""

from .clip import clip_grad_norm_
from .conv.finite import FinPiConv2d
from .conv.layers import InfPiConv2d, InfPiInputConv2d
from .convnets import FinPiConvNetSample, InfPiConvNet, InfPiResNet
from .dual.hermite import hermite_series
from .layers import FinPiInputLinearReLU, FinPiLinearReLU, InfPiInputLinearReLU, InfPiLinearReLU
from .mlp import FinPiMLPSample, InfMLP
from .moments.layer import InfPiLinear
from .optim import InfSGD, PiSGD, param_groups

__all__ = [
    "FinPiConv2d",
    "FinPiConvNetSample",
    "FinPiInputLinearReLU",
    "FinPiLinearReLU",
    "FinPiMLPSample",
    "InfMLP",
    "InfPiConv2d",
    "InfPiConvNet",
    "InfPiInputConv2d",
    "InfPiInputLinearReLU",
    "InfPiLinear",
    "InfPiLinearReLU",
    "InfPiResNet",
    "InfSGD",
    "PiSGD",
    "clip_grad_norm_",
    "hermite_series",
    "param_groups",
]
