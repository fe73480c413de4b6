"""What growth does to a network: adding dendrites, and the phases of correlation training."""

import difflib
import hashlib
from typing import TYPE_CHECKING

import torch
from torch import nn

from ...core import Change, follow, parameters_of, restore
from .. import distributed
from ..conversion import dendritic_layers
from ..layers.layer import DendriticLayer

if TYPE_CHECKING:
    from ..growth import Growth


def initial_seed() -> int:
    """The seed that torch started with, the same on every rank."""
    halves = divmod(torch.initial_seed(), 1 << 32)
    high, low = (int(v) for v in distributed.agree([float(h) for h in halves]))
    return (high << 32) + low


def generator_for(seed: int, layer: str, generation: int, attempt: int) -> torch.Generator:
    """Random numbers that depend on nothing else: not on the device, the rank, or what was drawn
    before."""
    digest = hashlib.blake2b(
        f"{seed}|{layer}|{generation}|{attempt}".encode(), digest_size=8
    ).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def add_dendrites(growth: "Growth", action: str) -> tuple[str, ...]:
    """One dendrite for each chosen layer; the optimiser follows. Nothing changes unless every layer
    can grow."""
    layers = dict(dendritic_layers(growth.network))
    chosen = list(layers) if growth.select is None else list(growth.select(growth.network))
    for name in chosen:
        if name not in layers:
            near = difflib.get_close_matches(name, layers, n=3)
            raise ValueError(
                f"select named '{name}', which is no dendritic layer"
                + (f"; did you mean {near}?" if near else "")
            )
    idle = [name for name in chosen if layers[name].neurons is None]
    if idle:
        raise RuntimeError(
            f"layers {idle} took no part in any forward pass, so it is not known how many neurons "
            "they have; "
            "track them (DendriteConfig(track=['."
            + idle[0]
            + "'])), or run one batch before the first step"
        )
    state = growth.plateau.state
    candidate = growth.config.mode == "correlation"
    change = Change()
    for name in chosen:
        dendrite = layers[name].grow(
            generator_for(growth.seed, name, state.dendrites, state.tries), candidate
        )
        change += adding(layers[name], dendrite, growth.optimizer)
    if growth.optimizer is not None:
        follow(growth.optimizer, change)
    growth.candidates = {}
    return tuple(chosen)


def adding(layer: DendriticLayer, dendrite: nn.Module, optimizer) -> Change:
    """New parameters are optimised like the layer's own; like the last group where the optimiser
    does not hold those (frozen neurons)."""
    held = {id(p) for p in parameters_of(optimizer)} if optimizer is not None else set()
    beside = next((p for p in layer.neuron.parameters() if id(p) in held), None)
    change = Change()
    for parameter in dendrite.parameters():
        change += Change.adding(parameter, beside)
    return change


def removing(dendrite: nn.Module) -> Change:
    change = Change()
    for parameter in dendrite.parameters():
        change += Change.removing(parameter)
    return change


# --- correlation training
# -----------------------------------------------------------------------------------------------------


def set_trainable(growth: "Growth") -> None:
    """Who learns now. Joint training: everything that the user did not freeze. Correlation: phase n
    the neurons and all w, phase p the candidates."""
    if growth.config.mode != "correlation":
        return
    candidates_learn = growth.plateau.state.phase == "p"
    frozen = set(growth.frozen)
    for name, parameter in growth.network.named_parameters():
        parameter.requires_grad_(not candidates_learn and name not in frozen)
        parameter.grad = None  # a left-over gradient would still move a frozen parameter
    for _, layer in dendritic_layers(growth.network):
        for dendrite in layer.dendrites:
            for parameter in dendrite.parameters():
                parameter.requires_grad_(dendrite.candidate)
            dendrite.w.requires_grad_(not dendrite.candidate and not candidates_learn)


def candidate_scores(growth: "Growth") -> dict[str, list[float]]:
    """S_i of every candidate over the last epoch, by layer; the best weights of each layer are kept
    aside."""
    result = {}
    for name, layer in dendritic_layers(growth.network):
        for dendrite in layer.dendrites:
            if not dendrite.candidate:
                continue
            scores = distributed.agree(
                dendrite.stats.take_scores().tolist(), "mean", dendrite.w.device
            )
            result[name] = scores
            if name not in growth.candidates or sum(scores) > growth.candidates[name]["score"]:
                weights = {
                    key: value.detach().clone()
                    for key, value in dendrite.state_dict().items()
                    if not key.startswith("stats.")
                }
                growth.candidates[name] = {"score": sum(scores), "weights": weights}
    return result


def mature(growth: "Growth") -> None:
    """Candidates become dendrites with their best weights and w = 0; the rest of the network is as
    it was before the phase."""
    restore(growth.network, growth.base, growth.optimizer if "optimizer" in growth.base else None)
    for name, layer in dendritic_layers(growth.network):
        for dendrite in layer.dendrites:
            if dendrite.candidate:
                dendrite.stats = None
                if name in growth.candidates:
                    dendrite.load_state_dict(growth.candidates[name]["weights"])
    growth.candidates = {}
