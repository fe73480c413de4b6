"""Going back: continuing from a checkpoint equals never having stopped, bit for bit; what cannot be
written or read says so."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn, optim

from pilimit_lib.core import load as core_load
from pilimit_lib.lab import CheckpointManager, NotFound, watch
from pilimit_lib.lab.run.journal import read_journal

from .conftest import PlainNet, digits, full_disk


def everything(exp):
    """All that training depends on or has produced, as one flat dictionary of comparable values."""
    from pilimit_lib.lab.run.state import full_state

    flat = {}

    def walk(path, value):
        if isinstance(value, dict):
            for key, entry in value.items():
                walk(f"{path}/{key}", entry)
        elif isinstance(value, list | tuple):
            for i, entry in enumerate(value):
                walk(f"{path}/{i}", entry)
        else:
            flat[path] = value

    walk("", full_state(getattr(exp, "lab", exp)))
    return flat


def same(one, other):
    assert one.keys() == other.keys()
    for path, value in one.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(
                value.nan_to_num(-7.0) if value.is_floating_point() else value,
                other[path].nan_to_num(-7.0) if value.is_floating_point() else other[path],
            ), path
        else:
            assert value == other[path] or (value != value and other[path] != other[path]), path


def busy(exp):
    """A stretch of training with everything that a checkpoint has to carry."""
    exp.train_n_steps(3)
    exp.model.add_neurons(layer_index=0, neuron_count=3)
    exp.model.prune(layer="hidden", neuron_indices={0, 5})
    exp.model.layers[0].set_per_neuron_learning_rate({1}, lr=0.0)
    exp.model.layers[1].set_per_incoming_neuron_learning_rate({2}, lr=0.5)
    exp.model.freeze_layers_up_to_idx(0)
    exp.train_n_steps(6)
    exp.train_loader.dataset.denylist_samples(range(20, 60))
    exp.train_loader.dataset.tag("odd", [1, 3])
    exp.eval_n_steps(2)
    exp.train_n_steps(2)


@pytest.mark.parametrize(
    "optimizer, options, workers",
    [
        (optim.AdamW, {"weight_decay": 0.1}, 0),
        (optim.SGD, {"momentum": 0.9}, 0),
        (optim.AdamW, {"weight_decay": 0.1}, 2),
    ],
)
def test_continuing_equals_never_having_stopped(make, optimizer, options, workers):
    def experiment(seed, name="straight"):
        return make(
            PlainNet(dropout=0.3),
            seed=seed,
            name=name,
            optimizer_class=optimizer,
            optimizer_options=options,
            num_workers=workers,
        )

    straight = experiment(0)
    busy(straight)
    straight.dump()
    straight.train_n_steps(9)
    straight.eval_full()
    expected = everything(straight)

    # another initialisation, another history, the sizes of the constructor
    other = experiment(5)
    torch.manual_seed(12345)
    other.train_n_steps(2)
    other.load(0)
    other.train_n_steps(9)
    other.eval_full()
    same(expected, everything(other))

    straight.load(0)  # and in the experiment itself
    straight.train_n_steps(9)
    straight.eval_full()
    same(expected, everything(straight))


def test_files_load_with_weights_only_and_the_tree_has_parents(make):
    exp = make()
    exp.train_n_steps(1)
    assert exp.dump("first") == 0
    exp.train_n_steps(1)
    assert exp.dump() == 1
    exp.load(0)
    exp.model.prune(layer="hidden", neuron_indices={1})
    assert exp.dump("smaller") == 2
    exp.set_learning_rate(1e-3)
    assert exp.dump() == 3
    manager = exp.chkpt_manager
    assert [manager.entry(i)["parent"] for i in range(4)] == [None, 0, 0, 2] and manager.ancestors(
        3
    ) == [3, 2, 0]
    entries = [manager.entry(i) for i in range(4)]
    assert (
        entries[0]["structure"]
        == entries[1]["structure"]
        != entries[2]["structure"]
        == entries[3]["structure"]
    )
    assert entries[0]["data"] != entries[1]["data"] and entries[0]["data"] == entries[2]["data"]
    assert entries[0]["settings"] == entries[2]["settings"] != entries[3]["settings"]
    torch.load(manager.path(2), weights_only=True)
    text = str(manager)
    assert "4 checkpoints" in text and "smaller" in text and "*     3" in text
    assert [entry["id"] for entry in json.loads(manager.index.read_text())] == [0, 1, 2, 3]
    assert len(CheckpointManager(manager.folder)) == 4


def test_a_new_process_sees_the_run_but_loads_nothing_by_itself(make):
    first = make(name="same")
    first.train_n_steps(2)
    first.dump()
    again = make(name="same", seed=7)
    assert again.age == 0 and 0 in again.chkpt_manager
    again.train_n_steps(1)
    assert again.dump() == 1 and again.chkpt_manager.entry(1)["parent"] is None


def test_two_live_experiments_never_write_the_same_id(make):
    one, other = make(name="x0"), make(name="x0", seed=7)
    stored = {name: value.clone() for name, value in one.module.state_dict().items()}
    assert (one.dump("mine"), other.dump("theirs"), one.dump()) == (0, 1, 2)
    one.train_n_steps(1)
    one.load(0)
    assert all(torch.equal(value, stored[n]) for n, value in one.module.state_dict().items())
    assert [one.chkpt_manager.entry(i)["parent"] for i in range(3)] == [None, None, 0]
    assert "3 checkpoints" in str(other.chkpt_manager), "each sees what the other wrote"
    other.lab.note("hello")
    events = one.lab.journal.path.read_text()
    assert [json.loads(line)["branch"] for line in events.splitlines() if "hello" in line] == [1]


def test_two_processes_share_a_folder(tmp_path):
    """Both write as fast as they can: every id is one process's own, and the index lists all."""
    script = (
        "import sys, time, torch\n"
        "from pathlib import Path\n"
        "from pilimit_lib.lab.run.checkpoints import CheckpointManager\n"
        "from pilimit_lib.lab.run.journal import Journal\n"
        "folder, me = Path(sys.argv[1]), int(sys.argv[2])\n"
        "(folder / f'ready{me}').touch()\n"
        "while not (folder / f'ready{1 - me}').exists(): time.sleep(.01)\n"
        "manager, journal = CheckpointManager(folder / 'c'), Journal(folder / 'journal.jsonl')\n"
        "for i in range(20):\n"
        "    manager.dump({'of': torch.tensor([me, i])}, note=f'{me}')\n"
        "    journal.write('edit', what=str(me))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    runs = [
        subprocess.Popen([sys.executable, "-c", script, tmp_path, str(me)], env=environment)
        for me in (0, 1)
    ]
    assert [run.wait(timeout=600) for run in runs] == [0, 0]
    manager = CheckpointManager(tmp_path / "c")
    assert sorted(manager) == list(range(40))
    found = [(manager.entry(i)["note"], manager.read(i)["of"].tolist()) for i in manager]
    assert all(note == str(of[0]) for note, of in found)
    assert sorted(of for _, of in found) == [[me, i] for me in (0, 1) for i in range(20)]
    events = read_journal(tmp_path / "journal.jsonl")
    assert {(e["what"], e["branch"]) for e in events if e["kind"] == "edit"} in (
        {("0", 0), ("1", 1)},
        {("0", 1), ("1", 0)},
    )


def test_a_file_without_an_entry_is_never_written_over(tmp_path):
    """A process was killed between the file and the index."""
    manager = CheckpointManager(tmp_path)
    manager.dump({})
    manager.path(1).write_bytes(b"somebody's")
    assert manager.dump({}) == 2 and manager.path(1).read_bytes() == b"somebody's"


def entries(*pairs):
    return json.dumps([{"id": number, "parent": parent} for number, parent in pairs])


@pytest.mark.parametrize(
    "text, message",
    [
        (entries((0, 1), (1, 0)), "0 cannot descend from 1"),
        (entries((0, 0)), "0 cannot descend from 0"),
        (entries((0, None), (0, None)), "id 0"),
        (entries((-1, None)), "id -1"),
        (entries(("../../x", None)), "id '../../x'"),
        (entries((True, None)), "id True"),
        (entries((1, "0")), "1 cannot descend from '0'"),
        ('{"id": 0, "parent": null}', "a list was expected"),
        ("[3]", "damaged"),
        ('[{"id": 0}]', "parent"),
        ('[{"id": 0, "parent": null, "note": 7}]', "'note' of checkpoint 0 is 7"),
        ('[{"id": 0, "par', "damaged"),
        ("[" * 100_000, "damaged"),
    ],
)
def test_a_damaged_index_is_named_and_not_read(tmp_path, text, message):
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        CheckpointManager(tmp_path)
    assert str(tmp_path / "index.json") in str(caught.value)


def test_a_long_line_of_checkpoints_is_read_and_printed(tmp_path):
    (tmp_path / "index.json").write_text(entries(*((i, i - 1 if i else None) for i in range(3000))))
    manager = CheckpointManager(tmp_path)
    assert manager.ancestors(2999) == list(range(2999, -1, -1))
    assert len(str(manager).splitlines()) == 3001


def test_a_checkpoint_cut_anywhere_is_named_and_nothing_changes(make):
    exp = make()
    exp.train_n_steps(1)
    exp.dump()
    before, path = everything(exp), exp.chkpt_manager.path(0)
    whole = path.read_bytes()
    for share in (0, 0.001, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(ValueError) as caught:
            exp.load(0)
        assert str(path) in str(caught.value), share
    for damage in (
        lambda state: state.pop("network"),
        lambda state: state["network"].pop("neurons"),
        lambda state: state["network"].update(sizes=3),
        lambda state: state["network"]["neurons"].update(nowhere={}),
        lambda state: state["ledgers"]["train"]["columns"].update(loss=torch.zeros(3)),
        lambda state: state["ledgers"]["train"].update(tags=[1]),
        lambda state: state["loaders"]["train"].update(position="far"),
        lambda state: state["rng"].update(numpy=[1]),
        lambda state: state.update(window=7),
    ):
        path.write_bytes(whole)
        state = core_load(path)
        damage(state)
        torch.save(state, path)
        with pytest.raises(ValueError, match=str(path)):
            exp.load(0)
        same(before, everything(exp))
    path.write_bytes(whole)
    exp.load(0)


def test_unknown_checkpoints_are_refused_and_nothing_changes(make):
    exp = make()
    exp.train_n_steps(1)
    before = everything(exp)
    with pytest.raises(NotFound, match="no checkpoint 0 .* there are none yet"):
        exp.load(0)
    exp.dump()
    with pytest.raises(NotFound, match=r"no checkpoint 7 .* there are \[0\]"):
        exp.load(checkpoint_id=7)
    same(before, everything(exp))


class Other(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(64, 6)
        self.out = nn.Linear(6, 10)

    def forward(self, x):
        return self.out(self.stem(x.flatten(1)).relu())


def test_checkpoints_that_do_not_fit_are_refused_and_nothing_changes(make, tmp_path):
    exp = make(name="one")
    exp.train_n_steps(1)
    exp.dump()
    for other, message in [
        (make(Other(), name="one"), "another architecture"),
        (
            make(name="one", train_dataset=digits(150)),
            "speaks of 200 samples, the data set has 150",
        ),
        (
            make(
                name="one",
                optimizer_class=lambda p, lr: optim.Adam(
                    [{"params": list(p)[:4]}, {"params": []}], lr=lr
                ),
            ),
            "parameter",
        ),
        (make(name="one", optimizer_class=optim.SGD), "class Adam, here it is SGD.*with Adam"),
        (make(name="one", optimizer_class=optim.AdamW), "class Adam, here it is AdamW"),
        (make(name="one", train_dataset=digits(200, start=300)), "train set is not the one"),
        (make(name="one", eval_dataset=digits(100, start=300)), "eval set is not the one"),
    ]:
        other.train_n_steps(2)
        before = everything(other)
        with pytest.raises(ValueError, match=message):
            other.load(0)
        same(before, everything(other))
    path = exp.chkpt_manager.path(0)
    path.write_bytes(path.read_bytes()[:-2000])
    before = everything(exp)
    with pytest.raises(ValueError, match="damaged"):
        exp.load(0)
    torch.save({"lab": 99}, path)
    with pytest.raises(ValueError, match="not a checkpoint of the lab"):
        exp.load(0)
    torch.save(exp.module, path)
    with pytest.raises(ValueError, match="plain tensors"):
        exp.load(0)
    same(before, everything(exp))


class Augmented(torch.utils.data.Dataset):
    """Random flips and noise, from torch's generator or from one of its own."""

    def __init__(self, scale=0.1, own=False):
        self.data, self.scale = digits(200), scale
        self.generator = torch.Generator() if own else None

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        image, label = self.data[index]
        noise = torch.randn(image.shape, generator=self.generator)
        flipped = image.flip(2) if torch.rand((), generator=self.generator) < 0.5 else image
        return flipped + self.scale * noise, label


def test_augmented_data_is_the_same_data(make):
    for own in (False, True):
        exp = make(train_dataset=Augmented(own=own), name=f"own {own}")
        exp.train_n_steps(1)
        exp.dump()
        again = make(train_dataset=Augmented(own=own), name=f"own {own}", seed=3)
        torch.manual_seed(99)
        again.load(0)
    again = make(train_dataset=Augmented(scale=0.3), name="own False")
    with pytest.warns(UserWarning, match="train set .* the labels are the same, the inputs differ"):
        again.load(0)


def test_a_full_disk_is_reported_and_leaves_everything_as_before(make):
    exp = make()
    exp.train_n_steps(2)
    exp.dump()
    exp.train_n_steps(1)
    before, files = everything(exp), sorted(os.listdir(exp.chkpt_manager.folder))
    with (
        full_disk(20_000),
        pytest.raises(
            OSError,
            match="checkpoint 1 could not be written .*the disk is full.* experiment is as before",
        ),
    ):
        exp.dump()
    same(before, everything(exp))
    assert sorted(os.listdir(exp.chkpt_manager.folder)) == files
    assert len(exp.chkpt_manager) == 1 and exp.chkpt_manager.current == 0
    assert exp.dump() == 1
    exp.load(1)


def test_further_things_are_kept_or_refused(tmp_path):
    torch.manual_seed(0)
    model = PlainNet()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    schedule = optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    lab = watch(
        model,
        optimizer,
        example=torch.randn(2, 1, 8, 8),
        folder=tmp_path,
        also={"schedule": schedule},
    )
    schedule.last_epoch = 4
    lab.dump()
    schedule.last_epoch = 9
    lab.load(0)
    assert schedule.last_epoch == 4

    class Code:
        def state_dict(self):
            return {"code": PlainNet}

    lab.also["code"] = Code()
    with pytest.raises(ValueError, match=r"also\['code'\]"):
        lab.dump()
    assert len(lab.chkpt_manager) == 1

    class Stubborn(Code):
        def state_dict(self):
            return {"n": 1}

        def load_state_dict(self, state):
            if state["n"] == 1 and model.stem.weight[0, 0, 0, 0] != 7:
                raise RuntimeError("I will not")

    lab.also["code"] = Stubborn()
    lab.dump()
    with torch.no_grad():
        model.stem.weight[0, 0, 0, 0] = 7
    before = everything(lab)
    with pytest.raises(RuntimeError, match="I will not"):
        lab.load(1)
    same(before, everything(lab))
    del lab.also["code"], lab.also["schedule"]
    with pytest.raises(ValueError, match="schedule.*on one side only"):
        lab.load(0)


def test_grown_layers_of_the_core_protocol_come_back_too(tmp_path):
    """A module that changes size by itself says so with structure/restructure; the lab leaves it
    its own way."""
    from pilimit_lib.core import Axis

    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 3))
            self.axis = Axis("rows").join(self, "weight")

        def forward(self, x):
            return x @ self.weight.T @ self.weight

        def structure(self):
            return {"rows": self.axis.size}

        def restructure(self, structure):
            size, now = structure["rows"], self.axis.size
            return self.axis.take(
                torch.cat([torch.arange(min(size, now)), torch.full((max(0, size - now),), -1)])
            )

    model = nn.Sequential(nn.Linear(4, 3), Rows(), nn.Linear(3, 2))
    optimizer = optim.Adam(model.parameters())
    lab = watch(model, optimizer, example=torch.randn(2, 4), folder=tmp_path)
    from pilimit_lib.core import follow

    follow(optimizer, model[1].axis.append({"weight": torch.full((3, 3), 2.0)}))
    lab.dump()
    follow(optimizer, model[1].axis.keep(torch.tensor([0])))
    lab.load(0)
    assert torch.equal(model[1].weight, torch.cat([torch.ones(2, 3), torch.full((3, 3), 2.0)]))


def test_the_stored_ledger_and_counters_are_those_of_the_moment(make):
    exp = make()
    busy(exp)
    exp.dump()
    frame, counts = exp.train_loader.dataset.get_dataframe(all_samples=True), exp.neuron_stats()
    exp.train_n_steps(5)
    exp.load(0)
    np.testing.assert_array_equal(
        exp.train_loader.dataset.get_dataframe(all_samples=True).to_numpy(dtype=float),
        frame.to_numpy(dtype=float),
    )
    assert exp.neuron_stats().equals(counts)
    assert (
        not exp.module.stem.weight.requires_grad
        and exp.lab.neurons[exp.module.stem].rate.tolist()[1] == 0
    )
    assert core_load(exp.chkpt_manager.path(0))["network"]["frozen"] == ["stem.weight", "stem.bias"]
