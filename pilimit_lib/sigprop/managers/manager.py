"""Managers: settings once, up front, for wrapping the layers of an existing model."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from torch import nn

from ..models.local import optimizer_for
from ..propagators import Learn
from ..propagators.optimizers import check_builder


class Manager:
    """Wraps a signal, then layers, then the whole, with classes and settings given beforehand.

    `propagator_cls` and `signal_cls` wrap layers and signal, `model_cls` the network.
    `monitor_cls(name, loss)`, if given, wraps every loss, and its instances are added to
    `monitor_main` (a `monitors.Group`).
    """

    def __init__(
        self,
        model_cls: type,
        propagator_cls: type,
        signal_cls: type,
        monitor_cls: Callable | None = None,
        monitor_main=None,
        model_kwargs: dict | None = None,
        propagator_kwargs: dict | None = None,
        signal_kwargs: dict | None = None,
    ):
        self.model_cls, self.propagator_cls, self.signal_cls = model_cls, propagator_cls, signal_cls
        self.monitor_cls, self.monitor_main = monitor_cls, monitor_main
        self.model_kwargs = dict(model_kwargs or {})
        self.propagator_kwargs = dict(propagator_kwargs or {})
        self.signal_kwargs = dict(signal_kwargs or {})
        self.signal: nn.Module | None = None
        self.propagators: list[nn.Module] = []
        self.model: nn.Module | None = None

    def config_signal(self, **kwargs) -> None:
        """Defaults of `set_signal`."""
        self._not_after("config_signal", "set_signal", self.signal)
        self.signal_kwargs.update(kwargs)

    def config_propagator(self, **kwargs) -> None:
        """Defaults of later calls of `add_propagator`."""
        self._not_after("config_propagator", "set_model", self.model)
        self.propagator_kwargs.update(kwargs)

    def config_model(self, **kwargs) -> None:
        """Defaults of `set_model`."""
        self._not_after("config_model", "set_model", self.model)
        self.model_kwargs.update(kwargs)

    def set_monitor(self, monitor_main) -> None:
        """The group to which the monitors of later propagators are added."""
        self._not_after(
            "set_monitor",
            "set_signal or add_propagator",
            self.signal or (self.propagators or [None])[0],
        )
        self.monitor_main = monitor_main

    def set_signal(self, module: nn.Module, cls: type | None = None, **kwargs) -> nn.Module:
        """Wrap the signal, once. Settings that the class does not take are left out."""
        self._not_after("set_signal", "set_signal", self.signal)
        self.signal = self._wrap(cls or self.signal_cls, module, {**self.signal_kwargs, **kwargs})
        return self.signal

    def add_propagator(self, module: nn.Module, cls: type | None = None, **kwargs) -> nn.Module:
        """Wrap one layer. Settings that the class does not take are left out."""
        self._not_after("add_propagator", "set_model", self.model)
        propagator = self._wrap(
            cls or self.propagator_cls, module, {**self.propagator_kwargs, **kwargs}
        )
        self.propagators.append(propagator)
        return propagator

    def set_model(self, module: nn.Module, cls: type | None = None, **kwargs) -> nn.Module:
        """The model of the wrapped layers `module` and the signal, once."""
        self._not_after("set_model", "set_model", self.model)
        if self.signal is None:
            raise RuntimeError("set_model needs the signal: call set_signal before")
        cls = cls or self.model_cls
        self.model = cls(module, self.signal, **_taken(cls, {**self.model_kwargs, **kwargs}))
        return self.model

    def build_optimizer(self, module: nn.Module):
        """The optimiser of a wrapped module that was given none; subclasses say which."""
        return None

    def _wrap(self, cls: type, module: nn.Module, kwargs: dict) -> nn.Module:
        learns = isinstance(cls, type) and issubclass(cls, Learn)
        if learns and kwargs.get("optimizer") is None:
            kwargs["optimizer"] = self.build_optimizer(module)
        if learns and self.monitor_cls is not None and kwargs.get("loss") is not None:
            # The position makes names unique: most layers are a Sequential.
            position = (
                "signal"
                if self.signal is None and not self.propagators
                else str(len(self.propagators))
            )
            kwargs["loss"] = self.monitor_cls(f"{position}:{type(module).__name__}", kwargs["loss"])
            if self.monitor_main is not None:
                self.monitor_main.add(kwargs["loss"])
        return cls(module, **_taken(cls, kwargs))

    @staticmethod
    def _not_after(call: str, after: str, done) -> None:
        if done is not None:
            raise RuntimeError(
                f"{call} comes too late: {after} was already called; make another manager for "
                "another model"
            )


class Prepared(Manager):
    """A manager whose callers give each propagator its own optimiser (`optimizer=`), or leave the
    block as it is."""


class Preset(Manager):
    """A manager that builds an optimiser, `optimizer_builder(module)`, for every module that
    learns."""

    def __init__(
        self,
        model_cls: type,
        propagator_cls: type,
        signal_cls: type,
        optimizer_builder: Callable,
        monitor_cls: Callable | None = None,
        monitor_main=None,
        model_kwargs: dict | None = None,
        propagator_kwargs: dict | None = None,
        signal_kwargs: dict | None = None,
    ):
        super().__init__(
            model_cls,
            propagator_cls,
            signal_cls,
            monitor_cls,
            monitor_main,
            model_kwargs,
            propagator_kwargs,
            signal_kwargs,
        )
        check_builder(optimizer_builder, "optimizer_builder")
        self.optimizer_builder = optimizer_builder

    def build_optimizer(self, module):
        return optimizer_for(self.optimizer_builder, module)


def _taken(cls: type, kwargs: dict) -> dict:
    """Those of `kwargs` that the constructor of `cls` has a name for."""
    parameters = inspect.signature(cls.__init__).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return kwargs
    return {name: value for name, value in kwargs.items() if name in parameters}
