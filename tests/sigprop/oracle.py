"""The formulas of the losses in plain float64 loops and numpy: an independent second
computation."""

from __future__ import annotations

import numpy as np


def similar(h: np.ndarray, t: np.ndarray) -> np.ndarray:
    """y_ij = (1/S) sum_s sum_c h_ics t_jcs, one entry at a time."""
    positions = int(np.prod(h.shape[2:]))
    y = np.zeros((len(h), len(t)))
    for i in range(len(h)):
        for j in range(len(t)):
            y[i, j] = float((h[i].astype(np.float64) * t[j].astype(np.float64)).sum()) / positions
    return y


def log_softmax(y: np.ndarray) -> np.ndarray:
    return (
        y
        - y.max(1, keepdims=True)
        - np.log(np.exp(y - y.max(1, keepdims=True)).sum(1, keepdims=True))
    )


def v9(h1, t1, t0) -> float:
    g = similar(t0, t0)
    w = (np.abs(g - g.max(1, keepdims=True)) < 1e-12).astype(float)
    return float(-(w * log_softmax(similar(h1, t1))).sum(1).mean())


def v14_first(h1, t1, t0) -> float:
    chosen = similar(t0, t0).argmax(1)
    return float(-log_softmax(similar(h1, t1))[np.arange(len(h1)), chosen].mean())


def v15(h1, t1, t0, k: int) -> float:
    g = similar(t0, t0)
    w = np.zeros_like(g)
    for i, row in enumerate(g):
        w[i, np.argsort(-row)[:k]] = 1
    return float(-(w * log_softmax(similar(h1, t1))).sum(1).mean())


def v1(h1, t1, labels) -> float:
    return float(-log_softmax(similar(h1, t1))[np.arange(len(h1)), labels].mean())


def slope(f, x: np.ndarray, direction: np.ndarray, step: float = 1e-6) -> float:
    """Derivative of f at x along a direction, by central differences."""
    return (f(x + step * direction) - f(x - step * direction)) / (2 * step)
