"""Recorded runs of the original code, where they are at hand."""

from pathlib import Path

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).resolve().parents[3] / "shared" / "fixtures" / "pilimit"


def found(pattern):
    """The fixture files of this pattern, as pytest parameters; one skipped parameter where the
    folder is absent."""
    files = sorted(FOLDER.glob(pattern))
    if not files:
        return [
            pytest.param(
                None, marks=pytest.mark.skip(reason=f"no {pattern} at ../shared/fixtures/pilimit")
            )
        ]
    return [pytest.param(f, id=f.stem) for f in files]


def arrays(file, dtype=torch.float32):
    """{name: tensor | scalar | str} of an .npz; floating arrays in dtype."""
    with np.load(file) as f:
        out = {}
        for key in f.files:
            value = f[key]
            if value.ndim == 0:
                out[key] = value.item()
            else:
                tensor = torch.from_numpy(value)
                out[key] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        return out
