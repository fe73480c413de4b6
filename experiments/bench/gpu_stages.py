"""The stages of a GPU day: each yields one record per case, so that it can end after any of them.

Times are medians over repetitions, by the GPU's own clock; errors are norms relative to those of
the result in float64. Index legend: b samples, m rows, r rank in, o rank out, P moments.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pilimit_lib.inf import InfMLP, InfPiConvNet, InfPiLinearReLU, PiSGD, clip_grad_norm_
from pilimit_lib.inf.conv import sums as conv_sums
from pilimit_lib.inf.conv.geometry import Geometry
from pilimit_lib.inf.dual.features import PolynomialFeatures
from pilimit_lib.inf.dual.hermite import hermite_series
from pilimit_lib.inf.implementation import implementation
from pilimit_lib.inf.moments import sums as moment_sums
from pilimit_lib.inf.rows.sums.differentiable import backward as rows_backward
from pilimit_lib.inf.rows.sums.differentiable import forward as rows_forward

KAPPA = hermite_series("relu", 2, "hermite").kappa
GEOMETRY = Geometry((3, 3), padding=(1, 1))
CLASSES = 10
Record = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    copy_bytes: int
    product: int  # side of the square matrices
    moments: tuple[tuple[int, int], ...]  # (r = o, b)
    rows: tuple[tuple[int, int, int], ...]  # (m, r = o, b)
    maps: tuple[tuple[int, int, int], ...]  # (r = o, side, images)
    tiles: tuple[int, ...]  # columns of Φ at a time
    data: int  # numbers in a sample
    ranks: tuple[int, ...]  # of the ConvNet
    repeats: int

    def described(self) -> list[str]:
        return [f"  {name}: {value}" for name, value in asdict(self).items()]


FULL = Sizes(
    copy_bytes=1 << 30,
    product=8192,
    moments=((100, 8), (100, 128), (200, 8), (200, 128), (400, 8), (400, 128), (400, 512)),
    rows=(
        (20_000, 100, 8),
        (200_000, 100, 8),
        (200_000, 100, 128),
        (200_000, 400, 8),
        (1_000_000, 400, 8),
        (1_000_000, 400, 128),
    ),
    maps=((8, 32, 64), (16, 32, 64), (32, 16, 64), (64, 8, 64), (64, 16, 256)),
    tiles=(16, 32, 64, 128),
    data=3072,
    ranks=(8, 16, 24, 32),
    repeats=20,
)
TINY = Sizes(
    copy_bytes=1 << 16,
    product=32,
    moments=((5, 3), (4, 6)),
    rows=((130, 5, 3),),
    maps=((3, 4, 2),),
    tiles=(16, 32),
    data=12,
    ranks=(3, 4),
    repeats=2,
)


def seconds(call: Callable[[], Any], device: str, repeats: int) -> float:
    """The median time of a call, after two to warm up (a kernel is compiled at its first)."""
    for _ in range(2):
        call()
    times = []
    for _ in range(repeats):
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        else:
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def error(found: Tensor, expected: Tensor) -> float:
    """Of the norm, relative; `expected` is in float64."""
    return float((found.detach().double() - expected).norm() / expected.norm().clamp_min(1e-30))


def bandwidth(sizes: Sizes, device: str) -> float:
    """Bytes read and written per second by a scaling in place."""
    buffer = torch.ones(sizes.copy_bytes // 4, device=device)
    return 2 * sizes.copy_bytes / seconds(lambda: buffer.mul_(0.999), device, sizes.repeats)


def product_rate(sizes: Sizes, device: str, dtype: torch.dtype) -> float:
    """FLOPs per second of a square product; float32 is not rounded to TF32."""
    left = torch.randn(sizes.product, sizes.product, device=device).to(dtype)
    return 2 * sizes.product**3 / seconds(lambda: left @ left, device, sizes.repeats)


def machine(sizes: Sizes, device: str) -> Iterator[Record]:
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    yield {"device": name, "torch": torch.__version__, "CUDA": str(torch.version.cuda)}
    yield {"what": "bandwidth, GB/s", "value": bandwidth(sizes, device) / 1e9}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        rate = product_rate(sizes, device, dtype)
        yield {"what": f"products in {dtype}, TFLOP/s", "value": rate / 1e12}


def twin_of(device: str) -> Any:
    """The Triton kernels of moments, where they run: on a GPU, or interpreted."""
    from pilimit_lib.inf.moments import triton_kernels

    features = PolynomialFeatures(2, KAPPA)
    probe = torch.ones(1, 2, device=device)
    able = triton_kernels.usable(features, probe, torch.ones(features.P, 1, device=device))
    return triton_kernels if able else None


def moments_kernels(sizes: Sizes, device: str) -> Iterator[Record]:
    twin = twin_of(device)
    for r, b in sizes.moments:
        torch.manual_seed(0)
        features = PolynomialFeatures(r, KAPPA)
        u = F.normalize(torch.randn(b, r, device=device))
        V, delta = (torch.randn(size, r, device=device) for size in (features.P, b))
        exact = features.matrix(u.double()) @ V.double()
        target = 0.9 * V.double() - 0.3 * features.matrix(u.double()).T @ delta.double()
        for name, tile in forms(twin, sizes):
            how = {} if name == "plain" else {"block_p": tile}
            sums = moment_sums if name == "plain" else twin
            forward = partial(sums.forward, features, u, V, **how)
            updated, held = V.clone(), V.clone()
            sums.update_(features, updated, u, delta, -0.3, 0.9, **how)
            update = partial(sums.update_, features, held, u, delta, -1e-6, 1.0, **how)
            took, size = seconds(forward, device, sizes.repeats), V.numel() * 4
            took_update = seconds(update, device, sizes.repeats)
            yield {
                "r": r,
                "b": b,
                "form": name,
                "tile": tile,
                "forward ms": 1e3 * took,
                "forward GB/s": size / took / 1e9,
                "update ms": 1e3 * took_update,
                "update GB/s": 2 * size / took_update / 1e9,
                "errors": f"{error(forward(), exact):.1e}, {error(updated, target):.1e}",
            }


def forms(twin: Any, sizes: Sizes) -> list[tuple[str, int]]:
    """The plain operator, and the kernels of `twin` with each size of tiles."""
    return [("plain", 0), *(("triton", tile) for tile in sizes.tiles if twin is not None)]


def rows_kernels(sizes: Sizes, device: str) -> Iterator[Record]:
    for m, r, b in sizes.rows:
        for dtype in (torch.float32, torch.float16):
            torch.manual_seed(0)
            layer = InfPiLinearReLU(r, r, bias_alpha=0, row_dtype=dtype, device=device)
            layer.set_rows(*drawn_rows(m, r, r, device))
            g = torch.randn(b, r, device=device, requires_grad=True)
            weights = torch.randn(b, r, device=device)
            exact = exact_rows(layer, g.detach(), weights)
            for name in ("plain", "chunked", "triton"):
                call = partial(through, layer, g, weights, name)
                with implementation(rows=name, debug=True) as said:
                    layer(g.detach())
                errors = [error(*pair) for pair in zip(call(), exact)]
                took = seconds(call, device, sizes.repeats)
                yield {
                    "m": m,
                    "r": r,
                    "b": b,
                    "rows": str(dtype),
                    "form": name,
                    "ran": "; ".join(said),
                    "ms": 1e3 * took,
                    "GB/s": 2 * layer.row_bytes / took / 1e9,
                    "errors": ", ".join(f"{each:.1e}" for each in errors),
                }


def drawn_rows(m: int, r: int, o: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    B = F.normalize(torch.randn(m, r, device=device))
    return torch.randn(m, o, device=device), torch.full((m,), 1 / m, device=device), B


def through(layer: InfPiLinearReLU, g: Tensor, weights: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Output and gradient of a layer of rows."""
    with implementation(rows=name):
        out = layer(g)
        (slope,) = torch.autograd.grad(out, g, weights)
    return out, slope


def exact_rows(layer: InfPiLinearReLU, g: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Output and gradient in float64, a sample at a time: cosines of all rows are large."""
    A, amult, B = (values.double() for values in layer.dense_rows())
    outputs, slopes = [], []
    for one, weight in zip(g.double(), weights.double()):
        length = one.norm()
        unit = (one / length)[None]
        outputs.append(length * rows_forward(A, amult, B, unit))
        along_rows, along_unit = rows_backward(A, amult, B, unit, weight[None])
        slopes.append(along_rows + along_unit * unit)
    return torch.cat(outputs), torch.cat(slopes)


def conv_kernels(sizes: Sizes, device: str) -> Iterator[Record]:
    twin = twin_of(device)
    if twin is not None:
        from pilimit_lib.inf.conv import triton_kernels as twin
    for r, side, images in sizes.maps:
        torch.manual_seed(0)
        features = PolynomialFeatures(r, KAPPA)
        g, grad = (torch.randn(r, images, side, side, device=device) for _ in range(2))
        V = torch.randn(features.P, 3, 3, r, device=device)
        few = g[:, :1].contiguous()
        exact = conv_sums.forward(features, few.double(), V.double(), GEOMETRY, False)
        flops = 2 * features.P * 9 * r * images * side * side
        for name, tile in forms(twin, sizes):
            how = {} if name == "plain" else {"block_p": tile}
            forward = (conv_sums if name == "plain" else twin).forward
            call = partial(forward, features, g, V, GEOMETRY, False, **how)
            took = seconds(call, device, sizes.repeats)
            yield {
                "r": r,
                "map": f"{images}x{side}x{side}",
                "form": name,
                "tile": tile,
                "forward ms": 1e3 * took,
                "TFLOP/s": flops / took / 1e12,
                "error": error(forward(features, few, V, GEOMETRY, False, **how), exact),
            }


def steps(sizes: Sizes, device: str) -> Iterator[Record]:
    """Whole training steps with the implementation that is the default, and Triton's."""
    rate, speed = product_rate(sizes, device, torch.float32), bandwidth(sizes, device)
    for what, net, x, bytes_needed, flops in step_cases(sizes, device):
        y = torch.randint(CLASSES, (len(x),), device=device)
        floor = max(bytes_needed / speed, flops / rate)
        for form in ("default", "triton"):
            optimizer = PiSGD(net.parameters(), lr=1e-6)
            call = partial(step, net, optimizer, x, y, form)
            took = seconds(call, device, sizes.repeats)
            yield {
                "step": what,
                "form": form,
                "ms": 1e3 * took,
                "floor ms": 1e3 * floor,
                "share of the floor, %": 100 * floor / took,
            }


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
