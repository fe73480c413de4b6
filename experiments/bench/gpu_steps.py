"""The stage of a GPU day that holds training steps against their floors, max(bytes / bandwidth,
FLOPs / rate)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pilimit_lib.inf import InfMLP, InfPiConvNet, PiSGD, clip_grad_norm_
from pilimit_lib.inf.implementation import implementation

from .gpu_stages import (
    Case,
    Record,
    Sizes,
    bandwidth,
    drawn_rows,
    product_rate,
    seconds,
)

CLASSES = 10


def steps(sizes: Sizes, device: str) -> Iterator[Case]:
    """Whole training steps with the implementation that is the default, and Triton's."""
    rate, speed = product_rate(sizes, device, torch.float32), bandwidth(sizes, device)
    for what, net, x, bytes_needed, flops in step_cases(sizes, device):
        floor = max(bytes_needed / speed, flops / rate)
        for form in ("default", "triton"):
            measure = partial(step_case, net, x, form, floor)
            label = {"step": what, "form": form}
            yield Case(label, partial(measure, device, sizes.repeats))


def step_case(
    net: torch.nn.Module, x: Tensor, form: str, floor: float, device: str, repeats: int
) -> Record:
    y = torch.randint(CLASSES, (len(x),), device=device)
    call = partial(step, net, PiSGD(net.parameters(), lr=1e-6), x, y, form)
    took = seconds(call, device, repeats)
    return {"ms": 1e3 * took, "floor ms": 1e3 * floor, "share of the floor, %": 100 * floor / took}


def step(net: torch.nn.Module, optimizer: PiSGD, x: Tensor, y: Tensor, form: str) -> None:
    choice = {} if form == "default" else {"rows": form, "moments": form}
    with implementation(**choice):
        F.cross_entropy(net(x), y).backward()
        clip_grad_norm_(net, 0.4, per_param=True)
        optimizer.step()
        optimizer.zero_grad()


def step_cases(sizes: Sizes, device: str) -> Iterator[tuple[str, Any, Tensor, float, float]]:
    """(what, network, batch, bytes that a step must move, FLOPs that it must do)."""
    for r, b in sizes.moments:
        torch.manual_seed(0)
        net = InfMLP(sizes.data, CLASSES, r, 1, memory="moments", fused=True).to(device)
        numbers = sum(layer.V.numel() for layer in net.layers[1:])
        inputs = sizes.data * r
        flops = 6 * b * numbers + 4 * b * inputs
        # V is read forward, backward and for the update, and written once; A of the input alike
        yield (
            f"moments r={r} b={b}",
            net,
            torch.randn(b, sizes.data, device=device),
            16.0 * (numbers + inputs),
            flops,
        )
    for m, r, b in sizes.rows:
        torch.manual_seed(0)
        half = torch.float16 if device == "cuda" else torch.float32
        net = InfMLP(sizes.data, CLASSES, r, 1, row_dtype=half).to(device)
        for layer in net.layers[1:]:
            layer.set_rows(*drawn_rows(m, r, layer.r_out, device))
        flops = sum(b * m * (6 * r + 4 * layer.r_out) for layer in net.layers[1:])
        moved = 2.0 * net.row_bytes + 16.0 * sizes.data * r
        yield (
            f"rows m={m} r={r} b={b}",
            net,
            torch.randn(b, sizes.data, device=device),
            moved,
            flops,
        )
    torch.manual_seed(0)
    pools = (2,) * (len(sizes.ranks) - 1)
    net = InfPiConvNet(channels=3, classes=CLASSES, ranks=sizes.ranks, pools=pools).to(device)
    side = 8 * (1 + 3 * (device == "cuda"))
    x = torch.randn(sizes.maps[0][2], 3, side, side, device=device)
    flops, moved = conv_needs(net, x)
    yield f"ConvNet {sizes.ranks} {tuple(x.shape)}", net, x, moved, flops


def conv_needs(net: InfPiConvNet, x: Tensor) -> tuple[float, float]:
    """(FLOPs of the three products, bytes of pre-activations and V) of a training step."""
    found = []

    def look(layer: torch.nn.Module, given: tuple[Tensor], out: Tensor) -> None:
        # each number of V meets each position that it adds to; maps are read twice, written once
        positions = out.numel() // layer.r_out
        found.append((6.0 * layer.V.numel() * positions, 12.0 * (given[0].numel() + out.numel())))

    layers = [layer for layer in net.modules() if hasattr(layer, "V")]
    hooks = [layer.register_forward_hook(look) for layer in layers]
    with torch.no_grad():
        net(x)
    for hook in hooks:
        hook.remove()
    held = sum(16.0 * layer.V.numel() for layer in layers)
    return sum(flops for flops, _ in found), held + sum(maps for _, maps in found)
