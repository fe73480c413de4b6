"""From a network to a dendritic one, and back to a plain module."""

import copy
import difflib
import os
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations as kind_of

from ..core import save
from .config import DendriteConfig
from .layers.dimensions import raise_dimension_errors
from .layers.exported import PlainDendritic
from .layers.initial import is_norm
from .layers.layer import DendriticLayer


class PAISequential(nn.Sequential):
    """A block that gets dendrites as a whole: a layer with the normalisation that follows it. Takes
    modules, or one list of them."""

    def __init__(self, *modules):
        super().__init__(
            *(
                modules[0]
                if len(modules) == 1 and isinstance(modules[0], (list, tuple))
                else modules
            )
        )


@dataclass(frozen=True)
class ConversionReport:
    """What the conversion did: module names that were wrapped and tracked, parameters in neither,
    and norm layers outside of blocks."""

    wrapped: tuple[str, ...]
    tracked: tuple[str, ...]
    untracked_parameters: tuple[str, ...]
    unwrapped_parameters: tuple[str, ...]
    bare_norms: tuple[str, ...]


Report = ConversionReport


def dendritic(model: nn.Module, config: DendriteConfig | None = None) -> nn.Module:
    """Make the layers of a network dendritic, in place; returns the network (or its wrapper, if the
    network itself is a layer).

    For each module, in this order: tracked by id, converted by id, replaced, tracked or converted
    by type, class name or predicate, else its children are visited. A module that is used in
    several places is converted once.
    """
    config = config or DendriteConfig()
    if any(True for _ in dendritic_layers(model)):
        raise ValueError("the network has dendritic layers already; convert it once")
    walk = _Walk(config)
    root = walk.visit(model, "")
    walk.check_ids(model)
    for parent, key, new in walk.assignments:
        # setattr would run property setters of the parent; the slot is what holds a child
        parent._modules[key] = new
    for encoder in (m for m in root.modules() if isinstance(m, nn.TransformerEncoderLayer)):
        if any(isinstance(m, DendriticLayer) for m in encoder.modules()):
            # torch's fused inference path reads weights and would pass the dendrites by
            encoder.activation_relu_or_gelu = 0
    if config.debug_dims:
        for module in _called(root):
            module.register_forward_hook(_raise_at_the_end)
    tracked = {id(module) for module in walk.tracked.values()}
    for name, module in root.named_modules():
        if id(module) in tracked:
            module.dendrites_tracked = True
        if isinstance(module, DendriticLayer):
            module.name = name
    return root


def _called(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules that can be called; a container of several networks can't."""
    if type(module).forward is not nn.Module.forward:
        yield module
    else:
        for child in module.children():
            yield from _called(child)


def _raise_at_the_end(module: nn.Module, args, output) -> None:
    """The forward hook of debugging mode: names every layer with wrong dimensions at once."""
    raise_dimension_errors(layer for _, layer in dendritic_layers(module))


class _Walk:
    def __init__(self, config: DendriteConfig):
        self.config = config
        self.assignments: list[tuple[nn.Module, str, nn.Module]] = []
        self.done: dict[int, nn.Module] = {}
        # replaced modules must outlive the walk: `done` knows them by id
        self.keep: list[nn.Module] = []
        self.tracked: dict[str, nn.Module] = {}
        self.ids = {
            _plain(r): False
            for rules in (config.convert, config.track)
            for r in rules
            if isinstance(r, str) and r.startswith(".")
        }

    def visit(self, module: nn.Module, name: str) -> nn.Module:
        if id(module) in self.done:
            self._seen(name)
            return self.done[id(module)]
        self.keep.append(module)
        self.done[id(module)] = result = self._decide(module, name)
        return result

    def _decide(self, module: nn.Module, name: str) -> nn.Module:
        config = self.config
        if self._id_in(config.track, name):
            return self._track(module, name)
        if self._id_in(config.convert, name):
            return self._wrap(module, name)
        for old, new in config.replace.items():
            if kind_of(module) is old:
                module = new(module)
                if not isinstance(module, nn.Module):
                    raise TypeError(
                        f"replacement of '{name}' ({old.__name__}) gave a {type(module).__name__}; "
                        "a module was expected"
                    )
                break
        if self._matches(config.track, module, name):
            return self._track(module, name)
        if self._matches(config.convert, module, name):
            return self._wrap(module, name)
        for key, child in module._modules.items():
            if child is not None:
                new = self.visit(child, f"{name}.{key}" if name else key)
                if new is not child:
                    self.assignments.append((module, key, new))
        return module

    def _seen(self, name: str) -> bool:
        if name in self.ids:
            self.ids[name] = True
        return name in self.ids

    def _id_in(self, rules, name: str) -> bool:
        return self._seen(name) and any(
            isinstance(r, str) and r.startswith(".") and _plain(r) == name for r in rules
        )

    @staticmethod
    def _matches(rules, module: nn.Module, name: str) -> bool:
        for rule in rules:
            if isinstance(rule, type):
                if kind_of(module) is rule:
                    return True
            elif isinstance(rule, str):
                if rule in (kind_of(module).__name__, type(module).__name__):
                    return True
            elif rule(module, name):
                return True
        return False

    def _track(self, module, name):
        self.tracked[name] = module
        return module

    def _wrap(self, module: nn.Module, name: str) -> DendriticLayer:
        processors = self.config.processors
        kind = kind_of(module)
        processor = processors.get(kind, processors.get(kind.__name__))
        return DendriticLayer(module, self.config, name, processor)

    def check_ids(self, model: nn.Module) -> None:
        """Ids that met no module are an error: the layer that was meant would silently not be
        treated."""
        names = [n for n, _ in model.named_modules()]
        for name, seen in self.ids.items():
            if not seen:
                inside = any(name.startswith(f"{w}.") for w in self.tracked)
                near = difflib.get_close_matches(name, names, n=3)
                raise ValueError(
                    f"no module with id '.{name}' was met"
                    + (" (it is inside a tracked module)" if inside else "")
                    + (
                        f"; did you mean {['.' + n for n in near]}?"
                        if near
                        else "; ids look like '.layer1.0.conv1'"
                    )
                )


def _plain(rule: str) -> str:
    return rule.removeprefix(".")


def dendritic_layers(model: nn.Module) -> Iterator[tuple[str, DendriticLayer]]:
    """Every dendritic layer of a network with its dotted name, once."""
    return (
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, DendriticLayer)
    )


def report(model: nn.Module) -> ConversionReport:
    """What is wrapped, what is tracked, and what is neither."""
    wrapped = tuple(name for name, _ in dendritic_layers(model))
    tracked = tuple(
        name
        for name, module in model.named_modules()
        if getattr(module, "dendrites_tracked", False)
    )

    def inside(parameter, roots):
        return any(
            root == "" or parameter == root or parameter.startswith(root + ".") for root in roots
        )

    names = [name for name, _ in model.named_parameters()]
    unwrapped = tuple(n for n in names if not inside(n, wrapped))
    return ConversionReport(
        wrapped,
        tracked,
        tuple(n for n in unwrapped if not inside(n, tracked)),
        unwrapped,
        tuple(
            n for n, m in model.named_modules() if is_norm(m) and not inside(n, wrapped + tracked)
        ),
    )


def finalize(model: nn.Module) -> nn.Module:
    """A plain copy for inference or further training without growth: neurons where nothing grew,
    PlainDendritic where it did."""
    model = copy.deepcopy(model)
    if isinstance(model, DendriticLayer):
        return PlainDendritic.of(model)
    done: dict[int, nn.Module] = {}
    for parent in [m for m in model.modules() if not isinstance(m, DendriticLayer)]:
        for key, child in parent._modules.items():
            if isinstance(child, DendriticLayer):
                parent._modules[key] = done.setdefault(id(child), PlainDendritic.of(child))
    return model


def save_plain(model: nn.Module, path: str | os.PathLike) -> None:
    """Write the network alone, without dendrite machinery, as a plain state_dict."""
    save({k: v.detach().clone() for k, v in finalize(model).state_dict().items()}, path)
