"""The documented tracker: scores in, a restructured network out. Thin over Growth."""

import csv
import io
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from ...core import write_bytes
from .. import distributed, spelling
from ..conversion import dendritic_layers, save_plain
from ..growth import Growth
from .pc import pc
from .settings import to_config

DIMS_FILE = "array_dims.csv"


class PAINeuronModuleTracker:
    """Holds the run that ``UPA.initialize_pai`` began; methods are those of the documented
    system."""

    def __init__(self, doing_pai: bool = True, save_name: str = "PAI"):
        self.doing_pai, self.save_name = doing_pai, save_name
        self.making_graphs = self.maximizing_score = True
        self._growth: Growth | None = None
        self._converted: nn.Module | None = None
        self._optimizer_class = self._scheduler_class = None
        self._pending: dict[str, dict[str, float]] = {}

    def __getattr__(self, name: str) -> Any:
        methods = [m for m in dir(type(self)) if not m.startswith("_")]
        meant = spelling.respell(name, methods) if not name.startswith("_") else None
        if meant is None or name.startswith("_"):
            raise spelling.unknown("GPA.pai_tracker", name, methods)
        spelling.warn_once(f"GPA.pai_tracker.{name}", f"GPA.pai_tracker.{meant}")
        return getattr(self, meant)

    def initialize(
        self,
        model: nn.Module | None = None,
        doing_pai: bool = True,
        save_name: str | None = None,
        making_graphs: bool = True,
        maximizing_score: bool = True,
        num_classes: float = 1e10,
        values_per_train_epoch: int = -1,
        values_per_val_epoch: int = -1,
        zooming_graph: bool = True,
    ) -> None:
        """Begin to follow a converted network (default: the last that UPA.convert_network
        returned).

        The last four are accepted for the sake of documented calls; pictures here need none of
        them.
        """
        model = self._converted if model is None else model
        if model is None:
            raise RuntimeError(
                "there is no converted network; call model = UPA.convert_network(model) first, or "
                "UPA.initialize_pai(model)"
            )
        self.doing_pai, self.making_graphs = doing_pai, making_graphs
        self.maximizing_score = maximizing_score
        self.save_name = save_name if save_name is not None else pc.get_save_name()
        self._pending = {}
        self._growth = Growth(model, self.config())

    def config(self):
        """The settings of GPA.pc as they are now, as a DendriteConfig."""
        name = self.save_name if self.save_name is not None else pc.get_save_name()
        return to_config(
            pc.values(),
            doing_pai=self.doing_pai,
            save_dir=name,
            making_graphs=self.making_graphs,
            maximizing_score=self.maximizing_score,
        )

    @property
    def growth(self) -> Growth:
        if self._growth is None:
            raise RuntimeError(
                "the tracker follows no network yet; call model = UPA.initialize_pai(model) first"
            )
        return self._growth

    @property
    def dendrites(self) -> int:
        return 0 if self._growth is None else self._growth.plateau.state.dendrites

    @property
    def member_vars(self) -> dict[str, Any]:
        """A reading of the run under the names of the documented system; to change something use
        the methods."""
        s = self.growth.plateau.state
        epochs = self.growth.records.rows.epochs
        return {
            "doing_pai": self.doing_pai,
            "mode": s.phase,
            "num_epochs_run": s.epoch,
            "num_dendrites_added": s.dendrites,
            "num_dendrite_tries": s.tries,
            "global_best_validation_score": s.best,
            "epoch_last_improved": s.last_improved,
            "accuracies": [r["validation"] for r in epochs],
            "param_counts": [r["parameters"] for r in epochs],
        }

    def set_optimizer(self, optimizer_class: type) -> None:
        """The class that setup_optimizer builds."""
        if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, Optimizer)):
            raise TypeError(
                f"set_optimizer got {optimizer_class!r}; give a class, such as torch.optim.Adam. "
                "For an optimiser that exists already, call set_optimizer_instance(optimizer)"
            )
        self._optimizer_class = optimizer_class

    def set_scheduler(self, scheduler_class: type) -> None:
        """The class that setup_optimizer builds; the tracker itself steps it."""
        if not isinstance(scheduler_class, type):
            raise TypeError(
                f"set_scheduler got {scheduler_class!r}; give a class, such as "
                "torch.optim.lr_scheduler.ReduceLROnPlateau"
            )
        self._scheduler_class = scheduler_class

    def setup_optimizer(
        self, net: nn.Module, opt_args: dict[str, Any], sched_args: dict[str, Any] | None = None
    ):
        """Build the optimiser (and scheduler) for the network as it is now; call it again after
        every restructuring.

        Returns the optimiser, or (optimiser, scheduler) where ``sched_args`` are given. Without
        opt_args["params"] all parameters are optimised that are not frozen.
        """
        growth = self.growth
        if self._optimizer_class is None:
            raise RuntimeError(
                "no optimiser class is set; call GPA.pai_tracker.set_optimizer(torch.optim.Adam) "
                "first"
            )
        if sched_args is not None and self._scheduler_class is None:
            raise RuntimeError(
                "sched_args are given but no scheduler class is set; call "
                "GPA.pai_tracker.set_scheduler(torch.optim.lr_scheduler.ReduceLROnPlateau) first"
            )
        network = distributed.unwrap(net)
        self._check_network(network)
        arguments = {**opt_args, "params": self._parameters(network, opt_args)}
        if arguments.get("weight_decay") and not pc.get_weight_decay_accepted():
            self._say(
                "weight decay also pulls the weights of dendrites towards zero; "
                "GPA.pc.set_weight_decay_accepted(True) silences this remark"
            )
        optimizer = self._optimizer_class(**arguments)
        carry = growth.scheduler if growth.starts_anew and self._carries_over() else None
        if carry is not None:
            for group, old in zip(optimizer.param_groups, growth.optimizer.param_groups):
                group["initial_lr"] = group["lr"]
                group["lr"] = old["lr"]
        scheduler = None if sched_args is None else self._scheduler_class(optimizer, **sched_args)
        growth.attach(optimizer, scheduler)
        if carry is not None and scheduler is not None:
            scheduler.load_state_dict(carry.state_dict())
            for group, old in zip(optimizer.param_groups, carry.get_last_lr()):
                group["lr"] = old
        return optimizer if scheduler is None else (optimizer, scheduler)

    def _carries_over(self) -> bool:
        """Whether a new scheduler goes on counting epochs where the last one was, instead of from
        zero."""
        how, phase = pc.get_param_vals_setting(), self.growth.plateau.state.phase
        return self.growth.scheduler is not None and (how == 0 or (how == 2 and phase == "p"))

    @staticmethod
    def _parameters(network: nn.Module, opt_args: dict[str, Any]) -> list:
        if "params" not in opt_args:
            return [p for p in network.parameters() if p.requires_grad]
        given = [
            {**g, "params": list(g["params"])} if isinstance(g, dict) else g
            for g in opt_args["params"]
        ]
        flat = [p for g in given for p in (g["params"] if isinstance(g, dict) else [g])]
        if not flat:
            raise ValueError(
                "opt_args['params'] holds no parameters: model.parameters() is used up by the "
                "first call that gets it. Before every setup_optimizer give it anew: "
                "opt_args['params'] = model.parameters()"
            )
        own = {id(p) for p in network.parameters()}
        strangers = sum(id(p) not in own for p in flat)
        if strangers:
            raise ValueError(
                f"{strangers} of the {len(flat)} parameters in opt_args are not in the network (it "
                "was restructured since?); "
                "build opt_args anew with 'params': model.parameters()"
            )
        return given

    def set_optimizer_instance(self, optimizer_instance: Optimizer) -> None:
        """Follow an optimiser that some trainer owns; its learning rate is left alone."""
        if not isinstance(optimizer_instance, Optimizer) and not hasattr(
            optimizer_instance, "param_groups"
        ):
            raise TypeError(
                f"set_optimizer_instance got {optimizer_instance!r}; give an optimiser. For a "
                "class, call set_optimizer(cls)"
            )
        self.growth.attach(optimizer_instance, None)

    def set_averaged_model(self, averaged: AveragedModel) -> None:
        """A moving average of the network's weights, which then begins anew at every restructuring;
        otherwise it would go on with the weights of a smaller network."""
        self.growth.follow_average(averaged)

    def _note(self, kind: str, name: str, value) -> None:
        self._pending.setdefault(kind, {})[str(name)] = float(value)

    def add_extra_score(self, score, name: str = "extra") -> None:
        """A score to record and draw, such as the training score."""
        self._note("extra", name, score)

    def add_extra_score_without_graphing(self, score, name: str = "extra") -> None:
        """A score to record only."""
        self._note("quiet", name, score)

    def add_test_score(self, score, name: str = "test") -> None:
        """The test score of this epoch, for the table of best scores; call it before
        add_validation_score."""
        self._note("test", name, score)

    def add_loss(self, loss, name: str = "loss") -> None:
        """A loss to record."""
        self._note("loss", name, loss)

    def add_learning_rate(self, learning_rate) -> None:
        """A learning rate to record, where no optimiser was handed over to read it from."""
        self._note("learning_rate", "learning_rate", learning_rate)

    def start_epoch(self, internal_call: bool = False) -> None:
        """The epoch begins now: time spent before counts for no epoch."""
        self.growth.restart_clock()

    def stop_epoch(self, internal_call: bool = False) -> None:
        """The epoch ends now: time until add_validation_score is not training."""
        self.growth.stop_clock()

    def add_validation_score(self, accuracy, net: nn.Module, force_switch: bool = False):
        """The one call per epoch: returns (network, restructured, training_complete).

        After a restructuring set up the optimiser again; when training is complete the best network
        is the one returned.
        """
        growth = self.growth
        self._check_network(distributed.unwrap(net))
        growth.adopt(net)
        growth.reconfigure(self.config())
        result = growth.step(accuracy, also=self._pending, force=force_switch)
        self._pending = {}
        if result.restructured:
            self._say(f"epoch {growth.plateau.state.epoch}: {result.action} ({result.reason})")
        elif pc.get_verbose() or pc.get_extra_verbose():
            self._say(f"epoch {growth.plateau.state.epoch}: {result.reason}")
        if result.complete and pc.get_pai_saves() and distributed.is_first():
            save_plain(growth.network, Path(self.save_name) / "final_clean_pai.pt")
        return result.model, result.restructured, result.complete

    def _check_network(self, network: nn.Module) -> None:
        if network is not self.growth.network:
            raise ValueError(
                f"the model given ({type(network).__name__}) is not the network that the tracker "
                "follows "
                f"({type(self.growth.network).__name__}); pass what initialize_pai or the last "
                "add_validation_score returned"
            )

    def _say(self, text: str) -> None:
        if not pc.get_silent() and distributed.is_first():
            print(text)

    def save_tracker_settings(self) -> None:
        """Write what layers learned about their outputs in a first pass, for runs that copy the
        network before one (DataParallel)."""
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow(["module", "neurons", "dims"])
        for name, layer in dendritic_layers(self.growth.network):
            if layer.neurons is None or layer.dims is None:
                raise RuntimeError(
                    f"'{name}' took no part in a forward pass yet; call "
                    "save_tracker_settings() after loss.backward()"
                )
            writer.writerow([name, layer.neurons, " ".join(map(str, layer.dims))])
        write_bytes(Path(self.save_name) / DIMS_FILE, text.getvalue().encode())

    def initialize_tracker_settings(self) -> None:
        """Read what save_tracker_settings wrote, before the network is wrapped in DataParallel."""
        path = Path(self.save_name) / DIMS_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"there is no {path}; run once on a single device with "
                "GPA.pai_tracker.save_tracker_settings() "
                "after loss.backward()"
            )
        with open(path, newline="") as file:
            rows = {row["module"]: row for row in csv.DictReader(file)}
        layers = dict(dendritic_layers(self.growth.network))
        if set(rows) != set(layers):
            raise ValueError(
                f"{path} speaks of other layers than the network has: "
                f"{sorted(set(rows) ^ set(layers))}; save it anew"
            )
        for name, layer in layers.items():
            layer.set_this_input_dimensions([int(v) for v in rows[name]["dims"].split()])
            layer.neurons = int(rows[name]["neurons"])
