"""What a figure of speed was measured on, and what that machine can do at most: printed by every
benchmark beside its numbers."""

from __future__ import annotations

import platform
import time
from datetime import date
from pathlib import Path

import torch

SIZE = 1024  # of the square product that tells the rate of products
COPIED = 1 << 26  # bytes of the copy that tells the bandwidth: more than caches hold


def describe(threads: int | None = None) -> str:
    """The processor with its family and widest instructions, threads (default: as many as torch
    uses now), torch and today's date."""
    capability = torch.backends.cpu.get_cpu_capability()
    return (
        f"{processor()}, {capability}, {threads or torch.get_num_threads()} thread(s), "
        f"torch {torch.__version__}, {date.today()}"
    )


def processor() -> str:
    """Its name, and of x86 family and model, which are not in every name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    pairs = (line.partition(":") for line in lines)
    found = {name.strip(): value.strip() for name, _, value in reversed(list(pairs))}
    name = found.get("model name") or platform.processor() or platform.machine()
    numbers = (found.get("cpu family"), found.get("model"))
    return name if None in numbers else f"{name} family {numbers[0]} model {numbers[1]}"


class Limits:
    """The best rates seen so far: products in FLOP a second, copies in bytes read and written."""

    def __init__(self) -> None:
        self.rate = self.bandwidth = 0.0
        self._square, self._out = torch.randn(SIZE, SIZE), torch.empty(SIZE, SIZE)
        self._from, self._to = torch.zeros(COPIED // 4), torch.zeros(COPIED // 4)

    def measure(self) -> None:
        """Look again, in turn with what is measured: a machine is not always equally fast."""
        started = time.process_time()
        torch.mm(self._square, self._square, out=self._out)
        between = time.process_time()
        self._to.copy_(self._from)
        ended = time.process_time()
        self.rate = max(self.rate, 2 * SIZE**3 / (between - started))
        self.bandwidth = max(self.bandwidth, 2 * COPIED / (ended - between))

    def floor(self, flops: float, moved: float) -> float:
        """Seconds that so many FLOPs of products, and so many bytes read or written, take at
        least."""
        return max(flops / self.rate, moved / self.bandwidth)
