"""Neuron statistics as a frame and as the documented text, and pictures of the samples worth
looking at."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..data.ledger import hardest
from ..neurons.counters import COUNTERS
from ..neurons.tracked import undisturbed
from ..run.session import Session

SIDE = 32  # thumbnails are stored at most this large


def neuron_frame(session: Session) -> pd.DataFrame:
    """One row per neuron, in the order of the layers."""
    paths = session.paths()
    return neuron_rows(
        [
            (paths[layer], session.neurons[layer].state_dict(), not layer.weight.requires_grad)
            for layer in session.layers()
        ]
    )


def neuron_rows(layers: list[tuple[str, dict[str, Tensor], bool]]) -> pd.DataFrame:
    """The same from stored counters: path, tensors and whether frozen, per layer."""
    parts = []
    for index, (path, state, frozen) in enumerate(layers):
        columns = {name: state[name].cpu().numpy() for name in COUNTERS}
        with np.errstate(invalid="ignore"):  # no samples seen: the rate is NaN
            rates = {
                f"{name}_rate": columns[f"{name}_triggers"] / columns[f"{name}_seen"]
                for name in ("train", "eval")
            }
        parts.append(
            pd.DataFrame(
                {
                    "layer_index": index,
                    "layer": path,
                    "neuron": np.arange(len(state["rate"])),
                    **columns,
                    **rates,
                    "learning_rate": state["rate"].cpu().numpy(),
                    "frozen": frozen,
                }
            )
        )
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def text(session: Session) -> str:
    """Trigger rates in the documented form: triggers / samples, two lines a neuron."""
    lines = ["trigger_rate (triggers_count / number_of_seen_samples)"]
    frame = neuron_frame(session)
    for (index, path), rows in (
        frame.groupby(["layer_index", "layer"], sort=False) if len(frame) else []
    ):
        lines.append(f"Layer {index} ({path}){'  frozen' if rows['frozen'].iloc[0] else ''}")
        for row in rows.itertuples():
            for title, name in ((f"Neuron {row.neuron:05d}", "train"), ("            ", "eval ")):
                triggers, seen = (
                    getattr(row, f"{name.strip()}_triggers"),
                    getattr(row, f"{name.strip()}_seen"),
                )
                lines.append(
                    f"{title}:  {name}: {triggers / seen if seen else 0.0:8.4f} ({triggers:10d} / "
                    f"{seen:10d})"
                )
    return "\n".join(lines)


def most_forgotten(frame: pd.DataFrame, count: int) -> pd.DataFrame:
    """The samples forgotten most often; between equals, those whose true class got the least
    probability."""
    return frame.sort_values(
        ["forgotten", "confidence"], ascending=[False, True], kind="stable"
    ).head(count)


def thumbnails(session: Session, count: int = 24) -> dict[str, Any]:
    """Pictures of the hardest and of the most forgotten training samples, small, as uint8 [h w] or
    [h w 3] by sample id; none if not images."""
    if session.loader is None:
        return {"ids": [], "images": []}
    frame = session.loader.dataset.get_dataframe()
    ids = list(dict.fromkeys([*hardest(frame, count).index, *most_forgotten(frame, count).index]))
    with undisturbed(session.module):  # transforms may draw random numbers
        images = [_thumbnail(session, sample) for sample in ids]
    kept = [(sample, image) for sample, image in zip(ids, images) if image is not None]
    return {"ids": [sample for sample, _ in kept], "images": [image for _, image in kept]}


def _thumbnail(session: Session, sample: int) -> Tensor | None:
    item = session.loader.dataset[sample]
    image = item[0] if isinstance(item, list | tuple) else item
    if (
        not isinstance(image, Tensor)
        or image.ndim not in (2, 3)
        or (image.ndim == 3 and image.shape[0] not in (1, 3))
    ):
        return None
    image = image.detach().float().cpu()
    image = image.unsqueeze(0) if image.ndim == 2 else image
    if max(image.shape[1:]) > SIDE:
        scale = SIDE / max(image.shape[1:])
        image = torch.nn.functional.interpolate(image[None], scale_factor=scale, mode="area")[0]
    low, high = float(image.min()), float(image.max())
    image = (
        ((image - low) / (high - low) * 255 if high > low else image * 0).round().to(torch.uint8)
    )
    return image[0].contiguous() if image.shape[0] == 1 else image.permute(1, 2, 0).contiguous()
