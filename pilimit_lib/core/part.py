"""How a stretch of rows is stored, and where."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Allocate = Callable[[tuple[int, ...], torch.dtype, torch.device], Tensor]


def in_memory(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Where blocks lie unless told otherwise: in the memory of their device."""
    return torch.empty(shape, dtype=dtype, device=device)


@dataclass(frozen=True)
class StoredRows:
    """Rows as they are stored: `values` [k, *tail] stand for values · scale + shift, with `scale`
    and `shift` per row or one."""

    values: Tensor
    scale: float | Tensor = 1.0
    shift: Tensor | None = None

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The rows themselves in `dtype`; without copying where they are stored so."""
        dense = self.values.to(dtype)
        if not isinstance(self.scale, float) or self.scale != 1.0:
            dense = dense * (
                self._column(self.scale, dtype) if isinstance(self.scale, Tensor) else self.scale
            )
        return dense if self.shift is None else dense + self._column(self.shift, dtype)

    def _column(self, per_row: Tensor, dtype: torch.dtype) -> Tensor:
        return per_row.to(dtype).reshape(-1, *[1] * (self.values.ndim - 1))
