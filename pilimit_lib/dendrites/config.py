"""All settings of dendrites in one frozen, validated dataclass."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .decisions.rules import Rules, check_number
from .processors import GRUProcessor, LSTMCellProcessor, LSTMProcessor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
    "identity": lambda z: z,
}

Rule = type | str | Callable[[nn.Module, str], bool]


def check_dims(dims: Sequence[int], what: str) -> tuple[int, ...]:
    """The dimensions as a tuple; raise unless they are one 0, at the neurons' axis, among -1."""
    listed = isinstance(dims, (list, tuple, Tensor)) and all(float(v).is_integer() for v in dims)
    values = tuple(int(v) for v in dims) if listed else ()
    if set(values) - {-1} != {0} or values.count(0) != 1:
        raise ValueError(
            f"{what} got {dims!r}; give one entry for each dimension of the layer's OUTPUT: "
            "a single 0 where its neurons are, -1 everywhere else, for example [-1, 0, -1, -1]"
        )
    return values


@dataclass(frozen=True)
class DendriteConfig(Rules):
    """What becomes dendritic, how new dendrites begin, when they are added (see Rules) and what is
    written to disk.

    convert, track      rules: a type (exact), a class name, an id as ".layer1.0.conv1", or a
                        predicate (module, name) -> bool. Converted layers get dendrites as one
                        block; tracked ones are accounted for and never get any
    replace             {type: New}: modules of the type become New(old) before conversion
    processors          {type or class name: processor class} for layers with several tensors in
                        or out, see processors.py
    dims                where the neurons are in layer outputs, as [-1, 0, -1, -1]; Linear layers
                        then use [-1, 0], and their last dimension where dims ends in 0. None:
                        Linear and Conv layers are known at any rank, the others must be told
                        (set_this_input_dimensions)
    debug_dims          list all wrong dimensions at the end of the forward pass instead of raising
                        at the first
    init_scale,         new dendrites draw N(0,1)·scale (· mean |θ| of the neurons); norm layers
    init_by_main        start as norm layers do
    init                "draw": new dendrites begin as drawn, which with init_scale 0.01 is nearly a
                        constant; "standardised": their first batch of training gives their
                        pre-activations unit variance, see standardise.py; "gradient": a Linear or
                        Conv layer, alone or with a batch norm, begins where its w gets the largest
                        gradient of Growth(losses=...), see gradient.py, others standardised
    activation          of a dendrite: a name, or an elementwise function of a tensor
    optimizer_state     "keep": moments of what did not change survive growth; "reset": the
                        optimiser is built anew
    seed                of new weights; None: torch.initial_seed()
    initial_correlation_batches
                        batches at the start of a correlation phase that only gather averages
    reduce_scores       distributed runs: "rank0" decides by its score, "mean" by that of all
    save_dir            folder for checkpoints, CSV files and pictures; None: nothing is written
    checkpoints         when latest.pt is written: "epoch", "switch" or "never" (best_model.pt
                        follows the best score unless "never")
    graphs              when pictures are drawn: "switch" (and at the end; every epoch where switch
                        is Never), "epoch" or "never". CSV files are always written
    """

    convert: Sequence[Rule] = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, "PAISequential")
    track: Sequence[Rule] = ()
    replace: Mapping[type, Callable[[nn.Module], nn.Module]] = field(default_factory=dict)
    processors: Mapping[type | str, type] = field(
        default_factory=lambda: {
            nn.GRU: GRUProcessor,
            nn.LSTM: LSTMProcessor,
            nn.LSTMCell: LSTMCellProcessor,
        }
    )
    dims: Sequence[int] | None = None
    debug_dims: bool = False
    init_scale: float = 0.01
    init_by_main: bool = False
    init: str = "draw"
    activation: str | Callable[[Tensor], Tensor] = "sigmoid"
    optimizer_state: str = "keep"
    seed: int | None = None
    initial_correlation_batches: int = 0
    reduce_scores: str = "rank0"
    save_dir: str | None = None
    checkpoints: str = "epoch"
    graphs: str = "switch"

    def __post_init__(self):
        super().__post_init__()
        for name in ("convert", "track"):
            rules = getattr(self, name)
            if isinstance(rules, str) or not all(isinstance(r, str) or callable(r) for r in rules):
                raise TypeError(
                    f"{name} got {rules!r}; give a list of types, class names, ids "
                    '(".layer1.0") or predicates'
                )
        for name in ("replace", "processors"):
            if not isinstance(getattr(self, name), Mapping):
                raise TypeError(f"{name} got {getattr(self, name)!r}; give a dict")
        if self.dims is not None:
            check_dims(self.dims, "dims")
        check_number("init_scale", self.init_scale, above=0)
        check_number(
            "initial_correlation_batches", self.initial_correlation_batches, low=0, whole=True
        )
        if isinstance(self.activation, str):
            self._one_of("activation", ACTIVATIONS)
        elif not callable(self.activation):
            raise TypeError(
                f"activation got {self.activation!r}; give one of {sorted(ACTIVATIONS)} or a "
                "function of a tensor"
            )
        self._one_of("init", ("draw", "standardised", "gradient"))
        self._one_of("optimizer_state", ("keep", "reset"))
        self._one_of("reduce_scores", ("rank0", "mean"))
        self._one_of("checkpoints", ("epoch", "switch", "never"))
        self._one_of("graphs", ("switch", "epoch", "never"))

    def _one_of(self, name, choices) -> None:
        if getattr(self, name) not in choices:
            raise ValueError(f"{name} got {getattr(self, name)!r}; give one of {sorted(choices)}")

    @property
    def activation_name(self) -> str:
        """The activation as checkpoints know it."""
        if isinstance(self.activation, str):
            return self.activation
        own = getattr(self.activation, "__name__", type(self.activation).__name__)
        return next((name for name, f in ACTIVATIONS.items() if f is self.activation), own)

    def activate(self, z: Tensor) -> Tensor:
        named = isinstance(self.activation, str)
        return (ACTIVATIONS[self.activation] if named else self.activation)(z)
