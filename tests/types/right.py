"""Calls as a user writes them: a type checker passes them all."""

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from pilimit_lib import __version__
from pilimit_lib.core import batch, load, restore, save, snapshot
from pilimit_lib.dendrites import DendriteConfig, Growth, Patience, dendritic
from pilimit_lib.inf import (
    InfMLP,
    InfPiConvNet,
    InfPiLinearReLU,
    PiSGD,
    clip_grad_norm_,
    param_groups,
)
from pilimit_lib.lab import Experiment
from pilimit_lib.sigprop import loss, signals, wrap

version: str = __version__
net = InfMLP(d_in=64, d_out=10, r=8, L=1, memory="moments", degree=2)
rows: list[int] = net.rows
optimizer: torch.optim.Optimizer = PiSGD(param_groups(net, lr=1.0, weight_decay=1e-5), lr=1.0)
with batch(torch.arange(4)):
    output: Tensor = net(torch.randn(4, 64))
norm: Tensor = clip_grad_norm_(net, 0.4, per_param=True)
finite: nn.Module = net.sample(64)
again: InfMLP = InfMLP.from_state_dict(net.state_dict())
conv = InfPiConvNet(channels=3, classes=10, ranks=(8, 16), pools=(2,))
layer = InfPiLinearReLU(8, 10, output_layer=True)
save(snapshot(net, optimizer, epoch=1), "run.pt")
extras = restore(net, load("run.pt"), optimizer)

config = DendriteConfig(switch=Patience(patience=3), max_dendrites=1)
growth = Growth(
    dendritic(nn.Linear(4, 2), config), config, optimizer=lambda ps: torch.optim.Adam(ps)
)
done: bool = growth.step(0.5).complete

data = TensorDataset(torch.randn(8, 4), torch.zeros(8, dtype=torch.long))
exp = Experiment(
    model=nn.Linear(4, 2),
    optimizer_class=torch.optim.Adam,
    train_dataset=data,
    eval_dataset=data,
    device="cpu",
    learning_rate=1e-2,
    batch_size=8,
    name="x0",
)
exp.train_n_steps(3)

signal = signals.project_labels(10, (8, 8, 8), nn.Conv2d(1, 8, 3, padding=1), per_class=True)
forward = wrap(
    nn.Sequential(nn.Sequential(nn.Flatten(), nn.Linear(512, 16)), nn.Linear(16, 10)),
    signal=signal,
    loss=loss.Contrast(by="label"),
    optimizer=lambda module: torch.optim.Adam(module.parameters(), 2e-3),
)
