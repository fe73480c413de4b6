"""The least code that makes a π-network: an infinitely wide MLP that learns, and the finite network
sampled from it.

    python experiments/tests/minimal_test_mlp.py
"""

import torch
from torch import nn

from pilimit_lib.inf import InfPiInputLinearReLU, InfPiLinearReLU, PiSGD, clip_grad_norm_
from pilimit_lib.inf.layers import FinPiInputLinearReLU, FinPiLinearReLU


class InfNet(nn.Module):
    """Two infinitely wide hidden layers. Every layer hands on pre-activations; the ReLU belongs to
    the layer that follows."""

    def __init__(self, d: int, r: int, classes: int) -> None:
        super().__init__()
        self.input = InfPiInputLinearReLU(d, r)
        self.hidden = InfPiLinearReLU(r)
        self.readout = InfPiLinearReLU(r, classes, output_layer=True)

    def forward(self, x):
        return self.readout(self.hidden(self.input(x)))


class FinNet(nn.Module):
    """The same network with width n. Each layer needs the random weights ω of the layer below
    it."""

    def __init__(self, inf: InfNet, d: int, n: int) -> None:
        super().__init__()
        self.input: FinPiInputLinearReLU = inf.input.sample(d, n)
        self.hidden: FinPiLinearReLU = inf.hidden.sample(n, n, prev_omega=self.input.omega)
        self.readout: FinPiLinearReLU = inf.readout.sample(n, prev_omega=self.hidden.omega)

    def forward(self, x):
        return self.readout(self.hidden(self.input(x)))


def train(
    net: nn.Module, x: torch.Tensor, y: torch.Tensor, epochs: int = 10, batch_size: int = 8
) -> list[float]:
    """Ordinary training: only the optimiser and the clipping come from this library. Returns the
    loss of each epoch."""
    optimizer = PiSGD(net.parameters(), lr=0.3)
    losses = []
    for _ in range(epochs):
        total = 0.0
        for inputs, labels in zip(x.split(batch_size), y.split(batch_size)):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(inputs), labels)
            loss.backward()
            clip_grad_norm_(net.parameters(), 0.5)
            optimizer.step()
            total += loss.item() * len(inputs)
        losses.append(total / len(x))
    return losses


def dummy_data(samples: int = 64, d: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    """Is the first coordinate larger than the second one?"""
    x = torch.randn(samples, d)
    return x, (x[:, 0] > x[:, 1]).long()


def main() -> None:
    torch.manual_seed(0)
    x, y = dummy_data()
    inf = InfNet(10, r=20, classes=2)
    fin = FinNet(inf, 10, n=1024)
    print(inf)
    for name, net in (("infinite", inf), ("n = 1024", fin)):
        losses = train(net, x, y)
        accuracy = (net(x).argmax(1) == y).float().mean()
        print(f"{name}: loss {losses[0]:.3f} → {losses[-1]:.3f}, training accuracy {accuracy:.1%}")
    print(f"rows of the hidden layer: {len(inf.hidden)}")


if __name__ == "__main__":
    main()
