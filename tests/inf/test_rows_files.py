"""Rows in files: offloaded while training, and checkpoints that are written and read block by
block."""

import copy
import errno
import gc
import os
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pilimit_lib.core import restore, snapshot
from pilimit_lib.inf import InfMLP, PiSGD
from pilimit_lib.inf.rows.files import load_rows, save_rows
from pilimit_lib.inf.rows.offload import MappedFiles, pi_offload
from pilimit_lib.inf.rows.shard import shard_rows

from .test_rows_shard import started


def build(row_dtype=torch.float32, seed=3, **settings):
    torch.manual_seed(seed)
    net = InfMLP(5, 3, 6, 1, row_dtype=row_dtype, **settings)
    return net, PiSGD(net.parameters(), lr=0.2, momentum=0 if settings else 0.5, weight_decay=0.05)


def train(net, optimizer, steps, start=0):
    for number in range(start, start + steps):
        generator = torch.Generator().manual_seed(number)
        x, y = torch.randn(5, 5, generator=generator), torch.randint(3, (5,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()


def tensors(net):
    return {
        name: value for name, value in net.state_dict().items() if isinstance(value, torch.Tensor)
    }


def assert_same(net, other):
    mine, theirs = tensors(net), tensors(other)
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert torch.equal(value, theirs[name]), name


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks per layer."""
    from pilimit_lib.core import blocks

    monkeypatch.setattr(
        blocks.Blocks.__init__,
        "__kwdefaults__",
        {**blocks.Blocks.__init__.__kwdefaults__, "block_rows": 8},
    )


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("row_dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_offloaded_rows_train_bit_for_bit(where, row_dtype, tmp_path, small_blocks):
    net, optimizer = build(row_dtype)
    other, its_optimizer = build(row_dtype)
    assert pi_offload(other, "cpu" if where == "cpu" else tmp_path / "rows") is other
    train(net, optimizer, 4)
    train(other, its_optimizer, 4)
    assert_same(net, other)
    twin = copy.deepcopy(other)
    train(twin, PiSGD(twin.parameters(), lr=0.1), 1)
    assert_same(net, other)
    state = snapshot(other, its_optimizer)
    train(other, its_optimizer, 2, 4)
    restore(other, state, its_optimizer)
    assert_same(net, other)
    if row_dtype != torch.bfloat16:
        other.double().float()
        assert (other.layers[1].A.blocks.storage, net.layers[1].A.blocks.storage) == (
            row_dtype,
            row_dtype,
        )
    pi_offload(other, "device")
    train(net, optimizer, 1, 9)
    train(other, its_optimizer, 1, 9)
    assert_same(net, other)


def test_blocks_lie_in_files_that_go_with_them(tmp_path, small_blocks):
    net, optimizer = build()
    pi_offload(net, tmp_path)
    train(net, optimizer, 4)
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("only /proc tells what is mapped")
    assert maps.read_text().count(str(tmp_path)) == 2 * sum(-(-rows // 8) for rows in net.rows)
    del net, optimizer
    gc.collect()
    assert str(tmp_path) not in maps.read_text() and not list(tmp_path.iterdir())


def test_a_disk_that_is_full_is_an_error(tmp_path):
    with pytest.raises(OSError):
        MappedFiles(tmp_path)((1 << 40, 1 << 20), torch.float32, torch.device("cpu"))
    assert not list(tmp_path.iterdir())


def test_offloading_where_it_can_not_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file"):
        pi_offload(build()[0], tmp_path / "file")
    with pytest.raises(ValueError, match="nothing to offload"):
        pi_offload(nn.Linear(2, 2))


@pytest.mark.parametrize("row_dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_a_checkpoint_in_blocks_resumes_bit_for_bit(row_dtype, tmp_path, small_blocks):
    net, optimizer = build(row_dtype)
    train(net, optimizer, 4)
    for _ in range(2):  # the second replaces the first
        save_rows(net, tmp_path / "saved", optimizer, epoch=7)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    other, its_optimizer = build(row_dtype, seed=4)
    assert load_rows(other, tmp_path / "saved", its_optimizer) == {"epoch": 7}
    assert_same(net, other)
    train(net, optimizer, 3, 4)
    train(other, its_optimizer, 3, 4)
    assert_same(net, other)


def test_into_another_storage_and_onto_disk(tmp_path, small_blocks):
    net, optimizer = build(torch.int8)
    train(net, optimizer, 3)
    save_rows(net, tmp_path / "saved")
    other = pi_offload(build(torch.float32, seed=4)[0], tmp_path / "rows")
    load_rows(other, tmp_path / "saved")
    assert torch.equal(other.layers[1].A.detach(), net.layers[1].A.detach())
    torch.testing.assert_close(other(torch.ones(2, 5)), net(torch.ones(2, 5)))


def test_folded_rows_are_part_of_it(tmp_path):
    net, optimizer = build(row_budget=8)
    train(net, optimizer, 3)
    save_rows(net, tmp_path / "saved", optimizer)
    other, its_optimizer = build(seed=4, row_budget=8)
    load_rows(other, tmp_path / "saved", its_optimizer)
    assert_same(net, other)


def change_rank_file(change):
    def damage(folder):
        small = torch.load(folder / "rank-0.pt", weights_only=True)
        change(small)
        torch.save(small, folder / "rank-0.pt")

    return damage


def shortened(layer, key):
    return change_rank_file(lambda small: small[layer].update({key: small[layer][key][:-2]}))


DAMAGE = {
    "short multipliers": (
        shortened("layers.1", "Amult"),
        ValueError,
        r"\[14\] Amult of 'layers.1', \[16\]",
    ),
    "short origin": (shortened("layers.2", "origin"), ValueError, r"origin of 'layers.2'"),
    "short momentum": (shortened("layers.2", "momentum_buffer"), ValueError, "momentum_buffer"),
    "short scales": (shortened("layers.2", "A_scale"), ValueError, r"A_scale of 'layers.2'"),
    "no shifts": (
        change_rank_file(lambda small: small["layers.1"].pop("B_shift")),
        ValueError,
        "no B_shift of 'layers.1'",
    ),
    "rank without a layer": (
        change_rank_file(lambda small: small.pop("layers.2")),
        ValueError,
        "no Amult of 'layers.2'",
    ),
    "truncated rows": (lambda f: (f / "A.0.layers.1").write_bytes(b"1234"), ValueError, "4 bytes"),
    "missing rows": (lambda f: (f / "B.0.layers.2").unlink(), ValueError, "no bytes"),
    "missing rank": (lambda f: (f / "rank-0.pt").unlink(), FileNotFoundError, "rank-0"),
    "no checkpoint": (lambda f: (f / "state.pt").unlink(), FileNotFoundError, "state.pt"),
    "other state": (
        lambda f: torch.save({"a": 1}, f / "state.pt"),
        ValueError,
        "not a checkpoint of rows",
    ),
    "executable": (lambda f: torch.save(nn.Linear(2, 2), f / "state.pt"), ValueError, "not loaded"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_before_anything_changes(damage, tmp_path):
    net, optimizer = build(torch.int8)
    train(net, optimizer, 2)
    save_rows(net, tmp_path / "saved", optimizer)
    act, error, message = DAMAGE[damage]
    act(tmp_path / "saved")
    other, its_optimizer = build(seed=4)
    before = tensors(other)
    with pytest.raises(error, match=message):
        load_rows(other, tmp_path / "saved", its_optimizer)
    assert tensors(other).keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in tensors(other).items())


@pytest.mark.parametrize("row_dtype", [torch.float32, torch.int8], ids=str)
def test_the_rank_file_of_another_checkpoint_is_refused(row_dtype, tmp_path):
    net, optimizer = build(row_dtype)
    save_rows(net, tmp_path / "old", optimizer)
    train(net, optimizer, 2)
    save_rows(net, tmp_path / "new", optimizer)
    (tmp_path / "old" / "rank-0.pt").replace(tmp_path / "new" / "rank-0.pt")
    other, its_optimizer = build(row_dtype, seed=4)
    before = tensors(other)
    with pytest.raises(ValueError, match="another checkpoint"):
        load_rows(other, tmp_path / "new", its_optimizer)
    assert all(torch.equal(value, before[name]) for name, value in tensors(other).items())


@pytest.mark.parametrize("file", ["A.0.layers.1", "B.0.layers.2", "rank-0.pt", "state.pt"])
@pytest.mark.parametrize("how", ["flipped", "zeros", "of another checkpoint"])
def test_a_file_that_is_not_the_one_that_was_written_changes_nothing(file, how, tmp_path):
    for seed, name in ((3, "saved"), (5, "other")):
        net, optimizer = build(seed=seed)
        optimizer.param_groups[0]["lr"] = seed / 20
        train(net, optimizer, 2)
        save_rows(net, tmp_path / name, optimizer)
    path = tmp_path / "saved" / file
    content = path.read_bytes()
    # a place that is read: numbers, or a name
    middle = content.index(b"layers.1") if file.endswith(".pt") else len(content) // 2
    path.write_bytes(
        {
            "flipped": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
            "zeros": bytes(len(content)),
            "of another checkpoint": (tmp_path / "other" / file).read_bytes(),
        }[how]
    )
    other, its_optimizer = build(seed=4)
    before = tensors(other)
    # A state.pt of another checkpoint names the files that are not its own.
    with pytest.raises(ValueError, match=r"saved.*(damaged|not a file of torch.save)"):
        load_rows(other, tmp_path / "saved", its_optimizer)
    assert all(torch.equal(value, before[name]) for name, value in tensors(other).items())


def test_a_checkpoint_of_an_earlier_version_has_no_digests_and_loads(tmp_path):
    net, optimizer = build()
    train(net, optimizer, 2)
    save_rows(net, tmp_path / "saved", optimizer)
    found = torch.load(tmp_path / "saved" / "state.pt", weights_only=True)
    del found["digests"]
    torch.save(found, tmp_path / "saved" / "state.pt")
    other, its_optimizer = build(seed=4)
    load_rows(other, tmp_path / "saved", its_optimizer)
    assert_same(net, other)


@pytest.mark.parametrize("fails", [1, 2, 3])
def test_a_folder_is_replaced_whole_or_not_at_all(fails, tmp_path, monkeypatch):
    """Whichever of the renames of the folders fails."""
    net, optimizer = build()
    save_rows(net, tmp_path / "saved", optimizer)
    kept = copy.deepcopy(net)
    train(net, optimizer, 2)
    replace, calls = os.replace, []

    def failing(source, target):
        if Path(source).is_dir():
            calls.append(source)
            if len(calls) == fails:
                raise OSError(5, "Input/output error")
        return replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    if fails < 3:
        with pytest.raises(OSError, match="Input/output"):
            save_rows(net, tmp_path / "saved", optimizer)
    else:
        save_rows(net, tmp_path / "saved", optimizer)
    assert os.listdir(tmp_path) == ["saved"]
    other, its_optimizer = build(seed=4)
    load_rows(other, tmp_path / "saved", its_optimizer)
    assert_same(net if fails == 3 else kept, other)


def test_what_a_killed_run_left_is_put_back_or_removed(tmp_path):
    net, optimizer = build()
    save_rows(net, tmp_path / "saved", optimizer)
    (tmp_path / "saved").rename(tmp_path / ".saved.old")  # killed between the two renames
    (tmp_path / ".saved.part").mkdir()
    other, its_optimizer = build(seed=4)
    load_rows(other, tmp_path / "saved", its_optimizer)
    assert_same(net, other)
    save_rows(net, tmp_path / "saved", optimizer)
    assert os.listdir(tmp_path) == ["saved"]


def test_a_full_disk_is_called_so(tmp_path, monkeypatch):
    net, optimizer = build()
    save_rows(net, tmp_path / "saved", optimizer)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="the disk is full.*the one that is there stays.*saved"):
        save_rows(net, tmp_path / "saved", optimizer)
    assert os.listdir(tmp_path) == ["saved"]
    load_rows(build(seed=4)[0], tmp_path / "saved")


def one_disk_is_full(rank, size, folder):
    net, optimizer = build()
    shard_rows(net, optimizer=optimizer)
    save_rows(net, f"{folder}/saved", optimizer)
    kept = [rows.clone() for rows in net.layers[1].A.blocks.views()]
    train(net, optimizer, 1)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    fsync = os.fsync
    os.fsync = full if rank == 1 else fsync
    kind, message = (OSError, "disk is full") if rank == 1 else (RuntimeError, "rank 1.*No space")
    with pytest.raises(kind, match=message):
        save_rows(net, f"{folder}/saved", optimizer)
    os.fsync = fsync
    load_rows(net, f"{folder}/saved", optimizer)
    assert [name for name in os.listdir(folder) if "saved" in name] == ["saved"]
    assert all(map(torch.equal, net.layers[1].A.blocks.views(), kept))
    if rank == 1:
        Path(folder, "saved", "A.1.layers.1").write_bytes(b"")
    with pytest.raises(ValueError if rank == 1 else (RuntimeError, ValueError), match="A.1.layers"):
        load_rows(net, f"{folder}/saved", optimizer)
    assert all(map(torch.equal, net.layers[1].A.blocks.views(), kept))


def test_the_error_of_one_rank_ends_them_all(tmp_path):
    assert started(one_disk_is_full, 3, tmp_path) == [0, 0, 0]


def test_what_does_not_fit_is_named(tmp_path):
    net, _ = build()
    save_rows(net, tmp_path / "saved")
    with pytest.raises(ValueError, match="6 entries, here 7"):
        load_rows(InfMLP(5, 3, 7, 1), tmp_path / "saved")
    with pytest.raises(ValueError, match="layers.3"):
        load_rows(InfMLP(5, 3, 6, 2), tmp_path / "saved")
    (tmp_path / "mine").mkdir()
    with pytest.raises(FileExistsError, match="mine"):
        save_rows(net, tmp_path / "mine")


def ranks_write(rank, size, folder):
    net, optimizer = build()
    train(net, optimizer, 2)
    shard_rows(net, optimizer=optimizer)
    train(net, optimizer, 1, 2)
    save_rows(net, f"{folder}/saved", optimizer)
    other, its_optimizer = build()
    shard_rows(other)
    load_rows(other, f"{folder}/saved", its_optimizer)
    train(other, its_optimizer, 1, 3)
    save_rows(other, f"{folder}/further", its_optimizer)
    load_rows(other, f"{folder}/by one", its_optimizer)
    assert len(other.layers[1]) == len(range(rank, 21, size))
    train(other, its_optimizer, 1, 3)
    save_rows(other, f"{folder}/from one", its_optimizer)


def test_what_k_ranks_wrote_loads_on_j(tmp_path):
    alone, its_optimizer = build()
    train(alone, its_optimizer, 3)
    save_rows(alone, tmp_path / "by one", its_optimizer)
    assert started(ranks_write, 3, tmp_path) == [0, 0, 0]
    train(alone, its_optimizer, 1, 3)
    for name in ("further", "from one"):
        net, optimizer = build(seed=4)
        load_rows(net, tmp_path / name, optimizer)
        assert net.rows == alone.rows
        for key, value in tensors(alone).items():
            if not key.endswith(("_raw", "_factors")):
                torch.testing.assert_close(tensors(net)[key], value, rtol=1e-5, atol=1e-6)
        momentum = [
            o.state[n.layers[1].Amult]["momentum_buffer"]
            for n, o in ((net, optimizer), (alone, its_optimizer))
        ]
        torch.testing.assert_close(*momentum)
