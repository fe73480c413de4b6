"""Calls that a type checker refuses, one a line."""

import torch

from pilimit_lib.core import restore
from pilimit_lib.dendrites import DendriteConfig
from pilimit_lib.inf import (
    InfMLP,
    InfPiConvNet,
    InfPiLinearReLU,
    PiSGD,
    clip_grad_norm_,
    param_groups,
)

net = InfMLP(d_in=64, d_out=10, r=8, L=1)
InfMLP(d_in="64", d_out=10, r=8, L=1)  # wrong
InfMLP(d_in=64, d_out=10, r=8, layers=1)  # wrong
rows: str = net.rows  # wrong
clip_grad_norm_(net, "0.4")  # wrong
param_groups(net, lr="1")  # wrong
PiSGD(net.parameters(), rate=1.0)  # wrong
net.sample("64")  # wrong
InfMLP.from_state_dict(3)  # wrong
InfPiConvNet(3, 10, ranks=8)  # wrong
InfPiLinearReLU("8")  # wrong
DendriteConfig(max_dendrites="one")  # wrong
restore(net)  # wrong
output: torch.Tensor = net.width_that_is_not_there  # wrong
