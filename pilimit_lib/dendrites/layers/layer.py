"""A layer with dendrites.

    z_k = d_k(x) + Σ_{j<k} v_kj ⊙ a_j      a_k = σ(z_k)      y = f(x) + Σ_k w_k ⊙ a_k

f: the neurons (any module); d_k: a copy of their architecture with its own parameters; w_k, v_kj
[n]: one number for each of the n neurons,
zero at birth, so that the function does not change when a dendrite is added; ⊙ runs along the
neurons' axis of the output.
"""

import torch
from torch import Tensor, nn

from ...core import Change
from .. import spelling
from ..config import DendriteConfig, check_dims
from .correlation import tap
from .dendrite import Dendrite
from .dimensions import along, check_output, known_dims, known_neurons
from .initial import check_copyable, fresh_copy, reference_parameter
from .standardise import last_layer
from .state_dicts import grown_in, to_dendritic


class DendriticLayer(nn.Module):
    """Neurons f and the dendrites grown beside them; attributes that it lacks are those of f
    (``model.fc1.weight``).

    ``name`` is the dotted name in the network and appears in errors; ``processor`` a class from
    processors.py.
    """

    def __init__(
        self,
        neuron: nn.Module,
        config: DendriteConfig,
        name: str = "",
        processor: type | None = None,
    ):
        super().__init__()
        check_copyable(neuron, name)
        self.neuron = neuron
        self.dendrites = nn.ModuleList()
        self.config = config
        self.name = name
        self.processor_class = processor
        self.processor = processor() if processor is not None else None
        self.dims = known_dims(neuron, config.dims)
        self.neurons = known_neurons(neuron) if processor is None else None
        self.dimension_error: str | None = None
        self.observer = None  # preview() looks on from here
        self.called = self.read = (
            False  # whether it ran; whether its weights were used from outside
        )

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            modules = self.__dict__.get("_modules") or {}
            if name.startswith("set") and spelling.respell(name, ["set_this_input_dimensions"]):
                spelling.warn_once(f"layer.{name}", "layer.set_this_input_dimensions")
                return self.set_this_input_dimensions
            if "neuron" not in modules or (name.startswith("__") and name.endswith("__")):
                raise
            if name in modules["neuron"]._parameters:
                self.__dict__["read"] = True
            try:
                return getattr(modules["neuron"], name)
            except AttributeError:
                raise AttributeError(
                    "neither the dendritic layer nor its neurons "
                    f"({type(modules['neuron']).__name__}) have an attribute '{name}'"
                ) from None

    def __getitem__(self, index):
        return self.neuron[index]

    def __getstate__(self):
        # what they keep belongs to a running graph, which neither copies nor pickles
        self.clear_processors()
        return self.__dict__

    def extra_repr(self) -> str:
        dims = None if self.dims is None else list(self.dims)
        return f"dendrites={len(self.dendrites)}, dims={dims}"

    def set_this_input_dimensions(self, dims) -> None:
        """Say where the neurons are in this layer's OUTPUT: one 0 at their axis, -1 elsewhere."""
        dims = check_dims(dims, f"set_this_input_dimensions of '{self.name}'")
        if len(self.dendrites) and self.dims != dims:
            raise RuntimeError(
                f"'{self.name}' has dendrites along {list(self.dims)} already; set dimensions "
                "before the first growth"
            )
        self.dims, self.dimension_error = dims, None
        if self.processor_class is not None or known_neurons(self.neuron) is None:
            self.neurons = None

    @property
    def axis(self) -> int:
        if self.dims is None:
            raise RuntimeError(
                f"'{self.name}' does not know which dimension its neurons are: run one batch "
                "through the network first, "
                f"or call model{self.path}.set_this_input_dimensions([...])"
            )
        return self.dims.index(0)

    def forward(self, *args, **kwargs):
        self.called = True
        output = self.neuron(*args, **kwargs)
        y = output if self.processor is None else self.processor.post_n1(output)
        if check_output(self, y) and len(self.dendrites):
            y = self._combine(y, args, kwargs)
        if self.observer is not None:
            y = self.observer(y, args, kwargs)
        return y if self.processor is None else self.processor.post_n2(y)

    def _combine(self, y: Tensor, args: tuple, kwargs: dict) -> Tensor:
        perforated = self.config.mode == "correlation"
        activations: list[Tensor] = []
        for k, dendrite in enumerate(self.dendrites):
            if dendrite.candidate and not (self.training and torch.is_grad_enabled()):
                continue
            z = dendrite.inner(args, kwargs, activations, self.axis, perforated)
            if z.shape != y.shape:
                raise RuntimeError(
                    f"dendrite {k + 1} of '{self.name}' gave {list(z.shape)} where the neurons "
                    f"gave {list(y.shape)}; "
                    "a layer whose output shape depends on more than its input cannot have "
                    "dendrites"
                )
            activations.append(self.config.activate(z))
            if dendrite.candidate:
                y = tap(
                    y,
                    activations[-1],
                    dendrite.stats,
                    self.axis,
                    self.config.initial_correlation_batches,
                )
            else:
                y = y + along(dendrite.w, y, self.axis) * activations[-1]
        return y

    @property
    def bypassed(self) -> bool:
        """Whether only its weights are used, as in F.linear(x, layer.weight): dendrites would never
        act."""
        return self.read and not self.called

    def clear_processors(self) -> None:
        """Forget hidden states that processors keep from one call to the next."""
        modules = self.__dict__["_modules"]
        for processor in (self.__dict__["processor"], *(d.processor for d in modules["dendrites"])):
            if processor is not None:
                processor.clear_processor()

    def grow(self, generator: torch.Generator, candidate: bool = False) -> Dendrite:
        """Add a dendrite with fresh weights from ``generator``; the function of the layer does not
        change."""
        if self.neurons is None:
            raise RuntimeError(
                f"'{self.name}' does not know how many neurons it has: run one batch through the "
                f"network before it grows, after model{self.path}.set_this_input_dimensions([...]) "
                "if its kind of layer is not known"
            )
        config = self.config
        check_copyable(self.neuron, self.name)
        body = fresh_copy(self.neuron, generator, config.init_scale, config.init_by_main)
        dendrite = self._attach(body, candidate)
        if config.init != "draw" and last_layer(body) is not None:
            dendrite.shifts = torch.randn(self.neurons, generator=generator, dtype=torch.float64)
        return dendrite

    def _attach(self, body: nn.Module, candidate: bool) -> Dendrite:
        like = reference_parameter(self.neuron, self.name)
        processor = self.processor_class() if self.processor_class is not None else None
        dendrite = Dendrite(
            body, self.neurons, len(self.dendrites), like.detach(), processor, candidate
        )
        dendrite.train(self.training)
        self.dendrites.append(dendrite)
        return dendrite

    @property
    def path(self) -> str:
        """How the layer is reached from the network, for messages: ".layer1[0].conv1"."""
        parts = [f"[{p}]" if p.isdigit() else f".{p}" for p in self.name.split(".") if p]
        return "".join(parts)

    def _numbered(self) -> list[tuple[str, Dendrite]]:
        return [(str(k), dendrite) for k, dendrite in enumerate(self.dendrites)]

    def structure(self) -> dict:
        """Sizes that the constructor does not fix, as plain builtins."""
        waiting = {k: d.shifts.tolist() for k, d in self._numbered() if d.shifts is not None}
        return {
            "dendrites": len(self.dendrites),
            "neurons": self.neurons,
            "dims": None if self.dims is None else list(self.dims),
            "candidate": any(d.candidate for d in self.dendrites),
            "activation": self.config.activation_name,
            **({"shifts": waiting} if waiting else {}),
        }

    def restructure(self, structure: dict) -> Change | None:
        """Have as many dendrites as ``structure`` says, contents arbitrary; surplus ones go from
        the end."""
        if structure["activation"] != self.config.activation_name:
            raise ValueError(
                f"'{self.name}' was saved with dendrites of activation "
                f"'{structure['activation']}', but is configured with "
                f"'{self.config.activation_name}'; give DendriteConfig(activation=...) as it was"
            )
        self.dims = None if structure["dims"] is None else tuple(structure["dims"])
        self.neurons = structure["neurons"]
        wanted, before, removed = structure["dendrites"], list(self.dendrites), []
        kept = wanted - structure["candidate"]  # a candidate is made anew
        while self.dendrites and (len(self.dendrites) > kept or self.dendrites[-1].candidate):
            removed += list(self.dendrites[-1].parameters())
            del self.dendrites[-1]
        while len(self.dendrites) < wanted:
            last = len(self.dendrites) == wanted - 1
            self._attach(fresh_copy(self.neuron, None, 0.0, False), structure["candidate"] and last)
        for k, dendrite in self._numbered():
            shifts = structure.get("shifts", {}).get(k)
            dendrite.shifts = None if shifts is None else torch.tensor(shifts, dtype=torch.float64)
        old = {id(d) for d in before}
        added = [p for d in self.dendrites if id(d) not in old for p in d.parameters()]
        if not added and not removed:
            return None
        change = Change()
        for parameter in removed:
            change += Change.removing(parameter)
        for parameter in added:
            change += Change.adding(parameter)
        return change

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        """The layer gets as many dendrites as a state_dict of another size has, and a plain one
        (pretrained, or of finalize) is read as that of a dendritic layer."""
        to_dendritic(state_dict, prefix, self.neuron)
        found = grown_in(state_dict, prefix)
        now = self.structure()
        if found is not None and found != {key: now[key] for key in found}:
            self.restructure({**now, "neurons": self.neurons, **found})
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
