"""Bytes that autograd keeps for backward passes."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Memory:
    """Counts inside its `with` the bytes saved for backward: `peak` at one time, `total` over all,
    `held` now.

    Tensors that share storage count once; the storages of `parameters` do not count, they exist
    anyway.
    """

    def __init__(self, model: nn.Module | None = None, name: str = "memory"):
        self.name = name
        self._own = (
            set()
            if model is None
            else {p.untyped_storage().data_ptr() for _, p in model.named_parameters()}
        )
        self.reset()

    def reset(self) -> None:
        """Start counting anew."""
        self.held = self.peak = self.total = 0
        self._uses: dict[int, int] = {}

    def __enter__(self) -> Memory:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: _Held(self, tensor), lambda held: held.tensor
        )
        self._hooks.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._hooks.__exit__(*error)

    def as_dict(self) -> dict[str, float]:
        return {"peak": self.peak, "total": self.total, "held": self.held}

    def metrics(self) -> str:
        """One line for the terminal."""
        return (
            f"{self.name}: {self.peak / 2**20:.2f} MiB saved for backward at most, "
            f"{self.total / 2**20:.2f} MiB in all"
        )

    def _take(self, key: int, size: int) -> None:
        self._uses[key] = self._uses.get(key, 0) + 1
        if self._uses[key] == 1:
            self.held += size
            self.total += size
            self.peak = max(self.peak, self.held)

    def _drop(self, key: int, size: int) -> None:
        # A graph can outlive a reset.
        if key in self._uses:
            self._uses[key] -= 1
            if not self._uses[key]:
                del self._uses[key]
                self.held -= size


class _Held:
    """A saved tensor, counted for as long as the graph holds it."""

    def __init__(self, memory: Memory, tensor: Tensor):
        storage = tensor.untyped_storage()
        self.tensor, self.memory = tensor, memory
        self.key, self.size = storage.data_ptr(), storage.nbytes()
        self.counts = self.key not in memory._own
        if self.counts:
            memory._take(self.key, self.size)

    def __del__(self) -> None:
        if self.counts:
            self.memory._drop(self.key, self.size)
