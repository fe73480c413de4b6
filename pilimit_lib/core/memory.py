"""How much memory is left."""

from __future__ import annotations

import os

import torch


def free_memory(device: torch.device | str | None = None) -> int | None:
    """Bytes that an allocation on `device` may still take without swapping, None where the system
    does not say. `device`: torch's default device where it is None."""
    kind = torch.device(device if device is not None else torch.get_default_device())
    if kind.type == "cuda":
        return torch.cuda.mem_get_info(kind)[0]
    if kind.type != "cpu":
        return None
    try:
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass  # no such file on this system: the next question
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
