"""The stages of a GPU day that compare kernels: moments, rows and convolutions, each against the
plain operators and float64.

Index legend: b samples, m rows, r rank in, o rank out, P moments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pilimit_lib.inf import InfPiLinearReLU
from pilimit_lib.inf.conv import sums as conv_sums
from pilimit_lib.inf.conv.geometry import Geometry
from pilimit_lib.inf.dual.features import PolynomialFeatures
from pilimit_lib.inf.dual.hermite import hermite_series
from pilimit_lib.inf.implementation import implementation
from pilimit_lib.inf.moments import sums as moment_sums
from pilimit_lib.inf.rows.sums.differentiable import backward as rows_backward
from pilimit_lib.inf.rows.sums.differentiable import forward as rows_forward

from .gpu_stages import Case, Record, Sizes, drawn_rows, error, seconds

KAPPA = hermite_series("relu", 2, "hermite").kappa
GEOMETRY = Geometry((3, 3), padding=(1, 1))


def twin_of(device: str) -> Any:
    """The Triton kernels of moments, where they run: on a GPU, or interpreted."""
    from pilimit_lib.inf.moments import triton_kernels

    features = PolynomialFeatures(2, KAPPA)
    probe = torch.ones(1, 2, device=device)
    able = triton_kernels.usable(features, probe, torch.ones(features.P, 1, device=device))
    return triton_kernels if able else None


def moments_kernels(sizes: Sizes, device: str) -> Iterator[Case]:
    twin = twin_of(device)
    for r, b in sizes.moments:
        torch.manual_seed(0)
        features = PolynomialFeatures(r, KAPPA)
        u = F.normalize(torch.randn(b, r, device=device))
        V, delta = (torch.randn(size, r, device=device) for size in (features.P, b))
        phi = features.matrix(u.double())
        exact = phi @ V.double(), 0.9 * V.double() - 0.3 * phi.T @ delta.double()
        for name, tile in forms(twin, sizes):
            how = {} if name == "plain" else {"block_p": tile}
            sums = moment_sums if name == "plain" else twin
            measure = partial(moments_case, sums, how, features, u, V, delta, exact)
            label = {"r": r, "b": b, "form": name, "tile": tile}
            yield Case(label, partial(measure, device, sizes.repeats))


def moments_case(
    sums: Any,
    how: Record,
    features: PolynomialFeatures,
    u: Tensor,
    V: Tensor,
    delta: Tensor,
    exact: tuple[Tensor, Tensor],
    device: str,
    repeats: int,
) -> Record:
    forward = partial(sums.forward, features, u, V, **how)
    updated, held = V.clone(), V.clone()
    sums.update_(features, updated, u, delta, -0.3, 0.9, **how)
    update = partial(sums.update_, features, held, u, delta, -1e-6, 1.0, **how)
    took, took_update = (seconds(call, device, repeats) for call in (forward, update))
    size = V.numel() * 4
    return {
        "forward ms": 1e3 * took,
        "forward GB/s": size / took / 1e9,
        "update ms": 1e3 * took_update,
        "update GB/s": 2 * size / took_update / 1e9,
        "errors": f"{error(forward(), exact[0]):.1e}, {error(updated, exact[1]):.1e}",
    }


def forms(twin: Any, sizes: Sizes) -> list[tuple[str, int]]:
    """The plain operator, and the kernels of `twin` with each size of tiles."""
    return [("plain", 0), *(("triton", tile) for tile in sizes.tiles if twin is not None)]


def rows_kernels(sizes: Sizes, device: str) -> Iterator[Case]:
    for m, r, b in sizes.rows:
        for dtype in (torch.float32, torch.float16):
            torch.manual_seed(0)
            layer = InfPiLinearReLU(r, r, bias_alpha=0, row_dtype=dtype, device=device)
            layer.set_rows(*drawn_rows(m, r, r, device))
            g = torch.randn(b, r, device=device, requires_grad=True)
            weights = torch.randn(b, r, device=device)
            exact = exact_rows(layer, g.detach(), weights)
            for name in ("plain", "chunked", "triton"):
                measure = partial(rows_case, layer, g, weights, exact, name)
                label = {"m": m, "r": r, "b": b, "rows": str(dtype), "form": name}
                yield Case(label, partial(measure, device, sizes.repeats))


def rows_case(
    layer: InfPiLinearReLU,
    g: Tensor,
    weights: Tensor,
    exact: tuple[Tensor, Tensor],
    name: str,
    device: str,
    repeats: int,
) -> Record:
    call = partial(through, layer, g, weights, name)
    with implementation(rows=name, debug=True) as said:
        layer(g.detach())
    errors = [error(*pair) for pair in zip(call(), exact)]
    took = seconds(call, device, repeats)
    return {
        "ran": "; ".join(said),
        "ms": 1e3 * took,
        "GB/s": 2 * layer.row_bytes / took / 1e9,
        "errors": ", ".join(f"{each:.1e}" for each in errors),
    }


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


def conv_kernels(sizes: Sizes, device: str) -> Iterator[Case]:
    twin = twin_of(device)
    if twin is not None:
        from pilimit_lib.inf.conv import triton_kernels as twin
    for r, side, images in sizes.maps:
        torch.manual_seed(0)
        features = PolynomialFeatures(r, KAPPA)
        g = torch.randn(r, images, side, side, device=device)
        V = torch.randn(features.P, 3, 3, r, device=device)
        few = g[:, :1].contiguous()
        exact = conv_sums.forward(features, few.double(), V.double(), GEOMETRY, False)
        for name, tile in forms(twin, sizes):
            how = {} if name == "plain" else {"block_p": tile}
            forward = partial((conv_sums if name == "plain" else twin).forward, features, **how)
            measure = partial(conv_case, forward, g, few, V, exact)
            label = {"r": r, "map": f"{images}x{side}x{side}", "form": name, "tile": tile}
            yield Case(label, partial(measure, device, sizes.repeats))


def conv_case(
    forward: Callable[..., Tensor],
    g: Tensor,
    few: Tensor,
    V: Tensor,
    exact: Tensor,
    device: str,
    repeats: int,
) -> Record:
    found = forward(few, V, GEOMETRY, False)
    took = seconds(lambda: forward(g, V, GEOMETRY, False), device, repeats)
    flops = 2 * V.numel() * g[0].numel()
    return {
        "forward ms": 1e3 * took,
        "TFLOP/s": flops / took / 1e12,
        "error": error(found, exact),
    }
