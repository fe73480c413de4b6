"""What the documented system does to whole networks: convert, save, load, count."""

import copy
from pathlib import Path

from torch import nn

from pilimit_lib.core import restore, save, snapshot

from .. import distributed, spelling
from ..conversion import dendritic, dendritic_layers, report, save_plain
from ..layers.layer import DendriticLayer
from ..run.packing import load_state
from . import GPA

__all__ = [
    "change_learning_modes",
    "convert_network",
    "count_params",
    "deep_copy_pai",
    "get_pai_modules",
    "initialize_pai",
    "load_net",
    "load_net_from_dict",
    "load_system",
    "pai_save_system",
    "save_net",
    "save_system",
    "simulate_cycles",
]

LINE = "-" * 66


__getattr__ = spelling.reader("UPA", __all__, globals())


def initialize_pai(
    model: nn.Module,
    doing_pai: bool = True,
    save_name: str | None = None,
    making_graphs: bool = True,
    maximizing_score: bool = True,
    num_classes: float = 1e10,
    values_per_train_epoch: int = -1,
    values_per_val_epoch: int = -1,
    zooming_graph: bool = True,
) -> nn.Module:
    """Convert the network and begin to follow it with GPA.pai_tracker; returns the network.

    ``save_name``: the folder for what is written (default: GPA.pc.get_save_name(), "PAI").
    ``doing_pai=False``: no dendrites, finished at the first plateau. ``maximizing_score=False``:
    the score is a loss. The last four are accepted and not needed.
    """
    model = convert_network(model)
    GPA.pai_tracker = type(GPA.pai_tracker)(doing_pai, save_name)
    GPA.pai_tracker.initialize(model, doing_pai, save_name, making_graphs, maximizing_score)
    _list_unwrapped(model)
    return model


def convert_network(net: nn.Module, layer_name: str = "") -> nn.Module:
    """Make the layers of a network dendritic by the settings of GPA.pc, in place; returns the
    network.

    ``layer_name``: the network's own name inside a larger one, for messages.
    """
    tracker = GPA.pai_tracker
    net = dendritic(net, tracker.config())
    if layer_name:
        for _, layer in dendritic_layers(net):
            layer.name = f"{layer_name}.{layer.name}" if layer.name else layer_name
    tracker._converted = net
    return net


def _list_unwrapped(model: nn.Module) -> None:
    if (
        GPA.pc.get_silent()
        or GPA.pc.get_unwrapped_modules_confirmed()
        or not distributed.is_first()
    ):
        return
    found = report(model)
    for title, names in (
        ("not wrapped", found.unwrapped_parameters),
        ("not tracked or wrapped", found.untracked_parameters),
    ):
        if names:
            print(f"The following params are {title}.", LINE, *names, LINE, sep="\n")
    if found.untracked_parameters:
        print(
            "They get no dendrites. Track them with GPA.pc.append_module_names_to_track([...]), or "
            "say that this is meant with "
            "GPA.pc.set_unwrapped_modules_confirmed(True)"
        )
    if found.bare_norms:
        print(
            f"Norm layers outside of dendritic blocks: {', '.join(found.bare_norms)}. "
            "Dendrites do better when a norm is in one block with the "
            "layer before it: GPA.pc.PAISequential([layer, norm])"
        )


def save_system(net: nn.Module, folder: str, name: str) -> None:
    """Write the whole run (network, optimiser, decisions) to ``folder/name.pt``."""
    GPA.pai_tracker._check_network(distributed.unwrap(net))
    GPA.pai_tracker.growth.save(Path(folder) / f"{name}.pt")


def load_system(
    net: nn.Module,
    folder: str,
    name: str,
    load_from_restart: bool = False,
    switch_call: bool = False,
    load_from_manual_save: bool = False,
) -> nn.Module:
    """Continue from ``folder/name.pt``: 'latest', 'best_model', or what save_system wrote; returns
    the network.

    Call it after initialize_pai and set_this_input_dimensions, before setup_optimizer, which then
    continues in the saved state. The last three are accepted for the sake of documented calls; the
    file itself says what it holds.
    """
    tracker = GPA.pai_tracker
    tracker._check_network(distributed.unwrap(net))
    tracker.growth.load(Path(folder) / f"{name}.pt")
    return tracker.growth.model


def pai_save_system(net: nn.Module, folder: str, name: str) -> None:
    """Write the network alone, without dendrite machinery, as a plain state_dict:
    ``folder/name_pai.pt``. In a fresh process: ``load_net(convert_network(model), folder,
    f"{name}_pai")``."""
    save_plain(distributed.unwrap(net), Path(folder) / f"{name}_pai.pt")


def save_net(net: nn.Module, folder: str, name: str) -> None:
    """Write the network alone, with the structure that load_net needs."""
    save(snapshot(distributed.unwrap(net)), Path(folder) / f"{name}.pt")


def load_net(net: nn.Module, folder: str, name: str) -> nn.Module:
    """Bring a converted network to what a file holds, whichever of the functions here wrote it; the
    tracker is left alone."""
    return load_net_from_dict(net, load_state(Path(folder) / f"{name}.pt"))


def load_net_from_dict(net: nn.Module, state_dict: dict) -> nn.Module:
    """The same from a plain state_dict, a snapshot or a whole run in memory."""
    network = distributed.unwrap(net)
    state = state_dict.get("now", state_dict)
    if "structure" in state and "model" in state:
        restore(network, state)
    else:
        network.load_state_dict(state)
    return net


def count_params(net: nn.Module) -> int:
    """How many parameters the network has, each once."""
    return sum(p.numel() for p in net.parameters())


def get_pai_modules(net: nn.Module, depth: int = 0) -> list[DendriticLayer]:
    """The dendritic layers, in order."""
    return [layer for _, layer in dendritic_layers(net)]


def deep_copy_pai(net: nn.Module) -> nn.Module:
    """A copy; processors forget what belongs to a running sequence."""
    return copy.deepcopy(net)


def change_learning_modes(
    net: nn.Module, folder: str, name: str, doing_pai: bool = True
) -> nn.Module:
    """Add dendrites now, from the network as it is, and save the run to ``folder/name.pt``; set up
    the optimiser afterwards."""
    if not doing_pai:
        return net
    model = GPA.pai_tracker.growth.grow_now().model
    save_system(model, folder, name)
    return model


def simulate_cycles(module: nn.Module, num_cycles: int, doing_pai: bool = True) -> nn.Module:
    """Add the dendrites of so many cycles at once (two cycles, neurons and dendrites, make one),
    without training in between."""
    for _ in range(num_cycles // 2 if doing_pai else 0):
        GPA.pai_tracker.growth.grow_now()
    return module
