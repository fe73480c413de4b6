"""Everything that going on bit for bit depends on, as plain tensors and builtins."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
import torch

from ...core import follow, restore, rng_state, set_rng_state, snapshot
from ..neurons.tracked import TrackedNetwork, undisturbed
from .session import Session
from .structure import check_fits, digest, resize, sizes

FORMAT = 1


def network_state(session: Session) -> dict[str, Any]:
    """Model and optimiser with their sizes, counters, rates, frozen parameters and age."""
    paths = session.paths()
    return {
        "snapshot": snapshot(session.module, session.optimizer),
        "sizes": sizes(session.module),
        "neurons": {
            paths[layer]: {name: value.clone() for name, value in neurons.state_dict().items()}
            for layer, neurons in session.neurons.items()
        },
        "frozen": [
            name
            for name, parameter in session.module.named_parameters()
            if not parameter.requires_grad
        ],
        "age": session.age,
        "steps": session.steps,
    }


def full_state(session: Session) -> dict[str, Any]:
    """`network_state`, the ledgers, the position in the epoch, every random generator, and what the
    user asked to keep."""
    loaders = session.loaders()
    return {
        "lab": FORMAT,
        "network": network_state(session),
        "ledgers": {name: loader.dataset.ledger.state() for name, loader in loaders.items()},
        "loaders": {name: loader.state() for name, loader in loaders.items()},
        "rng": {"core": rng_state(), "numpy": _numpy_state()},
        "settings": session.settings(),
        "window": list(session.window),
        "also": _plain({name: thing.state_dict() for name, thing in session.also.items()}),
    }


def hashes(state: dict[str, Any]) -> dict[str, str]:
    """What a checkpoint is of, in three short hashes."""
    served = {
        name: [
            digest(part["columns"]["denied"].nonzero().flatten().tolist()),
            {tag: digest(mask.nonzero().flatten().tolist()) for tag, mask in part["tags"].items()},
        ]
        for name, part in state["ledgers"].items()
    }
    where = {
        name: [entry["epoch"], entry["position"], entry["seed"]]
        for name, entry in state["loaders"].items()
    }
    structure = [state["network"]["sizes"], state["network"]["snapshot"]["structure"]]
    return {
        "structure": digest(structure),
        "data": digest([served, where]),
        "settings": digest(state["settings"]),
    }


def _set_network(session: Session, state: dict[str, Any]) -> None:
    change = resize(session.module, state["sizes"])
    if session.optimizer is not None:
        follow(session.optimizer, change)
    restore(session.module, state["snapshot"], session.optimizer)
    for name, parameter in session.module.named_parameters():
        parameter.requires_grad_(name not in state["frozen"]).grad = None
    modules = dict(session.module.named_modules())
    for path, values in state["neurons"].items():
        session.neurons[modules[path]].load(values)
    session.age, session.steps = state["age"], state["steps"]
    if isinstance(session.module, TrackedNetwork):
        session.module.__dict__["_age"] = state["age"]
    session.forget_plans()


def set_full_state(session: Session, state: dict[str, Any]) -> None:
    """Go back to a `full_state`. Whatever does not fit is found before anything changes."""
    if not isinstance(state, dict) or state.get("lab") != FORMAT:
        raise ValueError(
            "not a checkpoint of the lab (format "
            f"{state.get('lab') if isinstance(state, dict) else None!r}, "
            f"this version reads {FORMAT})"
        )
    loaders = session.loaders()
    for name, part in state["ledgers"].items():
        if name not in loaders:
            raise ValueError(
                f"the checkpoint keeps a ledger of the {name} set, but no such loader is watched "
                "here"
            )
        loaders[name].dataset.ledger.check_state(part)
        loaders[name].check_state(state["loaders"][name])
    missing = sorted(set(state["also"]) ^ set(session.also))
    if missing:
        raise ValueError(
            f"{missing} is in `also=` on one side only, here or in the checkpoint; watch the same "
            "things"
        )
    stored, here = state["settings"]["optimizer"], type(session.optimizer).__name__
    if session.optimizer is not None and stored != here:
        raise ValueError(
            f"the checkpoint's optimiser is of class {stored}, here it is {here}, to which its "
            f"state means something else; to go on from it, build this run with {stored}"
        )
    check_fits(session.module, state["network"]["sizes"])
    check_same_data(session, state)
    before = full_state(session)
    try:
        _set_full(session, state)
    except Exception:
        _set_full(session, before)
        raise


def fingerprints(session: Session) -> dict[str, Any]:
    """What the data sets hold in a few places, to be compared when a checkpoint is loaded."""
    with undisturbed(session.module):  # transforms may draw random numbers
        return {name: loader.dataset.fingerprint() for name, loader in session.loaders().items()}


def check_same_data(session: Session, state: dict[str, Any]) -> None:
    """Raise where the checkpoint was written with other data: another number or label at some
    position. Other arrays may come of other transforms, and are warned of."""
    stored = state.get("data", {})
    for name, here in fingerprints(session).items() if stored else ():
        differ = {"labels": [], "arrays": []}
        for position, (one, other) in enumerate(zip(stored[name], here)):
            if [size for size, _ in one] != [size for size, _ in other]:
                differ["arrays"].append(position)
            for (size, key), (_, now) in zip(one, other):
                if key != now and None not in (key, now):
                    differ["labels" if size == 1 else "arrays"].append(position)
        what = f"checked at {len(here)} places, the {name} set is not the one of the checkpoint"
        if differ["labels"]:
            raise ValueError(
                f"{what}: labels differ at {len(set(differ['labels']))} of them. Its ledger would "
                "speak of other samples; load it with the data set that it was written for"
            )
        if differ["arrays"]:
            warnings.warn(
                f"{what}: the labels are the same, the inputs differ at "
                f"{len(set(differ['arrays']))} of them (other transforms, or other data)",
                stacklevel=4,
            )


def _set_full(session: Session, state: dict[str, Any]) -> None:
    loaders = session.loaders()
    _set_network(session, state["network"])
    for name, part in state["ledgers"].items():
        loaders[name].dataset.ledger.load_state(part)
        loaders[name].load_state(state["loaders"][name])
    for name, part in state["also"].items():
        session.also[name].load_state_dict(part)
    session.window[:] = [list(entry) for entry in state["window"]]
    set_rng_state(state["rng"]["core"])
    _set_numpy_state(state["rng"]["numpy"])


def _numpy_state() -> list[Any]:
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss]


def _set_numpy_state(state: list[Any]) -> None:
    kind, keys, position, has_gauss, gauss = state
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))


def _plain(also: dict[str, Any]) -> dict[str, Any]:
    """Refuse now what could not be loaded later without executing code."""
    for name, value in also.items():
        buffer = io.BytesIO()
        torch.save(value, buffer)
        buffer.seek(0)
        try:
            torch.load(buffer, weights_only=True)
        except Exception as error:
            raise ValueError(
                f"the state_dict of also['{name}'] holds more than plain tensors and builtins, so "
                "it could not be "
                f"loaded safely: {error}"
            ) from error
    return also
