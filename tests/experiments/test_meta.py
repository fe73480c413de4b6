"""Meta-learning end to end: episodes, the seed's command, resuming bit for bit, tables, tests of
what was learned, errors."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import zipfile
import zlib
from contextlib import nullcontext
from dataclasses import fields
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.meta import learner
from experiments.meta import test as meta_test
from experiments.meta import train as meta_train
from experiments.meta.episodes import Classes, Episodes, Sinusoids
from experiments.meta.learner import build, evaluate, hold_fixed, meta_step, nilmax, optimizer_of
from experiments.meta.omniglot import COUNTS, load_omniglot, split_of
from experiments.meta.settings import Settings, parser
from experiments.meta.stores import write_tables
from pilimit_lib.core import load

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
SEED_COMMAND = """dataset --dataset omniglot --num-ways 5 --num-shots 1 --use-cuda --step-size 0.5
    --batch-size 8 --num-workers 2 --num-epochs 2 --output-folder results --meta-lr .1
    --grad-clip 0.1 --meta-momentum 0 --num-shots-test 1 --normalize None --hidden-size -1
    --bias-alpha 4 --infnet_r 200 --first-layer-alpha 2  --verbose --first-layer-lr-mult 0.2
    --dtype float16 --num-batches 1000 --num-test-batches 500 --adapt-readout-only --Gproj-inner
    --Gproj-outer --last-layer-lr-mult 0 --scheduler cosine --readout-zero-init --depth 1""".split()


@pytest.fixture(scope="module")
def drawings() -> np.ndarray:
    """Real drawings of 40 characters, uint8 [40 20 28 28]."""
    packed = DATA / "omniglot" / "omniglot_images_background.npz"
    if not packed.is_file():
        pytest.skip("there is no Omniglot in ../shared/data")
    with np.load(packed) as found:
        images = found["images"][:40].astype(np.uint8)
    image = pytest.importorskip("PIL.Image")
    small = [
        np.asarray(image.fromarray(one * (255 if images.max() == 1 else 1)).resize((28, 28)))
        for one in images.reshape(-1, *images.shape[2:])
    ]
    return np.stack(small).reshape(40, 20, 28, 28)


@pytest.fixture(scope="module")
def omniglot(tmp_path_factory) -> Path:
    """The published files, unpacked."""
    if not (DATA / "unpack.py").is_file():
        pytest.skip("there is no ../shared/data")
    folder = tmp_path_factory.mktemp("data")
    subprocess.run(
        [sys.executable, DATA / "unpack.py", folder, "omniglot"], check=True, capture_output=True
    )
    return folder


# ---- episodes


def test_episodes_have_the_form_of_torchmeta(drawings):
    classes = Classes(drawings)
    assert classes.count == 160 and classes.features == 784
    stream = Episodes(classes, ways=5, shots=2, shots_test=3, batch_size=4, seed=0)
    known = {
        drawing.tobytes(): divmod(place, 20)
        for place, drawing in enumerate(classes.flat().reshape(-1, 784))
    }
    for batch in islice(stream, 20):
        (x, y), (query, labels) = batch["train"], batch["test"]
        assert x.shape == (4, 10, 784) and query.shape == (4, 15, 784) and x.dtype == torch.float32
        assert (
            y.tolist() == [[0, 0, 1, 1, 2, 2, 3, 3, 4, 4]] * 4
            and labels.tolist() == [sorted([*range(5)] * 3)] * 4
        )
        for task in range(2):
            found = [
                known[sample.tobytes()]
                for sample in (torch.cat([x[task], query[task]]) * 255).round().byte().numpy()
            ]
            assert len(set(found)) == 25  # no sample twice, in support and query together
            of_class = {}
            for (character, _), label in zip(found, torch.cat([y[task], labels[task]]).tolist()):
                of_class.setdefault(label, set()).add(character)
            assert all(len(characters) == 1 for characters in of_class.values())
            assert len(set.union(*of_class.values())) == 5


def test_rotations_are_classes_and_ink_is_what_is_black(drawings):
    turned, plain = Classes(drawings).flat(), Classes(drawings, rotations=False)
    assert plain.count == 40 and np.array_equal(plain.flat(), turned[:40])
    assert np.array_equal(np.rot90(drawings[3, 7]).ravel(), turned[43, 7])
    white, black = (
        Episodes(plain, 5, 1, 1, 2, seed=0, ink=ink).draw()["train"][0] for ink in (False, True)
    )
    assert torch.allclose(white, 1 - black) and white.mean() > 0.8


@pytest.mark.parametrize(
    "make",
    [
        lambda d, seed: Episodes(Classes(d), 5, 1, 1, 3, seed),
        lambda d, seed: Sinusoids(5, 5, 3, seed),
    ],
)
def test_a_stream_is_the_same_again_from_its_seed_and_from_its_state(drawings, make):
    stream = make(drawings, 7)
    first = [stream.draw() for _ in range(4)]
    state = stream.state()
    later = [stream.draw() for _ in range(3)]
    twin = make(drawings, 7)
    assert all(same(a, twin.draw()) for a in first)
    assert not same(first[0], make(drawings, 8).draw())
    other = make(drawings, 1)
    other.load_state(json.loads(json.dumps(state)))
    assert all(same(a, other.draw()) for a in later)
    stream.restart()
    assert same(first[0], stream.draw())


def same(a, b) -> bool:
    return all(torch.equal(p, q) for side in ("train", "test") for p, q in zip(a[side], b[side]))


def test_sinusoids_are_sinusoids():
    batch = Sinusoids(6, 6, 5, seed=0, dtype=torch.float64).draw()
    (x, y), (query, targets) = batch["train"], batch["test"]
    assert x.shape == y.shape == (5, 6, 1) and x.abs().max() <= 5
    for task in range(5):
        basis = torch.cat([x[task].sin(), x[task].cos()], 1)
        weights = torch.linalg.lstsq(basis, y[task]).solution
        assert torch.allclose(
            torch.cat([query[task].sin(), query[task].cos()], 1) @ weights, targets[task], atol=1e-8
        )
        assert 0.1 <= weights.norm() <= 5


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"ways": 161}, "161 ways .* 160 classes"),
        ({"shots": 15, "shots_test": 6}, "15 support and 6 query .* 20"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_tasks_that_the_data_cannot_make_are_refused(drawings, changed, message):
    with pytest.raises(ValueError, match=message):
        Episodes(
            Classes(drawings),
            **({"ways": 5, "shots": 1, "shots_test": 1, "batch_size": 2, "seed": 0} | changed),
        )


def test_a_loader_of_torchmeta_takes_the_place_of_ours():
    data = pytest.importorskip(
        "torchmeta.utils.data", reason="torchmeta is not installed", exc_type=ImportError
    )
    helpers = pytest.importorskip("torchmeta.toy.helpers", exc_type=ImportError)
    loader = data.BatchMetaDataLoader(
        helpers.sinusoid(shots=10, test_shots=7), batch_size=4, num_workers=0
    )
    settings = Settings(
        **{
            name: value
            for name, value in vars(parser().parse_args(SINUSOID)).items()
            if name in SETTINGS
        }
    )
    trainer = meta_train.Trainer(settings, torch.device("cpu"), quiet=True, loader=loader)
    before = {name: p.detach().clone() for name, p in trainer.net.named_parameters()}
    assert trainer.run_epoch([], quiet=True) and np.isfinite(trainer.records[0]["loss"])
    assert any(not torch.equal(before[name], p) for name, p in trainer.net.named_parameters())
    assert trainer.state()["extras"]["tasks"] is None  # where such a loader stands is not known


# ---- Omniglot on disk


def test_the_split_is_that_of_vinyals(shared):
    index = shared / "data" / "omniglot" / "index.json"
    if not index.is_file():
        pytest.skip("there is no Omniglot in ../shared/data")
    for one in json.loads(index.read_text()):
        assert (
            split_of(f"images_{one['part']}", one["alphabet"], one["character"]) == one["vinyals"]
        ), one


def test_missing_and_damaged_files_are_named(tmp_path):
    def refused(kind, message):
        with pytest.raises(kind, match=message):
            load_omniglot(tmp_path, "train", quiet=True)

    refused(FileNotFoundError, "images_background.zip and images_evaluation.zip were expected")
    with zipfile.ZipFile(tmp_path / "images_background.zip", "w") as archive:
        archive.writestr("images_background/Greek/character01/0001_01.png", b"no image")
    refused(FileNotFoundError, "not images_evaluation.zip")
    (tmp_path / "images_evaluation.zip").write_bytes(b"PK broken")
    refused(ValueError, "Greek/character01/0001_01.png in .* is no image")
    (tmp_path / "images_background.zip").write_bytes(b"PK broken")
    refused(ValueError, "images_background.zip is damaged")
    with pytest.raises(ValueError, match="no split 'all'"):
        load_omniglot(tmp_path, "all")


def test_damage_inside_of_a_zip_names_the_file(tmp_path):
    """Every fault of the stream itself and of the headers around it is one kind of error."""
    image = pytest.importorskip("PIL.Image")
    drawn = io.BytesIO()
    image.fromarray(np.random.default_rng(0).integers(0, 256, (105, 105), np.uint8)).save(
        drawn, "png"
    )
    path = tmp_path / "images_background.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images_background/Greek/character01/0001_01.png", drawn.getvalue())
        header = archive.start_dir
    (tmp_path / "images_evaluation.zip").write_bytes(path.read_bytes())
    whole, body = path.read_bytes(), 30 + len("images_background/Greek/character01/0001_01.png")
    damages = {"stream": (body, 0xFF), "method": (header + 10, 99), "encrypted": (header + 8, 1)}
    for where, value in damages.values():
        broken = bytearray(whole)
        broken[where] = value
        if where == header + 10:
            broken[8] = value
        path.write_bytes(bytes(broken))
        with pytest.raises(ValueError, match="images_background.zip is damaged"):
            load_omniglot(tmp_path, "train", quiet=True)
    bad = bytearray(drawn.getvalue())
    bad[25] = 77  # a colour type that no image has
    for content in (bytes(bad), drawn.getvalue()[:40]):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("images_background/Greek/character01/0001_01.png", content)
        with pytest.raises(ValueError, match="0001_01.png in .* is no image"):
            load_omniglot(tmp_path, "train", quiet=True)


def png(width: int, height: int) -> bytes:
    """A picture of one colour, a thousandth of its pixels in bytes."""
    rows = zlib.compress((b"\0" + bytes((width + 7) // 8)) * height, 9)

    def chunk(name: bytes, data: bytes) -> bytes:
        check = zlib.crc32(name + data).to_bytes(4, "big")
        return len(data).to_bytes(4, "big") + name + data + check

    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\1\0\0\0\0"
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "content, message",
    [
        (png(2000, 2000), "is no image .*2000 x 2000 pixels"),
        (png(10000, 10000), "is no image .*decompression bomb"),  # Pillow warns
        (png(20000, 20000), "is no image .*decompression bomb"),  # Pillow refuses
        (bytes(1 << 21), "is no drawing: it unpacks to 2097152 bytes"),
    ],
    ids=["large", "warned of", "refused", "zip"],
)
def test_a_picture_that_would_fill_the_memory_is_refused(tmp_path, content, message):
    for part in ("background", "evaluation"):
        path = tmp_path / f"images_{part}.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(f"images_{part}/Greek/character01/0001_01.png", content)
        assert path.stat().st_size < 200_000
    with pytest.raises(ValueError, match=f"0001_01.png in .*images_background.zip {message}"):
        load_omniglot(tmp_path, "train", quiet=True)


@pytest.mark.parametrize("error", [SyntaxError, ValueError])
def test_whatever_pillow_says_of_a_damaged_image_names_the_file(tmp_path, monkeypatch, error):
    image = pytest.importorskip("PIL.Image")

    def refuse(*args):
        raise error("broken PNG file")

    monkeypatch.setattr(image, "open", refuse)
    for part in ("background", "evaluation"):
        with zipfile.ZipFile(tmp_path / f"images_{part}.zip", "w") as archive:
            archive.writestr(f"images_{part}/Greek/character01/0001_01.png", b"")
    with pytest.raises(ValueError, match="0001_01.png in .* is no image"):
        load_omniglot(tmp_path, "train", quiet=True)


@pytest.mark.slow
def test_the_published_files_are_read_whole_once_and_then_kept(omniglot, tmp_path):
    images = {split: load_omniglot(omniglot, split, quiet=True) for split in COUNTS}
    assert {split: len(found) for split, found in images.items()} == COUNTS
    kept = omniglot / "omniglot" / "omniglot_28.npz"
    before = kept.stat().st_mtime_ns
    assert (
        np.array_equal(load_omniglot(omniglot, "val", quiet=True), images["val"])
        and kept.stat().st_mtime_ns == before
    )
    # Unpacked folders are the same data, and a copy that lacks a drawing is refused.
    for part in ("images_background", "images_evaluation"):
        with zipfile.ZipFile(omniglot / "omniglot" / f"{part}.zip") as archive:
            archive.extractall(tmp_path)
    assert np.array_equal(load_omniglot(tmp_path, "val", quiet=True), images["val"])
    sorted((tmp_path / "images_background" / "Greek").rglob("*.png"))[0].unlink()
    with pytest.raises(ValueError, match="Greek/character01 of Omniglot has 19 drawings"):
        load_omniglot(tmp_path, "val", quiet=True)
    shutil.rmtree(tmp_path / "images_evaluation" / "ULOG")
    shutil.rmtree(tmp_path / "images_background" / "Greek")
    with pytest.raises(ValueError, match="is not whole"):
        load_omniglot(tmp_path, "val", quiet=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [[], ["--memory", "moments", "--depth", "2"], ["--hidden-size", "128"], ["--gp"], ["--ntk1lp"]],
    ids=" ".join,
)
def test_the_printed_command_trains_and_tests(omniglot, tmp_path, more):
    """The seed's command, verbatim but for the GPU and the number of batches."""
    (tmp_path / "dataset").symlink_to(omniglot)
    command = [flag for flag in SEED_COMMAND if flag != "--use-cuda"] + [
        "--num-batches",
        "20",
        "--num-test-batches",
        "10",
        *more,
    ]
    run(["train", *command], tmp_path)
    out = run(["test", "--config", "results/config.json", "--num-batches", "10"], tmp_path)
    assert "over 80 tasks of the test split" in out
    assert "nan" not in out


def run(command: list[str], folder: Path) -> str:
    root = Path(__file__).resolve().parents[2]
    import os

    done = subprocess.run(
        [sys.executable, "-m", f"experiments.meta.{command[0]}", *command[1:]],
        cwd=folder,
        text=True,
        capture_output=True,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- the command line


def test_the_printed_command_means_what_it_says():
    args = parser().parse_args(SEED_COMMAND)
    assert (
        args.folder,
        args.num_ways,
        args.infnet_r,
        args.hidden_size,
        args.last_layer_lr_mult,
    ) == ("dataset", 5, 200, -1, 0)
    assert args.use_cuda and args.readout_zero_init and args.Gproj_inner and args.dtype == "float16"
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            meta_train.main(SEED_COMMAND)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--dataset", "miniimagenet"], "no reader of mini-ImageNet"),
        (["--normalize", "BN"], "batch norm"),
        (["--orig-model"], "--orig-model is gone"),
        (["--num-ways", "0"], "--num-ways must be at least 1"),
        (["--gp", "--ntk"], "one of --gp"),
        (["--mu-init", "--hidden-size", "-1"], "--mu-init"),
        (["--hidden-size", "-1"], "no sum of rows"),
        (["--scheduler", "multistep"], "belong together"),
        (
            ["--hidden-size", "-1", "--optimizer", "adam", "--adapt-readout-only"],
            "appended by SGD only",
        ),
        (["nowhere"], "Omniglot is not in"),
        (["--resume"], "--output-folder"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_written(
    tmp_path, monkeypatch, capsys, flags, message
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        meta_train.main(flags)
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


SETTINGS = {field.name for field in fields(Settings)}
SINUSOID = [
    "--dataset",
    "sinusoid",
    "--num-shots",
    "10",
    "--num-shots-test",
    "10",
    "--hidden-size",
    "-1",
    "--infnet-r",
    "10",
    "--memory",
    "moments",
    "--depth",
    "2",
    "--batch-size",
    "5",
    "--num-batches",
    "6",
    "--num-epochs",
    "2",
    "--quiet",
    "--num-test-batches",
    "3",
    "--meta-lr",
    "0.05",
    "--grad-clip",
    "1",
    "--step-size",
    "0.05",
    "--dtype",
    "float32",
]


def test_a_run_is_written_resumed_bit_for_bit_and_tested(tmp_path, monkeypatch, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    records = meta_train.main([*SINUSOID, "--output-folder", str(whole)])
    assert [record["epoch"] for record in records] == [1, 2] and all(
        np.isfinite(record["loss"]) for record in records
    )
    # Interrupted after the fourth batch of the first epoch, then once more, as Ctrl-C would.
    stops = iter([4, 3, 100])
    original = meta_train.meta_step
    for _ in range(3):
        left = next(stops)
        count = [0]

        def stepped(*args, count=count, left=left):
            count[0] += 1
            if count[0] == left:
                import os
                import signal

                os.kill(os.getpid(), signal.SIGINT)
            return original(*args)

        monkeypatch.setattr(meta_train, "meta_step", stepped)
        flags = ["--resume"] if parts.exists() else SINUSOID
        with pytest.raises(SystemExit) if left < 100 else nullcontext() as stopped:
            meta_train.main([*flags, "--quiet", "--output-folder", str(parts)])
        assert stopped is None or stopped.value.code == 130
    a, b = load(whole / "model.th"), load(parts / "model.th")
    assert a.keys() == b.keys() and all(
        torch.equal(a[name], b[name]) for name in a if isinstance(a[name], torch.Tensor)
    )
    for name in ("val.jsonl", "metadata.jsonl"):
        assert (whole / name).read_text() == (parts / name).read_text()
    assert (whole / "curves.png").stat().st_size > 1000
    monkeypatch.setattr(meta_train, "meta_step", original)
    with pytest.raises(SystemExit):
        meta_train.main([*SINUSOID, "--output-folder", str(whole)])
    assert "--overwrite-existing" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        meta_train.main([*SINUSOID, "--meta-lr", "1", "--resume", "--output-folder", str(whole)])
    assert "meta_lr: 0.05 then, 1.0 now" in capsys.readouterr().err
    first = meta_test.main(["--config", str(whole / "config.json"), "--num-batches", "4"])
    more = meta_test.main(
        [
            "--config",
            str(whole / "config.json"),
            "--num-batches",
            "4",
            "--num-steps",
            "3",
            "--seed",
            "5",
        ]
    )
    meta_test.main(["--config", str(whole / "config.json"), "--nilmax", "--num-batches", "4"])
    assert first["loss"] != more["loss"] and more["num_steps"] == 3
    assert len((whole / "test.jsonl").read_text().splitlines()) == 3
    meta_train.main(
        [
            *SINUSOID,
            "--num-epochs",
            "1",
            "--num-batches",
            "1",
            "--overwrite-existing",
            "--output-folder",
            str(whole),
        ]
    )
    assert (
        not (whole / "test.jsonl").exists()
        and len((whole / "val.jsonl").read_text().splitlines()) == 1
    )


def test_flags_of_projection_change_nothing_of_a_mu_network():
    """The seed's command with a finite width and --mu-init."""
    nets = []
    for flags in ([], ["--Gproj-inner", "--Gproj-outer"]):
        mu = [*SINUSOID, "--hidden-size", "12", "--memory", "rows", "--mu-init", *flags]
        settings = Settings(
            **{
                name: value
                for name, value in vars(parser().parse_args(mu)).items()
                if name in SETTINGS
            }
        )
        settings.check()
        trainer = meta_train.Trainer(settings, torch.device("cpu"), quiet=True)
        trainer.run_epoch([], quiet=True)
        nets.append(trainer.net.state_dict())
    assert all(torch.equal(nets[0][name], nets[1][name]) for name in nets[0])


@pytest.mark.parametrize("memory", ["rows", "moments"])
def test_a_run_that_diverges_ends_with_an_error_and_writes_no_nan(tmp_path, capsys, memory):
    flags = [
        "--memory",
        memory,
        "--first-order",
        "--meta-lr",
        "1e30",
        "--grad-clip",
        "-1",
        "--output-folder",
        str(tmp_path),
    ]
    with pytest.raises(SystemExit):
        meta_train.main([*SINUSOID, *flags])
    assert "lower --meta-lr" in capsys.readouterr().err or memory == "rows"
    assert not any("NaN" in path.read_text() for path in tmp_path.glob("*.jsonl"))


def test_rows_that_would_overflow_are_reported(tmp_path, monkeypatch, capsys):
    def refuse(*args):
        raise FloatingPointError("rows can't be taken back")

    monkeypatch.setattr(meta_train, "meta_step", refuse)
    with pytest.raises(SystemExit):
        meta_train.main([*SINUSOID, "--output-folder", str(tmp_path)])
    assert "rows can't be taken back" in capsys.readouterr().err


def test_a_test_of_one_task_has_no_interval(tmp_path, capsys):
    meta_train.main(
        [*SINUSOID, "--batch-size", "1", "--num-epochs", "1", "--output-folder", str(tmp_path)]
    )
    capsys.readouterr()
    record = meta_test.main(["--config", str(tmp_path / "config.json"), "--num-batches", "1"])
    assert record["tasks"] == 1 and record["loss_ci95"] is None
    assert (
        "nan" not in capsys.readouterr().out
        and '"loss_ci95": null' in (tmp_path / "test.jsonl").read_text()
    )


@pytest.mark.parametrize("scheduler", ["cosine", "linear"])
def test_a_schedule_is_not_continued_beyond_its_end(tmp_path, capsys, scheduler):
    flags = [*SINUSOID, "--scheduler", scheduler, "--output-folder", str(tmp_path)]
    meta_train.main(flags)
    with pytest.raises(SystemExit):
        meta_train.main([*flags, "--num-epochs", "3", "--resume"])
    assert (
        "schedule of 12 steps, which can't be continued for more --num-epochs"
        in capsys.readouterr().err
    )


def test_the_flag_of_a_missing_gpu_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        meta_train.main([*SINUSOID, "--use-cuda", "--output-folder", str(tmp_path)])
    assert "--use-cuda was given" in capsys.readouterr().err


def test_a_broken_config_is_named(tmp_path, capsys):
    config = tmp_path / "config.json"
    for content, message in (
        (None, "there is no"),
        ("{", "damaged"),
        ('{"epochs": 3}', "holds epochs"),
        ("{}", "model.th"),
    ):
        if content is not None:
            config.write_text(content)
        with pytest.raises(SystemExit):
            meta_test.main(["--config", str(config)])
        assert message in capsys.readouterr().err


# ---- learners


LEARNERS = {
    "infinite rows": {"hidden_size": -1},
    "infinite moments": {
        "hidden_size": -1,
        "memory": "moments",
        "depth": 2,
        "normalize": "LN",
        "step_size": 20.0,
    },
    "finite": {"hidden_size": 48, "Gproj_inner": True, "Gproj_outer": True},
    "mu": {"hidden_size": 48, "mu_init": True},
    "nngp": {"gp": True},
    "ntk": {"ntk": True, "depth": 2},
}


def settings_for(**changed) -> Settings:
    common = {
        "infnet_r": 24,
        "depth": 1,
        "num_shots": 1,
        "num_shots_test": 3,
        "batch_size": 8,
        "adapt_readout_only": True,
        "ink": True,
        "step_size": 2.0,
        "bias_alpha": 4.0,
        "first_layer_alpha": 2.0,
        "last_layer_lr_mult": 0.0,
        "dtype": "float32",
        "meta_lr": 1.0,
        "grad_clip": 0.5,
    }
    settings = Settings(**(common | changed))
    settings.check()
    return settings


@pytest.mark.parametrize("name", LEARNERS)
def test_every_learner_adapts_better_than_chance_and_those_with_features_learn(drawings, name):
    settings = settings_for(**LEARNERS[name])
    stream = Episodes(Classes(drawings), 5, 1, 3, 8, seed=0, ink=True)
    held_out = [stream.draw() for _ in range(12)]
    net = build(settings, torch.device("cpu"))
    hold_fixed(settings, net)
    before = evaluate(settings, net, held_out, 12, torch.device("cpu"))
    assert before["acc"] > 0.25 and before["tasks"] == 96
    optimizer = optimizer_of(settings, net)
    for _ in range(25):
        meta_step(settings, net, optimizer, stream.draw())
    after = evaluate(settings, net, held_out, 12, torch.device("cpu"))
    if settings.kernel:
        assert after == before
    else:
        assert after["loss"] < before["loss"] - 0.02


def test_classes_of_the_test_split_can_stay_unrotated(monkeypatch):
    drawings = np.zeros((7, 20, 28, 28), np.uint8)
    monkeypatch.setattr(learner, "load_omniglot", lambda folder, split, quiet: drawings)
    for split, unrotated, count in (
        ("train", True, 28),
        ("val", True, 28),
        ("test", True, 7),
        ("test", False, 28),
    ):
        stream = learner.tasks(Settings(unrotated_test=unrotated), split, 0, quiet=True)
        assert len(stream.images) == count


@pytest.mark.parametrize("kind", ["rows", "moments", "finite"])
def test_summed_task_gradients_are_as_many_times_the_mean_as_there_are_tasks(kind):
    """A step of SGD with the sum is one with that many times the rate."""
    how = dict(dataset="sinusoid", num_shots=5, infnet_r=8, adapt_readout_only=True, batch_size=4)
    how |= dict(hidden_size=24 if kind == "finite" else -1, last_layer_lr_mult=0.0)
    how |= dict(memory="rows" if kind == "finite" else kind)
    outputs = []
    for more in (dict(sum_tasks=True, meta_lr=0.01), dict(meta_lr=0.04)):
        settings = Settings(**how, **more)
        net = build(settings, torch.device("cpu"))
        hold_fixed(settings, net)
        batch = learner.tasks(settings, "train", 3).draw()
        found = meta_step(settings, net, optimizer_of(settings, net), batch)
        adapted = learner.adapted_to(settings, net, batch, learn=False)
        outputs.append((found["loss"], adapted(batch["test"][0])))
    assert outputs[0][0] == outputs[1][0]
    torch.testing.assert_close(outputs[0][1], outputs[1][1], rtol=1e-9, atol=1e-12)


def test_what_is_not_the_papers_network_on_omniglot_is_said():
    assert "--depth 1 is one stage of ReLU units" in Settings(depth=1).note_on_depth()
    assert "3 stages" in Settings(depth=3).note_on_depth()
    for same in (Settings(), Settings(depth=1, gp=True), Settings(depth=1, dataset="sinusoid")):
        assert not same.note_on_depth()


def test_layer_norm_of_a_kernel_learner_forgets_lengths():
    x = torch.randn(4, 784)
    plain, directions = (
        build(settings_for(gp=True, normalize=how), torch.device("cpu")).kernel
        for how in ("None", "LN")
    )
    lengths = torch.rand(4, 1) + 0.5
    assert torch.allclose(directions(x, x), directions(lengths * x, x)) and not torch.allclose(
        plain(x, x), plain(lengths * x, x)
    )
    same_length = x / x.norm(dim=1, keepdim=True) * 28
    assert torch.allclose(plain(same_length, same_length), directions(x, x), rtol=1e-5)


def test_without_inner_steps_the_nearest_class_is_chosen(drawings):
    stream = Episodes(Classes(drawings), 5, 3, 2, 4, seed=0)
    net = build(settings_for(hidden_size=-1), torch.device("cpu"))
    batch = stream.draw()
    batch["test"] = tuple(part.clone() for part in batch["train"])
    outputs = nilmax(net, batch, regression=False)
    x = batch["train"][0][0]
    own = net.embedding(x).double()
    lengths = (net.layers[0](x) * net.first_layer_alpha).double().norm(dim=1)
    from pilimit_lib.inf.dual.relu import relu_k

    K = lengths[:, None] * relu_k(own @ own.T) * lengths
    assert torch.allclose(outputs[0].double(), K.unflatten(1, (5, 3)).mean(2), rtol=1e-4)
    wave = Sinusoids(20, 20, 3, seed=0, dtype=torch.float64)
    task = wave.draw()
    task["test"] = task["train"]
    net = build(Settings(dataset="sinusoid", hidden_size=-1, infnet_r=20), torch.device("cpu"))
    with torch.no_grad():
        net.layers[0].bias.normal_()  # without a bias there are two directions only on a line
    assert torch.allclose(
        nilmax(net, task, regression=True, reg=1e-12), task["train"][1], atol=1e-3
    )


# ---- tables


def test_tables_are_lines_of_json_and_texts_of_any_length(tmp_path):
    write_tables(tmp_path, {"test": [{"epoch": 1, "note": "a"}, {"epoch": 2, "note": "b" * 500}]})
    lines = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    assert lines[1]["note"] == "b" * 500
    with pytest.raises(ValueError, match="no table results"):
        write_tables(tmp_path, {"results": []})


def test_cox_reads_the_same_tables(tmp_path):
    pytest.importorskip("cox.store", reason="cox is not installed", exc_type=ImportError)
    code = f"""
from pathlib import Path
from experiments.meta.stores import write_tables
folder = Path({str(tmp_path)!r})
rows = [{{"epoch": 1, "note": "a", "acc": .5, "left": None}}]
write_tables(folder, {{"val": rows}}, cox=True)
rows.append({{"epoch": 2, "note": "b" * 500, "acc": 1.0, "left": "x"}})
write_tables(folder, {{"val": rows, "train": []}}, cox=True)
import cox.store
store = cox.store.Store(str(folder), "cox", mode="r")
frame = store["val"].df
assert frame.note.tolist() == ["a", "b" * 500] and frame.acc.tolist() == [.5, 1.0]
assert frame.epoch.tolist() == [1, 2]
assert frame["left"].tolist() == ["", "x"]
store.close()
from experiments.meta import test, train
from tests.experiments.test_meta import SINUSOID
run = [*SINUSOID, "--num-epochs", "1", "--output-folder", str(folder / "run")]
train.main([*run, "--store", "cox"])
for count in ("1", "2"):
    test.main(["--config", str(folder / "run" / "config.json"), "--num-batches", count])
store = cox.store.Store(str(folder / "run"), "cox", mode="r")
assert len(store["test"].df) == 2 and len(store["train"].df) == 1
store.close()
train.main([*run, "--overwrite-existing"])
assert not (folder / "run" / "cox").exists()
from cox.readers import CollectionReader
read = CollectionReader(str(folder)).df("val")
assert read.note.str.len().tolist() == [1, 500]
"""
    # In a process of its own: what cox and tables import warns, and warnings are errors here.
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_a_missing_cox_says_what_to_install():
    code = """
import sys
sys.modules["cox"] = None
from experiments.meta.train import main
main(["--store", "cox", "--dataset", "sinusoid", "--first-order"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "pip install 'pilimit[cox]'" in done.stderr
