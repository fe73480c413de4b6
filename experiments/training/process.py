"""What a process needs before it trains: a device, seeds, a bar where one can be seen, and signals
that wait for the end of a step."""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class Interrupted(SystemExit):
    """A run was asked to stop by a signal. As an exit status it is what a shell makes of it: 130
    after Ctrl-C, 143 after SIGTERM, so that nobody takes half a run for a whole one."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """Turn Ctrl-C and SIGTERM into a request, `if stop:`, that the loop grants between two steps. A
    second one stops at once."""
    stop: list[int] = []

    def request(number: int, frame: Any) -> None:
        if stop:
            raise Interrupted(number)
        stop.append(number)

    previous = {
        number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def shows_bars(quiet: bool = False) -> bool:
    """Whether progress bars are drawn: on a terminal, unless --quiet or TQDM_DISABLE says no."""
    forbidden = os.environ.get("TQDM_DISABLE", "").lower() not in ("", "0", "false")
    return not quiet and not forbidden and sys.stderr.isatty()


def seed_everything(seed: int) -> None:
    """Start the generators that `rng_state` keeps from `seed`."""
    torch.manual_seed(seed)
    random.seed(seed)


def pick_device(cuda: bool, flag: str = "--cuda") -> torch.device:
    """The GPU where one was asked for; an error, not the CPU, where there is none."""
    if cuda and not torch.cuda.is_available():
        raise RuntimeError(
            f"{flag} was given, but torch finds no CUDA device; leave it out to run on the CPU"
        )
    return torch.device("cuda" if cuda else "cpu")


def place_of(net: nn.Module) -> str:
    """Where a network lies, in words."""
    device = next((p.device for p in net.parameters()), torch.device("cpu"))
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"


def human_bytes(count: float) -> str:
    """A number of bytes with its unit: 1536 -> '1.5 kB' in powers of 1024."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TB"
