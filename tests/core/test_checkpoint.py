"""Snapshots and files: whole or not at all, and never code."""

import contextlib
import copy
import os
import pickle
import stat
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler

from pilimit_lib.core import (
    Change,
    Growable,
    checkpoint,
    follow,
    load,
    restore,
    rng_state,
    save,
    set_rng_state,
    snapshot,
)

from .things import NAMES, OPTIMIZERS, Branching, Hidden, same, state_of, train

every = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


@every
@given(before=st.integers(1, 9), after=st.integers(1, 9))
def test_save_then_restore_is_the_identity(make, before, after):
    model, other = Hidden(before), Hidden(after)
    optimizer, other_optimizer = make(model.parameters()), make(other.parameters())
    train(model, optimizer, 2)
    restore(other, snapshot(model, optimizer), other_optimizer)
    assert same(state_of(model, optimizer), state_of(other, other_optimizer))


@every
def test_a_run_that_is_cut_off_goes_on_bit_for_bit(make, tmp_path):
    """With noise, a scheduler, and growth before and after the cut."""

    def run(model, optimizer, scheduler, steps):
        for t in steps:
            if t in (3, 8):
                follow(optimizer, model.axis.append(model.values(1 + t)))
            optimizer.zero_grad()
            (model(torch.randn(4, 3)) - torch.randn(4, 2)).square().mean().backward()
            optimizer.step()
            scheduler.step()

    def made():
        model = Hidden(4)
        optimizer = make(model.parameters())
        return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)

    whole = made()
    run(*whole, range(6))
    save(
        snapshot(*whole[:2], scheduler=whole[2].state_dict(), rng=rng_state()), tmp_path / "cut.pt"
    )
    run(*whole, range(6, 12))

    torch.randn(7)
    again = made()
    extras = restore(*again[:1], load(tmp_path / "cut.pt"), again[1])
    again[2].load_state_dict(extras["scheduler"])
    set_rng_state(extras["rng"])
    run(*again, range(6, 12))
    assert same(state_of(*whole[:2]), state_of(*again[:2]))
    assert whole[1].param_groups[0]["lr"] == again[1].param_groups[0]["lr"]


def test_optimiser_state_is_found_by_name_not_by_position():
    """A parameter that was added late sits late in its group, but early in the freshly built
    model."""
    model = Branching()
    optimizer = torch.optim.Adam(
        [{"params": [model.trunk.weight], "lr": 0.1}, {"params": [model.trunk.bias]}], lr=0.01
    )
    follow(optimizer, model.branch())
    train(model, optimizer, 2)
    snap = snapshot(model, optimizer)
    fresh = Branching()
    fresh.branch()
    fresh_optimizer = torch.optim.Adam(
        [
            {"params": [fresh.trunk.weight, *fresh.branches.parameters()]},
            {"params": [fresh.trunk.bias]},
        ],
        lr=1.0,
    )
    restore(fresh, snap, fresh_optimizer)
    for name, parameter in model.named_parameters():
        twin = dict(fresh.named_parameters())[name]
        assert same(
            [v for _, v in sorted(optimizer.state[parameter].items())],
            [v for _, v in sorted(fresh_optimizer.state[twin].items())],
        ), name
    assert [group["lr"] for group in fresh_optimizer.param_groups] == [0.1, 0.01]


def test_growable_is_recognised_by_its_two_methods():
    assert isinstance(Hidden(), Growable) and not isinstance(nn.Linear(1, 1), Growable)


def test_extras_come_back_and_are_copies():
    model = Hidden()
    mutable = {"history": [1, 2.5, "a", None, True], "pair": (1, torch.ones(2))}
    snap = snapshot(model, log=mutable)
    mutable["history"].append(7)
    mutable["pair"][1].zero_()
    extras = restore(model, snap)
    assert extras["log"]["history"] == [1, 2.5, "a", None, True] and torch.equal(
        extras["log"]["pair"][1], torch.ones(2)
    )
    extras["log"]["history"].clear()
    assert snap["extras"]["log"]["history"]


SCHEDULERS = {
    "multistep": lambda o: lr_scheduler.MultiStepLR(o, [2, 5, 5]),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=9),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o),
    "cosine": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (t + 1)),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.1, 1.0),
}


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
def test_states_of_schedulers_are_extras(make, tmp_path):
    model = Hidden()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = make(optimizer)
    save(snapshot(model, optimizer, scheduler=scheduler.state_dict()), tmp_path / "c.pt")
    state = restore(model, load(tmp_path / "c.pt"), optimizer)["scheduler"]
    assert state == scheduler.state_dict()
    assert {key: type(value) for key, value in state.items()} == {
        k: type(v) for k, v in scheduler.state_dict().items()
    }


class Opaque:
    pass


@pytest.mark.parametrize(
    "value",
    [Opaque(), np.float32(1), np.arange(3), lambda: 0, {"deep": [Opaque()]}],
    ids=["object", "numpy number", "array", "function", "nested"],
)
def test_what_could_not_be_read_back_is_refused_when_the_snapshot_is_taken(value):
    """Otherwise the file is written for hours and the error comes with the first attempt to
    resume."""
    with pytest.raises(TypeError, match="extras.best"):
        snapshot(Hidden(), best=value)


def test_every_snapshot_of_plain_things_loads(tmp_path):
    extras = {
        "a": 1,
        "b": [1.5, None],
        "c": ("x", True),
        "d": {"e": torch.ones(2), 3: "key"},
        "f": torch.float16,
        "g": np.float64(2.5),
        "h": torch.Size([2]),
        "i": torch.device("cpu"),
    }
    save(snapshot(Hidden(), **extras), tmp_path / "c.pt")
    found = load(tmp_path / "c.pt")["extras"]
    assert torch.equal(found["d"].pop("e"), extras["d"].pop("e")) and found == extras


@pytest.mark.parametrize("value", [b"bytes", 1j])
@pytest.mark.parametrize("readable", [True, False])
def test_what_torch_could_not_read_is_refused_before_it_is_lost(
    value, readable, tmp_path, monkeypatch
):
    """Torch 2.4 writes bytes and complex numbers, and then refuses to read them."""
    if readable and not checkpoint._loads(type(value)):
        pytest.skip(f"torch {torch.__version__} does not read {type(value).__name__}")
    monkeypatch.setattr(checkpoint, "_loads", lambda kind: readable)
    if not readable:
        with pytest.raises(TypeError, match=f"extras.raw is {type(value).__name__}.*tensor"):
            snapshot(Hidden(), raw=value)
        return
    save(snapshot(Hidden(), raw=value), tmp_path / "c.pt")
    assert load(tmp_path / "c.pt")["extras"] == {"raw": value}


def test_a_snapshot_of_other_devices_or_dtypes_takes_the_models():
    snap = snapshot(Hidden(4).double())
    model = Hidden(2)
    restore(model, snap)
    assert model.axis.size == 4 and model.up.weight.dtype == torch.float32


RESTORE_REFUSED = {
    "a state_dict": (lambda m, o: m.state_dict(), True, ValueError, "not a snapshot"),
    "not even a dict": (lambda m, o: [1], True, ValueError, "list"),
    "a later format": (
        lambda m, o: {**snapshot(m, o), "format": 99},
        True,
        ValueError,
        "format 99",
    ),
    "no optimiser state": (lambda m, o: snapshot(m), True, ValueError, "no optimiser state"),
    "an unknown module": (
        lambda m, o: {**snapshot(m, o), "structure": {"nowhere": {}}},
        True,
        ValueError,
        "nowhere",
    ),
    "other groups": (
        lambda m, o: snapshot(
            m, torch.optim.Adam([{"params": m.up.parameters()}, {"params": m.down.parameters()}])
        ),
        True,
        ValueError,
        "2 parameter groups",
    ),
    "another shape": (lambda m, o: snapshot(Hidden(7, d=4)), False, RuntimeError, "up.weight"),
    "sizes that disagree": (
        lambda m, o: {**snapshot(m), "structure": {"": {"units": 9}}},
        False,
        RuntimeError,
        "size mismatch",
    ),
    "a module that can't grow": (
        lambda m, o: {**snapshot(m), "structure": {"up": {}}},
        False,
        ValueError,
        "'up' changed size",
    ),
}


@pytest.mark.parametrize("name", RESTORE_REFUSED)
def test_a_refused_restore_changes_nothing(name):
    make, with_optimizer, error, message = RESTORE_REFUSED[name]
    source, model = Hidden(7), Hidden(4)
    optimizers = [torch.optim.Adam(m.parameters()) for m in (source, model)]
    for net, optimizer in zip((source, model), optimizers):
        train(net, optimizer, 2)
    before = state_of(model, optimizers[1])
    with pytest.raises(error, match=message):
        restore(model, make(source, optimizers[0]), optimizers[1] if with_optimizer else None)
    assert same(before, state_of(model, optimizers[1]))


def test_after_a_refused_restore_with_optimizer_training_goes_on_as_if_nothing_had_happened():
    model = Hidden(4)
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, 2)
    twin = copy.deepcopy(model)
    twin_optimizer = torch.optim.Adam(twin.parameters())
    twin_optimizer.load_state_dict(optimizer.state_dict())
    other = Hidden(7, d=4)
    bad = snapshot(other, torch.optim.Adam(other.parameters()))
    with pytest.raises(RuntimeError):
        restore(model, bad, optimizer)
    for net, opt in ((model, optimizer), (twin, twin_optimizer)):
        train(net, opt, 2)
    assert same(state_of(model, optimizer), state_of(twin, twin_optimizer))


@pytest.mark.skipif(not NAMES, reason="optimisers of this torch take no names")
def test_names_of_a_named_optimiser_are_restored_too():
    model, fresh = Branching(), Branching()
    optimizers = [torch.optim.Adam(m.named_parameters()) for m in (model, fresh)]
    follow(optimizers[0], model.branch())
    restore(fresh, snapshot(model, optimizers[0]), optimizers[1])
    group = optimizers[1].param_groups[0]
    assert len(group["params"]) == 6 and len(group.get("param_names", group["params"])) == 6


def test_restructure_may_return_nothing():
    class Fixed(nn.Linear):
        def structure(self):
            return {}

        def restructure(self, structure):
            return None

    model, other = Fixed(2, 2), Fixed(2, 2)
    restore(other, snapshot(model), None)
    assert torch.equal(model.weight, other.weight) and Change().edits == ()


# Files


def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "c.pt"
    save({"a": torch.ones(3)}, path)
    before = path.read_bytes()

    def fail(obj, file):
        file.write(b"half of it")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save({"a": torch.zeros(3)}, path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["c.pt"]


def test_an_interrupt_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "c.pt"
    save({"a": 1}, path)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save({"a": 2}, path)
    assert load(path) == {"a": 1} and os.listdir(tmp_path) == ["c.pt"]


def test_save_makes_the_folder(tmp_path):
    save({"a": 1}, tmp_path / "new" / "folder" / "c.pt")
    assert load(str(tmp_path / "new" / "folder" / "c.pt")) == {"a": 1}


@pytest.mark.skipif(sys.platform == "win32", reason="permissions of POSIX")
def test_a_saved_file_has_the_permissions_of_any_new_file(tmp_path):
    save({"a": 1}, tmp_path / "c.pt")
    (tmp_path / "other").write_text("")
    assert stat.S_IMODE((tmp_path / "c.pt").stat().st_mode) == stat.S_IMODE(
        (tmp_path / "other").stat().st_mode
    )


class Malicious:
    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return os.mkdir, (str(self.witness),)


WRITERS = {
    "torch": torch.save,
    "pickle": lambda obj, path: path.write_bytes(pickle.dumps(obj, protocol=2)),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_code_in_a_file_is_refused_and_never_runs(write, tmp_path):
    witness, path = tmp_path / "was here", tmp_path / "c.pt"
    write({"model": Malicious(witness)}, path)
    with pytest.raises(ValueError, match="c.pt"):
        load(path)
    assert not witness.exists()
    # The file would do harm if it were trusted.
    with contextlib.suppress(RuntimeError):
        torch.load(path, weights_only=False)
    assert witness.exists()


@given(st.binary(max_size=60))
def test_any_bytes_are_refused_with_one_kind_of_error(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("bytes") / "c.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="c.pt"):
        load(path)


@given(st.floats(0, 0.999))
def test_a_truncated_file_is_refused(tmp_path_factory, part):
    folder = tmp_path_factory.mktemp("cut")
    for zipped in (True, False):
        torch.save(
            {"a": torch.ones(30)}, folder / "whole.pt", _use_new_zipfile_serialization=zipped
        )
        content = (folder / "whole.pt").read_bytes()
        (folder / "cut.pt").write_bytes(content[: int(part * len(content))])
        with pytest.raises(ValueError, match="cut.pt"):
            load(folder / "cut.pt")


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.pt"):
        load(tmp_path / "nothing.pt")
