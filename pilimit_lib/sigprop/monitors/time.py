"""Seconds spent in each propagator."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from ..propagators.base import propagators_in


class Time:
    """Inside its `with`, adds up the seconds of every propagator of `model`, learning included:
    `seconds` and `calls` by path.

    On an accelerator each layer is waited for, which makes the sum longer than the step.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        name: str = "time",
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.name, self.model, self.clock = name, model, clock
        self.reset()

    def reset(self) -> None:
        """Start counting anew."""
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, int] = {}

    def __enter__(self) -> Time:
        self._handles = []
        for path, propagator in propagators_in(self.model):
            started: list[float] = []
            self._handles += [
                propagator.register_forward_pre_hook(self._start(started)),
                propagator.register_forward_hook(self._stop(path, started)),
            ]
        return self

    def __exit__(self, *error) -> None:
        for handle in self._handles:
            handle.remove()

    def as_dict(self) -> dict[str, float]:
        return dict(self.seconds)

    def metrics(self) -> str:
        """One line per propagator for the terminal."""
        return "\n".join(
            f"{self.name} {path}: {self.seconds[path]:.4f} s in {self.calls[path]} calls"
            for path in self.seconds
        )

    def _now(self) -> float:
        if any(p.is_cuda for _, p in self.model.named_parameters()):
            torch.cuda.synchronize()
        return self.clock()

    def _start(self, started: list[float]):
        return lambda module, args: started.append(self._now())

    def _stop(self, path: str, started: list[float]):
        def hook(module, args, out):
            self.seconds[path] = self.seconds.get(path, 0.0) + self._now() - started.pop()
            self.calls[path] = self.calls.get(path, 0) + 1

        return hook
