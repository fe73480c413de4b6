"""Every setting of the documented system: its default, what it accepts, and how it becomes part of
a DendriteConfig."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..config import ACTIVATIONS, DendriteConfig, check_dims
from ..decisions.rules import EveryEpoch, Fixed, Never, Patience, check_number

CONSTANTS = {
    "DOING_SWITCH_EVERY_TIME": 0,
    "DOING_HISTORY": 1,
    "DOING_FIXED_SWITCH": 2,
    "DOING_NO_SWITCH": 3,
    "PARAM_VALS_BY_TOTAL_EPOCH": 0,
    "PARAM_VALS_BY_UPDATE_EPOCH": 1,
    "PARAM_VALS_BY_NEURON_EPOCH_START": 2,
}


@dataclass(frozen=True)
class Setting:
    default: Any
    check: Callable[[str, Any], Any]
    inert: str = ""  # why it changes nothing here; said once when it is set to something else


def _flag(name, value):
    if value not in (True, False) or isinstance(value, float):
        raise TypeError(f"{name} got {value!r}; give True or False")
    return bool(value)


def _number(**kwargs):
    def check(name, value):
        value = list(value) if isinstance(value, tuple) and kwargs.get("schedule") else value
        check_number(name, value, **kwargs)
        return value

    return check


def _choice(*allowed):
    def check(name, value):
        if value not in allowed:
            raise ValueError(f"{name} got {value!r}; give one of {list(allowed)}")
        return value

    return check


def _entries(what: str, fits: Callable[[Any], bool]):
    def check(name, value):
        if (
            isinstance(value, str)
            or not isinstance(value, Sequence)
            or not all(fits(v) for v in value)
        ):
            raise TypeError(f"{name} got {value!r}; give a list of {what}")
        return value if isinstance(value, list) else list(value)

    return check


def _function(name, value):
    if not callable(value):
        raise TypeError(f"{name} got {value!r}; give a function of a tensor, such as torch.sigmoid")
    return value


def _text(name, value):
    if not isinstance(value, str) or not value:
        raise TypeError(f"{name} got {value!r}; give a folder name")
    return value


def _any(name, value):
    return value


is_type = lambda v: isinstance(v, type)  # noqa: E731
is_name = lambda v: isinstance(v, str) and bool(v)  # noqa: E731
is_id = lambda v: isinstance(v, str) and v.startswith(".")  # noqa: E731
types, names = (
    _entries("types, such as [nn.Linear]", is_type),
    _entries("class names, such as ['GRU']", is_name),
)
ids = _entries("module ids that begin with a dot, such as ['.layer1.0.conv1']", is_id)
classes = _entries("classes", callable)
epochs, share = _number(low=1, whole=True, schedule=True), _number(low=0, schedule=True)

_PROMPT = "nothing here ever asks at a prompt"
_FILES = "checkpoints are plain tensors and builtins, written whole and loaded without running code"
_FOLLOWS = "dendrites follow the device and dtype of their neurons"

SETTINGS: dict[str, Setting] = {
    "switch_mode": Setting(1, _choice(0, 1, 2, 3)),
    "n_epochs_to_switch": Setting(10, epochs),
    "p_epochs_to_switch": Setting(10, epochs),
    "history_lookback": Setting(1, _number(low=1, schedule=True)),
    "initial_history_after_switches": Setting(0, _number(low=0, whole=True, schedule=True)),
    "fixed_switch_num": Setting(250, epochs),
    "first_fixed_switch_num": Setting(0, _number(low=0, whole=True)),
    "testing_dendrite_capacity": Setting(True, _flag),
    "retain_all_dendrites": Setting(False, _flag),
    "max_dendrites": Setting(100, _number(low=0, whole=True)),
    "max_dendrite_tries": Setting(2, epochs),
    "improvement_threshold": Setting([1e-3, 1e-4, 0], share),
    "improvement_threshold_raw": Setting(1e-5, share),
    "reset_best_score_on_switch": Setting(False, _flag),
    "find_best_lr": Setting(True, _flag),
    "dont_give_up_unless_learning_rate_lowered": Setting(True, _flag),
    "param_vals_setting": Setting(1, _choice(0, 1, 2)),
    "input_dimensions": Setting([-1, 0, -1, -1], lambda name, value: list(check_dims(value, name))),
    "debugging_input_dimensions": Setting(0, _choice(0, 1, True, False)),
    "confirm_correct_sizes": Setting(
        False, _flag, "sizes are checked at every forward pass anyway"
    ),
    "candidate_weight_initialization_multiplier": Setting(0.01, _number(above=0)),
    "candidate_weight_init_by_main": Setting(False, _flag),
    "pai_forward_function": Setting(torch.sigmoid, _function),
    "d_type": Setting(torch.float32, _any, _FOLLOWS),
    "device": Setting("auto", _any, _FOLLOWS),
    "use_cuda": Setting("auto", _any, _FOLLOWS),
    "modules_to_convert": Setting([nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear], types),
    "module_names_to_convert": Setting(["PAISequential"], names),
    "module_ids_to_convert": Setting([], ids),
    "modules_to_track": Setting([], types),
    "module_names_to_track": Setting([], names),
    "module_ids_to_track": Setting([], ids),
    "modules_to_replace": Setting([], types),
    "replacement_modules": Setting([], classes),
    "modules_with_processing": Setting([], types),
    "modules_processing_classes": Setting([], classes),
    "module_names_with_processing": Setting([], names),
    "module_by_name_processing_classes": Setting([], classes),
    "module_names_to_not_save": Setting(
        [".base_model"], names, "tensors that are used twice are restored as they were"
    ),
    "unwrapped_modules_confirmed": Setting(False, _flag),
    "weight_decay_accepted": Setting(False, _flag),
    "checked_skipped_modules": Setting(False, _flag, _PROMPT),
    "save_name": Setting("PAI", _text),
    "test_saves": Setting(True, _flag),
    "pai_saves": Setting(False, _flag),
    "using_safe_tensors": Setting(True, _flag, _FILES),
    "drawing_pai": Setting(True, _flag),
    "save_old_graph_scores": Setting(True, _flag, "the CSV files hold every epoch of the run"),
    "silent": Setting(False, _flag),
    "verbose": Setting(False, _flag),
    "extra_verbose": Setting(False, _flag),
    "global_candidates": Setting(1, _choice(1)),
    "learn_dendrites_live": Setting(False, _choice(False)),
    "no_extra_n_modes": Setting(True, _choice(True)),
    "perforated_backpropagation": Setting(False, _flag),
    "cap_at_n": Setting(False, _flag),
    "dendrite_improvement_threshold": Setting(0.1, share),
    "dendrite_improvement_threshold_raw": Setting(1e-5, share),
    "initial_correlation_batches": Setting(0, _number(low=0, whole=True)),
}

PAIRS = [
    ("modules_to_replace", "replacement_modules"),
    ("modules_with_processing", "modules_processing_classes"),
    ("module_names_with_processing", "module_by_name_processing_classes"),
]


def defaults() -> dict[str, Any]:
    return {name: copy.copy(setting.default) for name, setting in SETTINGS.items()}


def check_pairs(values: dict[str, Any]) -> None:
    """Lists that are read in pairs must be equally long."""
    for left, right in PAIRS:
        if len(values[left]) != len(values[right]):
            raise ValueError(
                f"GPA.pc: {left} has {len(values[left])} entries and {right} has "
                f"{len(values[right])}; they are read in pairs, "
                f"so append to both: append_{left}([...]) and append_{right}([...])"
            )


def to_config(
    values: dict[str, Any],
    *,
    doing_pai: bool,
    save_dir: str,
    making_graphs: bool,
    maximizing_score: bool,
) -> DendriteConfig:
    """The documented settings as the engine's configuration."""
    check_pairs(values)
    switch = {
        0: EveryEpoch(),
        3: Never(),
        1: Patience(
            values["n_epochs_to_switch"],
            values["history_lookback"],
            values["initial_history_after_switches"],
        ),
        2: Fixed(values["fixed_switch_num"], values["first_fixed_switch_num"]),
    }[values["switch_mode"]]
    testing = values["testing_dendrite_capacity"] and doing_pai and values["switch_mode"] != 3
    activation = next(
        (n for n, f in ACTIVATIONS.items() if f is values["pai_forward_function"]),
        values["pai_forward_function"],
    )
    processors = dict(zip(values["modules_with_processing"], values["modules_processing_classes"]))
    processors |= dict(
        zip(values["module_names_with_processing"], values["module_by_name_processing_classes"])
    )
    return DendriteConfig(
        switch=switch,
        maximize=maximizing_score,
        threshold=values["improvement_threshold"],
        threshold_raw=values["improvement_threshold_raw"],
        max_dendrites=values["max_dendrites"] if doing_pai else 0,
        max_tries=values["max_dendrite_tries"],
        retain_all=values["retain_all_dendrites"],
        reset_best=values["reset_best_score_on_switch"],
        testing_capacity=testing,
        find_best_lr=values["find_best_lr"],
        wait_for_lower_lr=values["dont_give_up_unless_learning_rate_lowered"],
        mode="correlation" if values["perforated_backpropagation"] else "joint",
        candidate_patience=values["p_epochs_to_switch"],
        candidate_threshold=values["dendrite_improvement_threshold"],
        candidate_threshold_raw=values["dendrite_improvement_threshold_raw"],
        cap_at_n=values["cap_at_n"],
        convert=(
            *values["modules_to_convert"],
            *values["module_names_to_convert"],
            *values["module_ids_to_convert"],
        ),
        track=(
            *values["modules_to_track"],
            *values["module_names_to_track"],
            *values["module_ids_to_track"],
        ),
        replace=dict(zip(values["modules_to_replace"], values["replacement_modules"])),
        processors=processors,
        dims=tuple(values["input_dimensions"]),
        debug_dims=bool(values["debugging_input_dimensions"]),
        init_scale=values["candidate_weight_initialization_multiplier"],
        init_by_main=values["candidate_weight_init_by_main"],
        activation=activation,
        optimizer_state="reset",
        initial_correlation_batches=values["initial_correlation_batches"],
        save_dir=save_dir,
        checkpoints="epoch" if values["test_saves"] else "switch",
        graphs="switch" if making_graphs and values["drawing_pai"] else "never",
    )
