"""The user's own loop, all-or-nothing blocks, undo, and what bad input leaves behind."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.utils.data import DataLoader

import pilimit_lib
from pilimit_lib.core import batch
from pilimit_lib.lab import NotFound, Refused, watch

from .conftest import MNISTModel, PlainNet, digits
from .test_checkpoints import everything, same


def own_loop(tmp_path=None, **options):
    torch.manual_seed(0)
    model = PlainNet()
    optimizer = optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    lab = watch(
        model,
        optimizer,
        DataLoader(digits(96), 16, shuffle=True),
        DataLoader(digits(32, start=500), 16),
        folder=tmp_path,
        **options,
    )
    return model, optimizer, lab


def epoch(model, optimizer, lab):
    model.train()
    for x, y in lab.loader:
        logits = model(x)
        loss = F.cross_entropy(logits, y, reduction="none")
        lab.record(loss, logits, y, margin=logits.max(1).values)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()


def test_an_own_loop_has_all_of_it(tmp_path):
    model, optimizer, lab = own_loop(tmp_path)
    epoch(model, optimizer, lab)
    assert lab.age == 96 and lab.steps == 6
    frame = lab.loader.dataset.get_dataframe()
    assert (
        len(frame) == 96
        and frame["margin"].notna().all()
        and frame["confidence"].between(0, 1).all()
    )
    model.eval()
    with torch.no_grad():
        for x, y in lab.eval_loader:
            logits = model(x)
            lab.record(F.cross_entropy(logits, y, reduction="none"), logits, y)
            expected = F.cross_entropy(logits, y, reduction="none")
    assert lab.age == 96 and len(lab.eval_loader.dataset.get_dataframe()) == 32
    assert lab.ledger("eval")["loss"][-16:].tolist() == pytest.approx(expected.tolist())
    assert (
        lab.neurons[model.stem].train_seen[0] == 96 and lab.neurons[model.stem].eval_seen[0] == 32
    )
    lab.model.prune(layer="hidden", neuron_indices={1})
    lab.loader.dataset.denylist_samples(range(40))
    epoch(model, optimizer, lab)
    assert lab.age == 96 + 56
    assert lab.dump() == 0
    lab.load(0)
    lab.display_stats()


def test_the_loop_is_the_one_without_the_lab():
    """Watched or not, training is the same bit for bit (the order of the samples apart, which is
    fixed here)."""
    model, optimizer, lab = own_loop()
    twin = PlainNet()
    twin.load_state_dict(model.state_dict())
    twin_optimizer = optim.SGD(twin.parameters(), lr=0.05, momentum=0.9)
    batches = list(lab.loader)
    epoch_order = lab.loader.epoch
    lab.loader.reset(epoch_order - 1)
    epoch(model, optimizer, lab)
    for x, y in batches:
        twin_optimizer.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        twin_optimizer.step()
    assert all(
        torch.equal(value, twin.state_dict()[name]) for name, value in model.state_dict().items()
    )


def test_ids_of_a_surrounding_batch_are_taken(tmp_path):
    model, _, lab = own_loop()
    x, y = digits(3).tensors
    with batch([7, 8, 90]):
        lab.record(F.cross_entropy(model(x), y, reduction="none"))
    assert lab.loader.dataset.get_dataframe().index.tolist() == [7, 8, 90]
    _, _, fresh = own_loop()
    with pytest.raises(RuntimeError, match="whose losses"):
        fresh.record(torch.zeros(3))
    with pytest.raises(ValueError, match="reduction='none'"):
        fresh.record(torch.zeros(()), ids=torch.arange(3))
    with pytest.raises(RuntimeError, match="no training loader"):
        watch(PlainNet()).record(torch.zeros(3), ids=[1, 2, 3])


@pytest.mark.parametrize("model", [PlainNet, MNISTModel])
def test_edit_blocks_are_all_or_nothing(make, model):
    size = 8 if model is PlainNet else 28
    exp = make(model(), train_dataset=digits(120, size), eval_dataset=digits(40, size, 900))
    exp.train_n_steps(3)
    before, events = everything(exp), list(exp.lab.journal.events)
    parameters = {name: p for name, p in exp.module.named_parameters()}
    exp.module.zero_grad()
    with pytest.raises(NotFound, match="no such neurons"):
        with exp.edit() as m:
            m.add_neurons(layer_index=0, neuron_count=2)
            m.reinit_neurons(layer_index=1, neuron_indices={0})
            m.layers[0].set_per_neuron_learning_rate({1}, lr=0.0)
            m.freeze_layers_up_to_idx(1)
            m.prune(layer_index=0, neuron_indices={99})
    after = everything(exp)
    before.pop("/rng/core/torch"), after.pop("/rng/core/torch")  # new weights were drawn
    same(before, after)
    assert (
        all(p is parameters[name] for name, p in exp.module.named_parameters())
        and exp.lab.journal.events == events
    )
    with exp.edit() as m:
        m.add_neurons(layer_index=0, neuron_count=2)
        m.prune(layer_index=0, neuron_indices={0})
    assert [e["what"].split()[0] for e in exp.lab.journal.events if e["kind"] == "edit"] == [
        "add",
        "prune",
    ]
    exp.train_n_steps(2)
    exp.undo()
    undone = everything(exp)
    for path, value in before.items():
        if path.startswith("/network"):
            same({path: value}, {path: undone[path]})
    with pytest.raises(LookupError, match="no edit to undo"):
        exp.undo()


def test_no_training_inside_an_edit(make):
    exp = make()
    exp.train_n_steps(1)
    before = everything(exp)
    with pytest.raises(RuntimeError, match="inside `with edit"):
        with exp.edit():
            exp.train_n_steps(1)
    after = everything(exp)
    assert all(
        torch.equal(before[p], after[p])
        for p in before
        if p.startswith("/network/snapshot/model") and "norm" not in p
    )


def test_undo_is_refused_where_the_model_was_rebuilt_since(make):
    exp = make()
    exp.train_n_steps(1)
    exp.model.add_neurons(layer="hidden", neuron_count=1)
    exp.module.out = nn.Linear(13, 10)
    before = {name: value.clone() for name, value in exp.module.state_dict().items()}
    with pytest.raises(ValueError, match="replaced since the edit"):
        exp.undo()
    after = exp.module.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_failed_edit_leaves_a_living_graph_alone(make):
    """The way back writes into no tensor that the edit left alone: a backward pass still runs."""
    exp = make()
    exp.train_n_steps(1)
    loss = exp.module(digits(8).tensors[0]).square().mean()
    with pytest.raises(Refused), exp.edit() as m:
        m.prune(layer="hidden", neuron_indices={0})
        m.prune(layer="out", neuron_indices={0})
    loss.backward()
    assert exp.module.stem.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("model, size", [(PlainNet, 8), (MNISTModel, 28)])
def test_an_edit_passes_through_few_files(make, model, size):
    exp = make(model(), train_dataset=digits(64, size), eval_dataset=digits(32, size, 900))
    exp.train_n_steps(1)
    room, entered = Path(pilimit_lib.__file__).parent, set()

    def note(frame, event, _):
        if event == "call" and (path := Path(frame.f_code.co_filename)).is_relative_to(room):
            entered.add(path.relative_to(room).as_posix())

    sys.setprofile(note)
    try:
        exp.model.prune(layer_index=0, neuron_indices={0})
    finally:
        sys.setprofile(None)
    assert "core/axis.py" in entered and len(entered) <= 12, sorted(entered)


def test_undo_goes_back_several_edits(make):
    exp = make(undo_depth=2)
    exp.train_n_steps(2)
    states = [everything(exp)]
    for count in (1, 2, 3):
        exp.model.add_neurons(layer="hidden", neuron_count=count)
        exp.train_n_steps(1)
        states.append(everything(exp))
    sizes = []
    for _ in range(2):
        exp.undo()
        sizes.append(exp.module.hidden.out_features)
        exp.train_n_steps(1)
    assert sizes == [12 + 1 + 2, 12 + 1]
    with pytest.raises(LookupError):
        exp.undo()


BAD_EDITS = [
    (
        lambda m: m.prune(layer_index=9, neuron_indices={0}),
        NotFound,
        "no layer with index 9; there are 5",
    ),
    (lambda m: m.prune(layer_index=-1, neuron_indices={0}), NotFound, "no layer with index -1"),
    (lambda m: m.prune(layer_index=0.5, neuron_indices={0}), TypeError, "integer"),
    (
        lambda m: m.prune(layer="features.7", neuron_indices={0}),
        NotFound,
        "no layer 'features.7'; layers are",
    ),
    (lambda m: m.prune(layer="norm", neuron_indices={0}), NotFound, "no layer 'norm'"),
    (lambda m: m.prune(neuron_indices={0}), ValueError, "name one layer"),
    (
        lambda m: m.prune(layer_index=0, layer="stem", neuron_indices={0}),
        ValueError,
        "name one layer",
    ),
    (
        lambda m: m.prune(layer_index=0, neuron_indices={0, 999}),
        NotFound,
        r"no such neurons: \[999\]",
    ),
    (lambda m: m.prune(layer_index=0, neuron_indices={-1}), NotFound, r"no such neurons: \[-1\]"),
    (lambda m: m.prune(layer_index=0, neuron_indices={0.5}), TypeError, "integers"),
    (lambda m: m.prune(layer_index=0, neuron_indices=set()), ValueError, "empty"),
    (lambda m: m.prune(layer_index=0, neuron_indices=range(6)), Refused, "all 6 neurons"),
    (lambda m: m.prune(layer_index=4, neuron_indices={1}), Refused, "output layer"),
    (lambda m: m.add_neurons(layer_index=0, neuron_count=0), ValueError, "at least 1"),
    (lambda m: m.add_neurons(layer_index=0, neuron_count=-2), ValueError, "at least 1"),
    (lambda m: m.add_neurons(layer_index=0, neuron_count=1.5), ValueError, "at least 1"),
    (lambda m: m.add_neurons(layer_index=4, neuron_count=1), Refused, "output layer"),
    (lambda m: m.add_neurons(layer_index=0, neuron_count=1, init="magic"), ValueError, "zero_out"),
    (lambda m: m.reinit_neurons(layer_index=0, neuron_indices={0, 999}), NotFound, r"\[999\]"),
    (lambda m: m.reinit_neurons(layer_index=4, neuron_indices={0}), Refused, "output layer"),
    *[
        (
            lambda m, r=r: m.reinit_neurons(
                layer_index=0, neuron_indices={1}, perturbation_ratio=r
            ),
            ValueError,
            "between 0 and 1",
        )
        for r in (0, 1, -0.1, 2.0, float("nan"), "0.5")
    ],
]


@pytest.mark.parametrize("number", range(len(BAD_EDITS)))
def test_bad_edits_say_so_and_leave_everything_as_before(make, number):
    call, error, message = BAD_EDITS[number]
    exp = make()
    exp.train_n_steps(2)
    before, identity = everything(exp), {n: id(p) for n, p in exp.module.named_parameters()}
    with pytest.raises(error, match=message):
        call(exp.model)
    same(before, everything(exp))
    assert identity == {n: id(p) for n, p in exp.module.named_parameters()}
    assert not any(e["kind"] == "edit" for e in exp.lab.journal.events)
    exp.train_n_steps(1)


def test_bad_settings(make):
    for options, message in [
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"batch_size": 0}, "batch_size"),
    ]:
        with pytest.raises(ValueError, match=message):
            make(**options)
    exp = make()
    with pytest.raises(ValueError, match="learning_rate=nan"):
        exp.set_learning_rate(float("nan"))
    for n in (-1, 2.5, True):
        with pytest.raises(ValueError, match="number of steps"):
            exp.train_n_steps(n)
    with pytest.raises(ValueError, match="reduction='none'"):
        make(criterion=F.cross_entropy).train_n_steps(1)


def test_evaluations_and_checkpoints_come_when_they_are_due(make):
    exp = make(eval_every=2, dump_every=4, log_every=3)
    loss, accuracy = exp.train_n_steps_with_eval_full(9)
    assert (loss, accuracy) == pytest.approx(exp.eval_n_steps(10**6))
    ages = {
        kind: [e["step"] for e in exp.lab.journal.events if e["kind"] == kind]
        for kind in ("eval", "train", "checkpoint")
    }
    assert ages == {"eval": [0, 2, 4, 6, 8, 9], "train": [3, 6, 9], "checkpoint": [4, 8]}
    assert [exp.chkpt_manager.entry(i)["steps"] for i in exp.chkpt_manager] == [4, 8]


def test_means_are_over_samples_not_batches(make):
    exp = make()  # 100 evaluation samples in batches of 32: the last one is short
    x, y = exp.eval_loader.dataset.wrapped.tensors
    exp.module.eval()
    with torch.no_grad():
        out = exp.module(x)
    exp.module.train()
    loss, accuracy = exp.eval_full()
    assert exp.module.training
    assert loss == pytest.approx(float(F.cross_entropy(out, y)), rel=1e-5)
    assert accuracy == pytest.approx(float((out.argmax(1) == y).float().mean()))


def test_setting_the_learning_rate_keeps_the_optimiser(make):
    exp = make()
    exp.train_n_steps(2)
    moments = exp.optimizer.state[exp.module.stem.weight]["exp_avg"].clone()
    exp.set_learning_rate(1e-4)
    assert exp.optimizer.param_groups[0]["lr"] == 1e-4
    assert torch.equal(exp.optimizer.state[exp.module.stem.weight]["exp_avg"], moments)


def test_no_example_says_what_to_pass():
    lab = watch(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
    with pytest.raises(ValueError, match="pass example="):
        lab.model.prune(layer="0", neuron_indices={0})
    lab.module(torch.randn(5, 3))  # a forward pass says what inputs look like
    lab.model.prune(layer="0", neuron_indices={0})
    assert lab.module[0].out_features == 3


def test_edits_leave_generators_and_modes_of_planning_alone(make):
    exp = make(PlainNet(dropout=0.5))
    exp.train_n_steps(2)
    exp.module.inner_norm.eval()
    generator, buffers = (
        torch.get_rng_state(),
        {n: b.clone() for n, b in exp.module.named_buffers()},
    )
    counts = exp.neuron_stats()
    exp.model.prune(layer="hidden", neuron_indices={3})
    assert (
        torch.equal(generator, torch.get_rng_state())
        and exp.module.training
        and not exp.module.inner_norm.training
    )
    assert all(torch.equal(b, buffers[n]) for n, b in exp.module.named_buffers())
    remaining = counts[~((counts["layer"] == "hidden") & (counts["neuron"] == 3))]
    assert exp.neuron_stats()["train_triggers"].tolist() == remaining["train_triggers"].tolist()


def test_tensorboard_gets_the_curves(make, tmp_path):
    pytest.importorskip("tensorboard", reason="needs tensorboard: pip install 'pilimit[lab]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    exp = make(name="board", tensorboard=True, log_every=2)
    exp.train_n_steps_with_eval_full(6)
    exp.lab.on_scalars.writer.close()
    events = EventAccumulator(str(exp.folder / "tensorboard")).Reload()
    assert {"train-loss", "train-acc", "eval-loss", "eval-acc", "model-params"} <= set(
        events.Tags()["scalars"]
    )
    assert [e.step for e in events.Scalars("train-loss")] == [64, 128, 192]
    assert [e.step for e in events.Scalars("eval-loss")] == [0, 192]


@pytest.mark.parametrize("kind, size", [(PlainNet, 8), (MNISTModel, 28)])
def test_a_compiled_model_does_what_the_plain_one_does(make, kind, size):
    data = {"train_dataset": digits(96, size), "eval_dataset": digits(32, size, 900)}
    done = []
    for compile_it in (False, True):
        torch.manual_seed(0)
        model = kind()
        if compile_it:
            model = torch.compile(model, backend="eager")
        exp = make(model, name=f"compiled {compile_it}", **data)
        exp.train_n_steps(2)
        exp.eval_full()
        exp.model.prune(layer_index=0, neuron_indices={1})
        exp.train_n_steps(2)
        exp.dump()
        exp.load(0)
        exp.model(data["eval_dataset"].tensors[0])
        done.append(exp)
    plain, compiled = done
    assert compiled._forward is not compiled.module and type(compiled.module) is kind
    for path, value in everything(plain).items():
        if "settings" not in path:
            same({path: value}, {path: everything(compiled)[path]})
    assert torch.load(compiled.chkpt_manager.path(0), weights_only=True)["layers"] == (
        plain.lab.layer_paths()
    )


def test_what_was_compiled_in_place_is_refused_with_the_remedy(make):
    whole, part = PlainNet(), PlainNet()
    whole.compile(backend="eager")
    part.hidden = torch.compile(part.hidden, backend="eager")
    for model, name in ((whole, "PlainNet"), (part, "hidden")):
        with pytest.raises(Refused, match=f"'{name}' was compiled in place.*torch.compile"):
            make(model)
        with pytest.raises(Refused, match="compiled in place"):
            watch(model)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_a_notebook_prints(make, capsys):
    exp = make()
    change = exp.model.prune(layer="hidden", neuron_indices={1})
    assert repr(change).startswith("Change: ") and "Linear.weight [12, 36] -> [11, 36]" in repr(
        change
    )
    assert "\n" not in repr(change) and len(repr(change)) < 140
    exp.train_n_steps(2)
    exp.train_loader.dataset.denylist_samples([1, 2])
    exp.dump()
    print(exp)
    lines = capsys.readouterr().out.splitlines()
    sizes = f"{sum(p.numel() for p in exp.module.parameters()):,}"
    assert (
        lines[0] == f"Experiment 'plain': PlainNet ({sizes} parameters), Adam at learning rate 0.01"
    )
    assert lines[1:4] == [
        "  age 64 samples, 2 steps",
        "  train set: 200 samples, 2 denied, batches of 32",
        "  eval set: 100 samples, batches of 32",
    ]
    assert lines[4] == f"  1 checkpoints in {exp.folder}, grown out of checkpoint 0"
    assert repr(watch(PlainNet())).startswith("Lab 'PlainNet': PlainNet (")
