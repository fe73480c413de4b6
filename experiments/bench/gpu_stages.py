"""What the stages of a GPU day have in common: sizes, cases, and how they are timed; and the first
of them, which measures the machine.

A stage yields its cases, one after the other, so that it can end after any of them. Times are
medians over repetitions, by the GPU's own clock; errors are norms relative to those of the result
in float64. Index legend: b samples, m rows, r rank in, o rank out.
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


@dataclass(frozen=True)
class Case:
    """What is measured, and the call that does it."""

    label: Record
    measure: Callable[[], Record]


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


def machine(sizes: Sizes, device: str) -> Iterator[Case]:
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    versions = {"torch": torch.__version__, "CUDA": str(torch.version.cuda)}
    yield Case({"device": name}, lambda: versions)
    yield Case({"what": "GB/s"}, lambda: {"value": bandwidth(sizes, device) / 1e9})
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        rate = partial(product_rate, sizes, device, dtype)
        yield Case({"what": f"TFLOP/s, {dtype}"}, lambda rate=rate: {"value": rate() / 1e12})


def drawn_rows(m: int, r: int, o: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    B = F.normalize(torch.randn(m, r, device=device))
    return torch.randn(m, o, device=device), torch.full((m,), 1 / m, device=device), B
