"""What all networks have in common as checkpoints: a state dict says which network it is of, and is
loaded whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from .architecture import KEY, decoded, encoded
from .entries import load_whole, number_misfit, refused


class SavedNetwork(nn.Module):
    """A network of `layers` whose state dict holds `architecture()` as a tensor of bytes."""

    layers: nn.ModuleList
    taken: tuple[str, ...] = ()  # settings that are not sizes: loading takes them over
    must_say = False  # whether a checkpoint without an architecture is refused
    load_state_dict = load_whole

    def architecture(self) -> dict[str, Any]:
        """What is needed to make a network of this shape: plain builtins by name."""
        raise NotImplementedError

    def differences(self, settings: Mapping[str, Any]) -> Iterator[str]:
        """What the architecture of a checkpoint says otherwise, so that its tensors would make
        another function here."""
        return iter(())

    def entry_misfits(self, state: Mapping[str, Any], prefix: str, strict: bool) -> Iterator[str]:
        """What of a checkpoint's architecture this network can't take over; see `entries`."""
        start = f"{prefix}layers."
        layers = {key[len(start) :].split(".")[0] for key in state if key.startswith(start)}
        if strict and len(layers) != len(self.layers):
            yield (
                f"the checkpoint has {len(layers)} layers, the network {len(self.layers)} "
                f"(L={len(self.layers) - 2})"
            )
        if prefix + KEY not in state:
            if strict and self.must_say:
                yield f"{prefix}{KEY} is missing"
            return
        try:
            settings = decoded(state[prefix + KEY])
        except ValueError as error:
            yield f"{prefix}{error}"
            return
        for name in self.taken:
            misfit = _setting_misfit(settings, name, getattr(self, name))
            if misfit:
                yield f"{prefix}{misfit}"
        yield from self.differences(settings)

    def get_extra_state(self) -> Tensor:
        return encoded(self.architecture())

    def set_extra_state(self, state: Any) -> None:
        settings = decoded(state)
        for name in self.taken:
            kind = bool if isinstance(getattr(self, name), bool) else float
            setattr(self, name, kind(settings[name]))

    def _load_from_state_dict(self, state, prefix, metadata, strict, missing, unexpected, errors):
        if refused(self, state, prefix, errors):
            return
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, unexpected, errors)
        if prefix + KEY in missing:
            missing.remove(prefix + KEY)


def _setting_misfit(settings: Mapping[str, Any], name: str, mine: Any) -> str | None:
    if name not in settings:
        return f"{KEY} lacks settings: {name} is not among {sorted(settings)}"
    if not isinstance(mine, bool):
        return number_misfit(settings[name], f"{KEY}: {name}")
    if not isinstance(settings[name], bool):
        return f"{KEY}: {name} is {settings[name]!r:.40}; True or False was expected"
    return None
