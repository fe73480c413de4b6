"""The infinite π-network against finite ones of growing width, on dummy data, over
hyper-parameters.

    python experiments/tests/test_suite_mlp.py

Both are trained alike from the same start. Their predictions agree up to a distance of order n^-½,
whatever the settings.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pilimit_lib.inf import InfMLP, PiSGD, clip_grad_norm_, param_groups


@dataclass(frozen=True)
class Settings:
    """A network and its training."""

    L: int = 1
    r: int = 12
    net: dict = field(default_factory=dict)
    lr: float = 0.3
    groups: dict = field(default_factory=dict)
    optimizer: dict = field(default_factory=dict)
    gclip: float = 0
    gclip_per_param: bool = False
    accum_steps: int = 1
    batch_size: int = 8
    steps: int = 6
    narrow: int = 128
    wide: int = 2048


SUITE = {
    "plain": Settings(),
    "no hidden π-layer": Settings(L=0),
    "deeper": Settings(L=2, wide=1024),
    "layer norm": Settings(net={"layernorm": True}),
    "no bias": Settings(net={"bias_alpha": 0}),
    "alphas": Settings(
        net={
            "first_layer_alpha": 1.5,
            "last_layer_alpha": 0.5,
            "bias_alpha": 0.5,
            "last_bias_alpha": 0.25,
        }
    ),
    "weight decay": Settings(groups={"weight_decay": 0.05}),
    "multipliers": Settings(
        groups={"first_layer_lr_mult": 0.1, "last_layer_lr_mult": 4, "bias_lr_mult": 0.5}
    ),
    "multipliers, weight decay apart": Settings(
        groups={
            "first_layer_lr_mult": 0.1,
            "last_layer_lr_mult": 4,
            "bias_lr_mult": 0.5,
            "weight_decay": 0.05,
            "apply_lr_mult_to_wd": False,
        }
    ),
    "clipped": Settings(lr=1.0, gclip=0.3),
    "each parameter clipped": Settings(lr=1.0, gclip=0.15, gclip_per_param=True),
    "momentum": Settings(lr=0.15, optimizer={"momentum": 0.5}),
    "nesterov": Settings(lr=0.15, optimizer={"momentum": 0.5, "nesterov": True}),
    "accumulation": Settings(accum_steps=3, batch_size=4),
    "one sample at a time": Settings(batch_size=1, steps=10),
}


def dummy_data(count: int, d: int = 8, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Three classes that a linear network can't tell apart."""
    x = torch.randn(count, d, generator=torch.Generator().manual_seed(seed))
    return x, torch.stack([x[:, 0] + x[:, 1], x[:, 2].abs(), -x[:, 0]], 1).argmax(1)


def train(net: nn.Module, s: Settings) -> None:
    optimizer = PiSGD(param_groups(net, s.lr, **s.groups), **s.optimizer)
    x, y = dummy_data(s.steps * s.accum_steps * s.batch_size)
    for inputs, labels in zip(
        x.split(s.accum_steps * s.batch_size), y.split(s.accum_steps * s.batch_size)
    ):
        optimizer.zero_grad()
        for part, target in zip(inputs.split(s.batch_size), labels.split(s.batch_size)):
            (nn.functional.cross_entropy(net(part), target) / s.accum_steps).backward()
        if s.gclip:
            clip_grad_norm_(net.parameters(), s.gclip, s.gclip_per_param)
        optimizer.step()


def compare(s: Settings, draws: tuple[int, int] = (8, 2)) -> dict[str, float]:
    """How far training moved the infinite network's predictions, and how far finite ones end up
    from it (RMS)."""
    infinite = InfMLP(8, 3, s.r, s.L, **s.net)
    points = dummy_data(64, seed=2)[0]
    finite = {
        n: [infinite.sample(n) for _ in range(count)]
        for n, count in ((s.narrow, draws[0]), (s.wide, draws[1]))
    }
    with torch.no_grad():
        before = infinite(points)
    train(infinite, s)
    with torch.no_grad():
        after = infinite(points)
    result = {"moved": float((after - before).square().mean().sqrt())}
    for name, nets in zip(("narrow", "wide"), finite.values()):
        for net in nets:
            train(net, s)
        with torch.no_grad():
            result[name] = float(
                torch.stack([(net(points) - after).square().mean() for net in nets]).mean().sqrt()
            )
    return result


def main() -> None:
    torch.manual_seed(0)
    print(
        f"{'settings':32} {'moved':>8} {'narrow':>8} {'wide':>8}   distance from the infinite "
        "network (RMS)"
    )
    for name, s in SUITE.items():
        found = compare(s)
        print(
            f"{name:32} {found['moved']:8.4f} {found['narrow']:8.4f} {found['wide']:8.4f}   n = "
            f"{s.narrow}, {s.wide}"
        )


if __name__ == "__main__":
    main()
