"""Managers: defaults, filtering, order of calls, monitors."""

import pytest
import torch
from torch import nn

from pilimit_lib import sigprop
from pilimit_lib.sigprop import managers, models, monitors, propagators, signals

V9 = sigprop.loss.v9_input_target_max_all


def adam(module):
    return torch.optim.Adam(module.parameters(), 0.01)


def preset(signal_cls=propagators.signals.Loss, **kwargs):
    return managers.Preset(models.Forward, propagators.Loss, signal_cls, adam, **kwargs)


def signal():
    return signals.project_labels(3, (8,), nn.Linear(12, 8))


def test_the_manager_builds_one_optimizer_per_learning_module():
    manager = preset()
    manager.config_propagator(loss=V9)
    s = manager.set_signal(signal(), loss=V9)
    layer, pool, out = (
        manager.add_propagator(nn.Linear(8, 8)),
        manager.add_propagator(nn.ReLU(), propagators.Fixed),
        manager.add_propagator(nn.Linear(8, 3), propagators.Identity),
    )
    assert (
        isinstance(layer.optimizer, torch.optim.Adam)
        and layer.loss is V9
        and layer.optimizer is not s.optimizer
    )
    assert not hasattr(pool, "optimizer") and not hasattr(out, "optimizer")
    # nothing to train
    assert manager.add_propagator(nn.ReLU(), propagators.Loss).optimizer is None
    own = torch.optim.SGD(layer.module.parameters(), 0.1)
    assert manager.add_propagator(layer.module, optimizer=own).optimizer is own
    net = manager.set_model(nn.Sequential(layer, pool, out))
    assert type(net) is models.Forward and net.signal is s
    assert net(torch.randn(5, 12), torch.arange(5) % 3).shape == (5, 3)


def test_a_fixed_signal_takes_no_settings_of_learning_ones():
    manager = preset(propagators.signals.Fixed)
    s = manager.set_signal(signal(), loss=V9)
    assert type(s) is propagators.signals.Fixed and not hasattr(s, "optimizer")


def test_settings_are_copied_and_filtered():
    shared = {"loss": V9, "nonsense": 3}
    a, b = preset(propagator_kwargs=shared), preset(propagator_kwargs=shared)
    a.config_propagator(fuse=False)
    assert "fuse" not in shared and a.add_propagator(nn.Linear(2, 2)).fuse is False
    assert b.add_propagator(nn.Linear(2, 2)).fuse == "auto"


def test_prepared_leaves_optimizers_to_the_caller():
    manager = managers.Prepared(models.LoopBack, propagators.Loss, propagators.signals.Loss)
    manager.config_signal(loss=V9)
    manager.config_model(error=lambda out, y: out)
    s, layer = manager.set_signal(signal()), manager.add_propagator(nn.Linear(8, 3), loss=V9)
    assert s.optimizer is None and layer.optimizer is None and isinstance(manager, managers.Manager)
    assert manager.set_model(layer).error is manager.model_kwargs["error"]


def test_order_of_calls():
    manager = preset()
    with pytest.raises(RuntimeError, match="call set_signal before"):
        manager.set_model(nn.Sequential(propagators.Identity(nn.Linear(2, 2))))
    manager.set_signal(signal(), loss=V9)
    for late in (
        lambda: manager.set_signal(signal(), loss=V9),
        lambda: manager.config_signal(loss=V9),
        lambda: manager.set_monitor(monitors.Group()),
    ):
        with pytest.raises(RuntimeError, match="comes too late"):
            late()
    manager.set_model(nn.Sequential(propagators.Identity(nn.Linear(8, 3))))
    for late in (
        lambda: manager.set_model(nn.Sequential()),
        lambda: manager.config_model(),
        lambda: manager.config_propagator(),
        lambda: manager.add_propagator(nn.Linear(2, 2)),
    ):
        with pytest.raises(RuntimeError, match="comes too late"):
            late()
    with pytest.raises(TypeError, match="optimizer_builder must be a function"):
        managers.Preset(models.Forward, propagators.Loss, propagators.signals.Loss, None)


def test_classes_hand_themselves_to_a_manager():
    manager = preset(signal_kwargs={"loss": V9})
    s = signals.ProjectionContext.manage(manager, nn.Linear(3, 8), (3,), (8,))
    assert isinstance(s, propagators.signals.Loss) and isinstance(
        s.module, signals.ProjectionContext
    )
    net = models.ForwardLoopBack.manage(
        manager, nn.Sequential(propagators.Identity(nn.Linear(8, 3))), error=lambda o, y: o
    )
    assert type(net) is models.ForwardLoopBack and net.signal is s


def test_monitors_get_unique_names_and_count():
    group = monitors.Group()
    manager = preset(monitor_cls=monitors.loss.LabelMetrics, propagator_kwargs={"loss": V9})
    manager.set_monitor(group)
    manager.set_signal(signal(), loss=V9)
    layers = [manager.add_propagator(nn.Sequential(nn.Linear(8, 8), nn.ReLU())) for _ in range(2)]
    net = manager.set_model(
        nn.Sequential(*layers, manager.add_propagator(nn.Linear(8, 3), propagators.Identity))
    )
    assert [m.name for m in group.monitors] == ["signal:Sequential", "0:Sequential", "1:Sequential"]
    net(torch.randn(5, 12), torch.arange(5) % 3)
    assert [m["count"] for m in group.as_dict().values()] == [5, 5, 5] and len(
        group.metrics().splitlines()
    ) == 3


def test_propagators_put_themselves_into_a_manager():
    manager = preset()
    manager.config_propagator(loss=V9)
    s = propagators.signals.Loss.manage(manager, signal(), loss=V9)
    layer = propagators.Loss.manage(manager, nn.Linear(8, 8), fuse=False)
    pool = propagators.Fixed.manage(manager, nn.ReLU())
    out = propagators.Identity.manage(manager, nn.Linear(8, 3))
    assert manager.signal is s and type(s) is propagators.signals.Loss
    assert [type(p).__name__ for p in (layer, pool, out)] == ["Loss", "Fixed", "Identity"]
    assert isinstance(layer.optimizer, torch.optim.Adam) and layer.fuse is False
    assert manager.propagators == [layer, pool, out]
    net = models.Forward.manage(manager, nn.Sequential(layer, pool, out))
    assert net(torch.randn(5, 12), torch.arange(5) % 3).shape == (5, 3)
    fixed = propagators.signals.Fixed.manage(preset(), signal())
    assert type(fixed) is propagators.signals.Fixed
