"""The state of the random number generators that training draws from."""

from __future__ import annotations

import random

import torch


def rng_state() -> dict:
    """States of torch (CPU and every CUDA device) and of Python's `random`, as tensors and
    builtins."""
    version, internal, gauss = random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "torch": torch.get_rng_state(),
        "cuda": cuda,
        "python": [version, list(internal), gauss],
    }


def set_rng_state(state: dict) -> None:
    """Go back to what `rng_state` returned. CUDA states are set for as many devices as are here."""
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available():
        for device, value in zip(range(torch.cuda.device_count()), state["cuda"]):
            torch.cuda.set_rng_state(value.cpu(), device)
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
