"""Which training samples made a prediction: for layers whose rows know the sample that they come
from.

A layer takes part if it has an `axis` (`pilimit_lib.core.Axis`, with `keep`) along which its output
is a *sum*, and an `origin` [m] that names the sample of each position (-1: unknown, the
initialisation say). π-layers do; nothing else is asked of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor, nn

from pilimit_lib.core import UNKNOWN, Axis, Change

from .data.ledger import as_array
from .errors import NotFound, Refused
from .neurons.tracked import undisturbed


@dataclass(frozen=True)
class Contributions:
    """What each sample's rows add to the output: `values` [s b o] for `ids` [s] (-1: rows of
    unknown origin), and `rest` [b o], which no row is responsible for (biases). `total()` is the
    output."""

    ids: Tensor
    values: Tensor
    rest: Tensor

    def total(self) -> Tensor:
        return self.values.sum(0) + self.rest

    def frame(self, item: int = 0, output: int | None = None) -> pd.DataFrame:
        """Contributions to one item of the batch, largest first: to one output, or their norm over
        all outputs."""
        chosen = self.values[:, item]
        size = torch.linalg.vector_norm(chosen, dim=1) if output is None else chosen[:, output]
        frame = pd.DataFrame(
            {"contribution": size.cpu().numpy()},
            index=pd.Index(self.ids.cpu().numpy(), name="sample_id"),
        )
        return frame.sort_values("contribution", key=abs, ascending=False, kind="stable")


class Provenance:
    """Samples behind the rows of a network. `readout` names the layer whose sum is taken apart
    (default: the last that runs)."""

    def __init__(self, model: nn.Module, readout: str | None = None) -> None:
        self.model = model
        self.layers = {
            path: module for path, module in model.named_modules() if _knows_its_samples(module)
        }
        if not self.layers:
            raise Refused(
                f"{type(model).__name__} has no layer with an `axis` and an `origin`: nothing in "
                "it knows its samples"
            )
        if readout is not None and readout not in self.layers:
            raise NotFound(
                f"no layer '{readout}' that knows its samples; there are {list(self.layers)}"
            )
        self.readout = readout

    def ids(self) -> Tensor:
        """The samples that made a row anywhere, ascending."""
        known = torch.cat([_origin(layer) for layer in self.layers.values()]).unique()
        return known[known != UNKNOWN]

    def rows(self) -> pd.DataFrame:
        """How many rows each sample made, by layer."""
        columns = {
            path: pd.Series(_origin(layer).numpy()).value_counts()
            for path, layer in self.layers.items()
        }
        return pd.DataFrame(columns).fillna(0).astype(int).rename_axis("sample_id").sort_index()

    @torch.no_grad()
    def contributions(self, x: Tensor) -> Contributions:
        """Take the output for `x` [b ...] apart by sample, exactly: the parts add up to `model(x)`.

        The rows meant are the readout's; rows of earlier layers shape what the readout's rows see.
        Between the readout and the output there may be a scale and a shift, nothing else.
        """
        with undisturbed(self.model):
            layer, inside, out, shift, scale = self._readout(x)
            origin = _origin(layer)
            ids = origin.unique()
            parts = dict(_split(layer, inside, ids))
            rest = _without_rows(layer)(inside)
            values = (
                torch.stack([parts[int(sample)] - rest for sample in ids])
                if len(ids)
                else out.new_zeros(0, *out.shape)
            )
        found = values.sum(0) + rest
        if not _equal(found, out):
            raise Refused(
                f"the output of {type(layer).__name__} is not the sum over its rows (off by "
                f"{float((found - out).abs().max()):.3g}), so it cannot be taken apart by sample"
            )
        return Contributions(ids, values * scale, rest * scale + shift)

    def _readout(self, x: Tensor) -> tuple[nn.Module, Tensor, Tensor, Tensor, float]:
        """The readout, its input and output, and what the rest of the model makes of the latter:
        shift + scale · output."""
        seen: list[tuple[nn.Module, Tensor, Tensor]] = []
        layers = [self.layers[self.readout]] if self.readout else list(self.layers.values())
        hooks = [
            layer.register_forward_hook(lambda m, args, out: seen.append((m, args[0], out)))
            for layer in layers
        ]
        try:
            answer = self.model(x)
        finally:
            for hook in hooks:
                hook.remove()
        if not seen:
            raise Refused("no layer that knows its samples took part in the forward pass")
        layer, inside, out = seen[-1]
        hook = layer.register_forward_hook(lambda m, args, out: torch.zeros_like(out))
        try:
            shift = self.model(x)
        finally:
            hook.remove()
        fits = isinstance(answer, Tensor) and answer.shape == out.shape
        scale = _ratio(answer - shift, out) if fits else 0.0
        if not fits or not _equal(scale * out, answer - shift):
            raise Refused(
                "between the readout and the output of the model there is more than a scale and a "
                "shift; "
                "take the part of the model that ends with the readout"
            )
        return layer, inside, out, shift, scale

    def remove(self, samples: Iterable[int] | Tensor) -> Change:
        """Remove every row that these samples made, in all layers; hand the change to
        `core.follow(optimizer, change)`.

        That takes away what they contributed. It is not the network that never learned from them:
        later steps saw what they had taught, and the input layer and biases keep it. Outputs move
        several times as far as training without the samples moves them; the lab's page has the
        table, and `pilimit_lib.inf.replay` trains again without them, exactly.
        """
        gone = self.known(samples)
        change = Change()
        for layer in self.layers.values():
            change = change + layer.axis.keep(~torch.isin(_origin(layer), gone))
        return change

    @torch.no_grad()
    def influence(
        self,
        x: Tensor,
        target: Tensor,
        loss: Callable[[Tensor, Tensor], Tensor],
        samples: Iterable[int] | Tensor | None = None,
    ) -> pd.DataFrame:
        """How the mean loss on `x`, `target` would change without each sample's rows (in all
        layers), largest change first.

        The rows of the others stay as they are: it is the effect of forgetting, not of never having
        learned. Costs a copy and a forward pass of the model per sample; `samples` limits them
        (default: all that made rows).
        """
        chosen = self.ids() if samples is None else self.known(samples)
        rows = []
        with undisturbed(self.model):
            base = float(loss(self.model(x), target).mean())
            for sample in chosen.tolist():
                without = copy.deepcopy(self.model)
                Provenance(without).remove([sample])
                rows.append(float(loss(without(x), target).mean()) - base)
        frame = pd.DataFrame({"influence": rows}, index=pd.Index(chosen.numpy(), name="sample_id"))
        return frame.sort_values("influence", key=abs, ascending=False, kind="stable")

    def known(self, samples: Iterable[int] | Tensor) -> Tensor:
        """These samples as a tensor of ids, after checking that each made a row."""
        wanted, known = torch.as_tensor(as_array(samples)).long().reshape(-1), self.ids()
        strange = wanted[~torch.isin(wanted, known)]
        if len(strange):
            raise NotFound(
                f"samples {strange[:10].tolist()} made no rows; {len(known)} samples did, "
                f"{known[:5].tolist()} ... "
                "(were forward passes run inside `with batch(ids)`?)"
            )
        return wanted.unique()


def _ratio(part: Tensor, whole: Tensor) -> float:
    """The factor that brings `whole` closest to `part`."""
    part, whole = part.double().flatten(), whole.double().flatten()
    return float(part @ whole / (whole @ whole).clamp_min(1e-300))


def _equal(one: Tensor, other: Tensor) -> bool:
    """Up to rounding of sums of many terms, measured by the largest entry."""
    bound = 1e-9 if other.dtype == torch.float64 else 1e-4
    return float((one - other).abs().max()) <= bound * float(other.abs().max())


def _knows_its_samples(module: nn.Module) -> bool:
    return isinstance(getattr(module, "axis", None), Axis) and isinstance(
        getattr(module, "origin", None), Tensor
    )


def _origin(layer: nn.Module) -> Tensor:
    return layer.origin.cpu()


def _keeping(layer: nn.Module, rows: Tensor) -> nn.Module:
    part = copy.deepcopy(layer)
    part.axis.keep(rows)
    return part


def _without_rows(layer: nn.Module) -> nn.Module:
    return _keeping(layer, torch.zeros(0, dtype=torch.long))


def _split(layer: nn.Module, inside: Tensor, ids: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The layer's output with the rows of each sample alone. Halving the samples copies each row
    log₂(samples) times only."""
    if len(ids) == 0:
        return
    part = _keeping(layer, torch.isin(_origin(layer), ids).nonzero().squeeze(1))
    if len(ids) == 1:
        yield int(ids[0]), part(inside)
        return
    half = len(ids) // 2
    yield from _split(part, inside, ids[:half])
    yield from _split(part, inside, ids[half:])
