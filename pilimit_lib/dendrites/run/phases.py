"""What growth does to a network: adding dendrites, and the phases of correlation training."""

import difflib
import warnings
from collections.abc import Mapping

import torch

from .. import distributed
from ..conversion import dendritic_layers
from ..layers.gradient import ErrorRows, begin, linear_part
from ..layers.initial import generator_for
from ..layers.layer import DendriticLayer
from ..observe import observe
from .optimizers import include
from .run import Run


def add_dendrites(run: Run) -> tuple[str, ...]:
    """Add one dendrite to each chosen layer; the optimiser follows. Nothing changes unless every
    layer can grow."""
    layers = dict(dendritic_layers(run.network))
    acting = [name for name, layer in layers.items() if not layer.bypassed]
    chosen = acting if run.select is None else list(run.select(run.network))
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
            f"they have; track them (DendriteConfig(track=['.{idle[0]}'])), or run one batch "
            "before the first step"
        )
    state = run.plateau.state
    candidate = run.config.mode == "correlation"
    grown = []
    try:
        for name in chosen:
            generator = generator_for(run.seed, name, state.dendrites, state.tries)
            layers[name].grow(generator, candidate)
            grown.append(layers[name])
        if run.config.init == "gradient":
            begin_by_gradient(run, {name: layers[name] for name in chosen})
    except Exception:
        for layer in grown:
            del layer.dendrites[-1]
        raise
    if run.optimizer is not None:
        include(run, chosen)
    run.candidates = {}
    return tuple(chosen)


def begin_by_gradient(run: Run, layers: Mapping[str, DendriticLayer]) -> None:
    """Direct the newest dendrites by the errors of training batches; each further try of a
    generation takes the next best directions."""
    watchers = {}
    for name, layer in layers.items():
        part = linear_part(layer.dendrites[-1].body)
        if part is not None and layer.processor_class is None:
            watchers[name] = ErrorRows(layer, part[0])
    if not watchers:
        return
    observe(run.network, layers, watchers, run.losses)
    for name, watcher in watchers.items():
        if watcher.x:
            begin(
                layers[name].dendrites[-1],
                torch.cat(watcher.x),
                torch.cat(watcher.e),
                run.config.activate,
                run.plateau.state.tries - 1,
            )


def name_bypassed(run: Run) -> None:
    """Say, once for each, which layers are used without being called."""
    found = {name for name, layer in dendritic_layers(run.network) if layer.bypassed}
    for name in sorted(found - run.bypassed):
        warnings.warn(
            f"layer '{name}' was never called, only its weights were read (as in F.linear(x, "
            f"layer.weight)): dendrites would never act, so it gets none. Call the layer, or track "
            f"it: DendriteConfig(track=['.{name}'])",
            stacklevel=3,
        )
    run.bypassed |= found


def set_trainable(run: Run) -> None:
    """Who learns now. Joint training: everything that the user did not freeze. Correlation: phase n
    the neurons and all w, phase p the candidates."""
    if run.config.mode != "correlation":
        return
    candidates_learn = run.plateau.state.phase == "p"
    frozen = set(run.frozen)
    for name, parameter in run.network.named_parameters():
        parameter.requires_grad_(not candidates_learn and name not in frozen)
        parameter.grad = None  # a left-over gradient would still move a frozen parameter
    for _, layer in dendritic_layers(run.network):
        for dendrite in layer.dendrites:
            for parameter in dendrite.parameters():
                parameter.requires_grad_(dendrite.candidate)
            dendrite.w.requires_grad_(not dendrite.candidate and not candidates_learn)


def candidate_scores(run: Run) -> dict[str, list[float]]:
    """S_i of every candidate over the last epoch, by layer; the best weights of each layer are kept
    aside, and candidates that a step made infinite go back to them."""
    result = {}
    for name, layer in dendritic_layers(run.network):
        for k, dendrite in enumerate(layer.dendrites):
            if not dendrite.candidate:
                continue
            scores = dendrite.stats.take_scores()
            scores = distributed.agree(scores.tolist(), "mean", dendrite.w.device)
            result[name] = scores
            kept = run.candidates.get(name)
            weights = {
                key: value.detach().clone()
                for key, value in dendrite.state_dict().items()
                if not key.startswith("stats.")
            }
            if not all(value.isfinite().all() for value in weights.values()):
                start = f"{name}.dendrites.{k}." if name else f"dendrites.{k}."
                born = {key: run.base["model"][start + key] for key in weights}
                dendrite.load_state_dict(born if kept is None else kept["weights"], strict=False)
                for parameter in dendrite.parameters() if run.optimizer is not None else ():
                    run.optimizer.state.pop(parameter, None)  # its moments are infinite too
            elif kept is None or sum(scores) > kept["score"]:
                run.candidates[name] = {"score": sum(scores), "weights": weights}
    return result


def mature(run: Run) -> None:
    """Candidates become dendrites with their best weights and w = 0; the rest of the network is as
    it was before the phase."""
    run.restore(run.base)
    for name, layer in dendritic_layers(run.network):
        for dendrite in layer.dendrites:
            if dendrite.candidate:
                dendrite.stats = None
                if name in run.candidates:
                    dendrite.load_state_dict(run.candidates[name]["weights"])
    run.candidates = {}
