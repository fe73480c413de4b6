"""Which slices of which tensors belong to a neuron: torch-pruning's dependency graph, asked and
checked.

The graph is only asked. It does not grow layers, takes any index, and replaces parameters behind
the optimiser's back, so the edit itself is ours (`surgery`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..errors import Refused
from .geometry import incoming_dim, is_depthwise, is_layer, neuron_count, neuron_dim
from .tracked import undisturbed


@dataclass(frozen=True, eq=False)
class Tie:
    """Slices that neuron i owns: `positions[i]` along dimension `dim` of tensor `name` of `module`.

    `role`: "row" (computes the neuron), "column" (reads it), "scale", "shift", "mean", "variance"
    (normalises it), or "other".
    """

    module: nn.Module
    path: str
    name: str
    dim: int
    role: str
    positions: Tensor  # int64 [n k]

    @property
    def label(self) -> str:
        return f"{self.path}.{self.name}" if self.path else self.name


@dataclass(frozen=True, eq=False)
class Coupling:
    """Everything that changes size together with the neurons of `layer`."""

    layer: nn.Module
    path: str
    size: int
    ties: tuple[Tie, ...]

    def columns(self) -> list[Tie]:
        return [tie for tie in self.ties if tie.role == "column"]


class Planner:
    """The couplings of one architecture; build a new one after every edit."""

    def __init__(self, model: nn.Module, example: tuple) -> None:
        self.model = model
        self.paths = {module: path for path, module in model.named_modules()}
        self.graph = _traced(model, example)
        owners: dict[int, list[str]] = {}
        for path, module in model.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                owners.setdefault(id(parameter), []).append(f"{path}.{name}")
        self.tied = {key: names for key, names in owners.items() if len(names) > 1}

    def coupling(self, layer: nn.Module) -> Coupling:
        """What belongs to the neurons of `layer`. Raises `Refused` where a neuron has no slices of
        its own."""
        path = self.paths[layer]
        if layer not in self.graph.module2node:
            raise Refused(
                f"layer '{path}' is not reached from the output by the forward pass on the example "
                "batch"
            )
        pruner, size = self.graph.get_pruner_of_module(layer), neuron_count(layer)
        group = self.graph.get_pruning_group(layer, pruner.prune_out_channels, list(range(size)))
        ties: list[Tie] = []
        for item in group.items:
            target = item.dep.target.module
            if isinstance(target, nn.Module) and target not in self.paths:
                continue  # an operation of the graph (add, concat, view): it has no tensors
            for tie in self._ties(item, path, size):
                if not any(
                    tie.module is t.module and tie.name == t.name and tie.dim == t.dim for t in ties
                ):
                    ties.append(tie)
        return Coupling(layer, path, size, tuple(ties))

    def _ties(self, item: Any, root: str, size: int) -> list[Tie]:
        target, handler = item.dep.target.module, item.dep.handler.__name__
        if isinstance(target, nn.Parameter):
            name = self.graph._param_to_name[target]
            owner, _, attribute = name.rpartition(".")
            places = [
                (
                    self.model.get_submodule(owner),
                    owner,
                    attribute,
                    item.dep.target.pruning_dim,
                    "other",
                )
            ]
        else:
            places = [
                (target, self.paths[target], *rest)
                for rest in _tensors_of(target, "out_" in handler, root, self.paths)
            ]
        positions = _positions(item, root, size)
        ties = [
            Tie(module, path, name, dim, role, positions)
            for module, path, name, dim, role in places
            if getattr(module, name, None) is not None
        ]
        for tie in ties:
            self._check(tie, root)
            if int(positions.max()) >= getattr(tie.module, tie.name).shape[tie.dim]:
                raise Refused(
                    f"torch-pruning assigns slices of '{tie.label}' to the neurons of '{root}' "
                    "that it does not have; "
                    "the forward pass combines channels in a way that it cannot follow"
                )
        return ties

    def _check(self, tie: Tie, root: str) -> None:
        value = getattr(tie.module, tie.name)
        if tie.name not in tie.module._parameters and tie.name not in tie.module._buffers:
            raise Refused(
                f"'{tie.label}' belongs to the neurons of '{root}' but is computed from other "
                "parameters "
                "(a parametrisation or weight norm); remove that first"
            )
        if id(value) in self.tied:
            raise Refused(
                f"'{tie.label}' belongs to the neurons of '{root}' and is shared between "
                f"{self.tied[id(value)]}; "
                "tied parameters cannot change size"
            )


def _positions(item: Any, root: str, size: int) -> Tensor:
    owned: list[list[int]] = [[] for _ in range(size)]
    for position, neuron in zip(item.idxs, item.root_idxs):
        if neuron is None:
            raise Refused(
                f"torch-pruning cannot say which slices belong to which neuron of '{root}' "
                "(expanded attention heads)"
            )
        owned[neuron].append(position)
    counts = {len(entry) for entry in owned}
    if len(counts) != 1 or counts == {0}:
        raise Refused(
            f"the neurons of '{root}' own different numbers of slices of '{item.dep.target.name}': "
            "the forward pass "
            "cuts or mixes them in a way that an edit cannot follow"
        )
    if len({position for entry in owned for position in entry}) != sum(map(len, owned)):
        raise Refused(
            f"several neurons of '{root}' share one slice of '{item.dep.target.name}' (features "
            "folded into channels), "
            "so a single one cannot be added or removed"
        )
    return torch.tensor([sorted(entry) for entry in owned])


def _tensors_of(module: nn.Module, out: bool, root: str, paths: dict) -> list[tuple[str, int, str]]:
    """(tensor, dimension, role) of a module in which a neuron owns slices; `Refused` where the
    module mixes neurons."""
    path, kind = paths[module], type(module).__name__
    if isinstance(module, _ConvNd) and module.groups > 1 and not is_depthwise(module):
        raise Refused(
            f"'{path}' is a {kind} with groups={module.groups}: its neurons belong to groups of "
            "equal size, so single "
            f"ones of '{root}' cannot be added or removed"
        )
    if is_layer(module) and (out or is_depthwise(module)):
        return [("weight", neuron_dim(module), "row"), ("bias", 0, "row")]
    if is_layer(module):
        return [("weight", incoming_dim(module), "column")]
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return [
            ("weight", 0, "scale"),
            ("bias", 0, "shift"),
            ("running_mean", 0, "mean"),
            ("running_var", 0, "variance"),
        ]
    if isinstance(module, nn.PReLU):
        return [("weight", 0, "other")] if module.num_parameters > 1 else []
    if isinstance(module, nn.Embedding):
        return [("weight", 1, "row")]
    if isinstance(module, nn.LayerNorm | nn.GroupNorm):
        raise Refused(
            f"'{path}' ({kind}) normalises across the neurons of '{root}': adding or removing one "
            "would change "
            "all others"
        )
    raise Refused(
        f"'{path}' ({kind}) belongs to the neurons of '{root}', and the lab cannot change its size"
    )


def execution_order(model: nn.Module, example: tuple) -> list[nn.Module]:
    """The layers with neurons in the order in which a forward pass first reaches them."""
    executed: dict[nn.Module, None] = {}
    hooks = [
        m.register_forward_hook(lambda m, *_: executed.setdefault(m))
        for m in model.modules()
        if is_layer(m)
    ]
    try:
        with undisturbed(model), torch.no_grad():
            model(*example)
    finally:
        for hook in hooks:
            hook.remove()
    return list(executed)


def _traced(model: nn.Module, example: tuple) -> Any:
    """torch-pruning's dependency graph of the model."""
    try:
        import torch_pruning
    except ImportError as error:
        raise ImportError(
            "planning an edit needs torch-pruning: pip install 'pilimit[lab]'"
        ) from error
    frozen = [p for p in model.parameters() if not p.requires_grad]
    try:
        # Frozen parameters would be invisible to a graph that is read off autograd.
        for parameter in frozen:
            parameter.requires_grad_(True)
        with undisturbed(model), torch.enable_grad():
            graph = torch_pruning.DependencyGraph().build_dependency(
                model, example, forward_fn=lambda m, inputs: m(*inputs), verbose=False
            )
    except Exception as error:
        raise Refused(
            f"torch-pruning cannot trace which channels of {type(model).__name__} belong together "
            f"({type(error).__name__}: {error}), so its layers cannot change size"
        ) from error
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
    _map_concatenations(graph)
    return graph


def _map_concatenations(graph: Any) -> None:
    """torch-pruning (1.6.1) leaves a concatenation of channels unmapped when a flatten follows, and
    then couples its operands with each other. The operands' sizes are known, so the shifts can be
    filled in."""
    for node in graph.module2node.values():
        sizes = getattr(node.module, "concat_sizes", None)
        if (
            sizes is None
            or None in sizes
            or node.module.offsets is not None
            or getattr(node.grad_fn, "_saved_dim", None) != 1
        ):
            continue
        used: list[Any] = []
        for start, operand in zip(_offsets(sizes), node.inputs):
            size = sizes[len(used) // 2]
            for source, target, mapping in (
                (node, operand, _Shift(-start, start, start + size)),
                (operand, node, _Shift(start)),
            ):
                edge = next(
                    d
                    for d in source.dependencies
                    if d.target is target and not any(d is u for u in used)
                )
                edge.index_mapping[1] = mapping
                used.append(edge)


def _offsets(sizes: list[int]) -> list[int]:
    return [sum(sizes[:i]) for i in range(len(sizes))]


class _Shift:
    """Positions moved by an operand's place in a concatenation; those of other operands fall
    away."""

    def __init__(self, by: int, low: int = 0, high: int | None = None) -> None:
        self.by, self.low, self.high = by, low, high

    def __call__(self, indices: list[Any]) -> list[Any]:
        mine = [
            i for i in indices if self.low <= i.idx and (self.high is None or i.idx < self.high)
        ]
        return [i._replace(idx=i.idx + self.by) for i in mine]
