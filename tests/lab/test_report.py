"""The report: self-contained, complete, and seen in a real browser."""

import re
import shutil
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from pilimit_lib.lab.__main__ import main as command

from .conftest import MNISTModel, digits

CHROMIUM = next(
    (
        path
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (path := shutil.which(name))
    ),
    None,
)


@pytest.fixture
def run(make):
    """A run with everything on it: two branches, edits, denials, silent and slow neurons, forgotten
    samples."""
    exp = make(
        MNISTModel(),
        name="tree",
        train_dataset=digits(256, 28),
        eval_dataset=digits(96, 28, 1000),
        eval_every=8,
    )
    exp.train_n_steps_with_eval_full(24)
    exp.dump("before surgery")
    exp.model.add_neurons(layer_index=0, neuron_count=4)
    exp.model.layers[0].set_per_neuron_learning_rate({0}, lr=0.1)
    exp.train_n_steps_with_eval_full(16)
    exp.dump()
    exp.load(0)
    exp.model.prune(layer="layer2", neuron_indices={1})
    exp.train_loader.dataset.deny_samples_and_sample_allowed_with_predicate(
        lambda frame: frame["confidence"] > 0.15, 3, seed=0
    )
    exp.model.freeze_layers_up_to_idx(0)
    exp.train_n_steps_with_eval_full(24)
    exp.dump("after curation")
    return exp


def test_the_page_is_complete_and_fetches_nothing(run, tmp_path):
    path = run.report(tmp_path / "page" / "report.html")
    text = path.read_text()
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    for title in (
        "Learning curves",
        "Checkpoints",
        "Neurons",
        "Data map",
        "Most forgotten samples",
        "Timeline",
    ):
        assert f"<h2>{title}</h2>" in text
    assert "<script" not in text and "<link" not in text and "@import" not in text
    assert set(re.findall(r'src="([a-z]+):', text)) == {"data"} and "http" not in re.sub(
        r'base64,[^"]*', "", text
    )
    assert text.count('class="figure"') == 4 and text.count("data:image/png;base64") >= 24
    for said in (
        "before surgery",
        "after curation",
        "add 4 neurons to &#x27;layer0&#x27;",
        "prune neurons [1]",
        "samples denied",
    ):
        assert said in text, said
    frame = run.train_loader.dataset.get_dataframe()
    worst = frame[frame["forgotten"] == frame["forgotten"].max()]["confidence"].idxmin()
    assert f"<b>#{worst}</b>" in text


def test_the_command_writes_the_page_from_the_folder(run, capsys):
    assert command(["report", str(run.folder)]) == 0
    assert (run.folder / "report.html").read_text().count("<section>") == 7
    assert capsys.readouterr().out.strip() == str(run.folder / "report.html")
    assert command(["report", str(run.folder), "--checkpoint", "99"]) == 2
    assert "no checkpoint 99" in capsys.readouterr().err
    assert command(["report", str(run.folder / "nowhere")]) == 2
    assert "is not a run" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_runs_as_a_module(run):
    done = subprocess.run(
        [sys.executable, "-m", "pilimit_lib.lab", "report", str(run.folder)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "report.html" in done.stdout, done.stderr


def test_a_run_without_anything_still_has_a_page(make, tmp_path):
    exp = make(name="empty")
    assert "Nothing was recorded yet" in exp.report(tmp_path / "empty.html").read_text()


def test_names_are_escaped(make, tmp_path):
    exp = make(name="a<b>&c")
    exp.train_n_steps(1)
    assert "<h1>a&lt;b&gt;&amp;c</h1>" in exp.report(tmp_path / "e.html").read_text()


def browse(page, folder, *options):
    """Chromium's messages go to a file: its helpers outlive it, and a pipe would be waited for
    until the last one ends."""
    with (folder / "chromium.log").open("w") as log:
        subprocess.run(
            [
                CHROMIUM,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-quic",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                f"--user-data-dir={folder / 'profile'}",
                *options,
                page.as_uri(),
            ],
            stdout=log,
            stderr=log,
            timeout=120,
        )
    return (folder / "chromium.log").read_text()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine to look at the page with")
def test_a_browser_shows_it(run, tmp_path):
    path = run.report(tmp_path / "report.html")
    # The page with a script that only this test adds: what the browser made of the pictures becomes
    # the colour of a strip.
    probe = tmp_path / "probe.html"
    probe.write_text(
        path.read_text().replace(
            "</body>",
            """<script>addEventListener('load', () => {
        const all = [...document.images], strip = document.createElement('div');
        const spots = [...document.querySelectorAll('.map g')];
        const named = spots.filter(spot => {  // what is under the pointer says which sample it is
            spot.scrollIntoView({block: 'center'});
            const at = spot.querySelector('circle').getBoundingClientRect();
            const hit = document.elementFromPoint(at.x + at.width / 2, at.y + at.height / 2);
            if (!hit || hit.tagName != 'circle') return false;
            hit.parentNode.focus();
            const text = hit.parentNode.querySelector('text');
            const says = /^#[0-9]+ label/.test(text.textContent);
            return text.getBoundingClientRect().width > 0 && says;
        });
        document.activeElement.blur();
        scrollTo(0, 0);
        const fine = all.length >= 28 && all.every(i => i.naturalWidth > 0)
            && spots.length >= 200 && named.length == spots.length
            && document.documentElement.scrollWidth <= innerWidth;
        strip.style = 'position: absolute; inset: 0 0 auto; height: 8px; background: '
            + (fine ? '#00ff00' : '#ff0000');
        document.body.append(strip);
    });</script></body>""",
        )
    )
    said = browse(
        probe,
        tmp_path,
        f"--screenshot={tmp_path / 'page.png'}",
        "--window-size=1200,3600",
        "--virtual-time-budget=5000",
    )
    assert (tmp_path / "page.png").exists(), said
    shot = matplotlib.image.imread(tmp_path / "page.png")[..., :3]
    assert shot.shape[:2] == (3600, 1200)
    assert shot[4, 600].tolist() == [0, 1, 0], (
        "a picture was not shown, or the page is wider than the window"
    )
    drawn = np.abs(shot - shot[20, 0]).max(-1) > 0.1
    assert drawn.any(axis=1).sum() > 1500, "the page is nearly empty"
    assert len(np.unique((shot * 15).astype(int) @ [256, 16, 1])) > 100, "no figures in colour"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine to look at the page with")
def test_it_fits_a_phone(run, tmp_path):
    """In a frame of 390 pixels the page is not wider than the frame, and its tables are stacked."""
    path = run.report(tmp_path / "report.html")
    probe = """<script>addEventListener('load', () => {
        const wide = [...document.querySelectorAll('body *')].filter(
            e => !e.closest('svg') && e.getBoundingClientRect().right > innerWidth + 1);
        const stacked = [...document.querySelectorAll('td')].every(
            cell => getComputedStyle(cell).display != 'table-cell');
        const fine = innerWidth == 390 && !wide.length && stacked
            && document.documentElement.scrollWidth <= innerWidth;
        document.body.style.background = fine ? '#00ff00' : '#ff0000';
    });</script></body>"""
    (tmp_path / "inner.html").write_text(path.read_text().replace("</body>", probe))
    frame = '<iframe src="inner.html" width="390" height="1200" frameborder="0"></iframe>'
    (tmp_path / "outer.html").write_text(f'<!doctype html><body style="margin: 0">{frame}</body>')
    said = browse(
        tmp_path / "outer.html",
        tmp_path,
        f"--screenshot={tmp_path / 'phone.png'}",
        "--window-size=800,1200",
        "--virtual-time-budget=5000",
    )
    assert (tmp_path / "phone.png").exists(), said
    shot = matplotlib.image.imread(tmp_path / "phone.png")[..., :3]
    assert shot[4, 2].tolist() == [0, 1, 0], "something is wider than the phone"


def test_the_hardest_samples_are_those_with_wrong_labels(make, tmp_path):
    """Of 40 flipped labels at least 30 are found among the 40 samples at the top."""
    images, labels = digits(1400).tensors
    torch.manual_seed(0)
    flipped = torch.randperm(1400)[:40]
    labels = labels.clone()
    labels[flipped] = (labels[flipped] + torch.randint(1, 10, (40,))) % 10
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(72, 10),
    )
    exp = make(model, train_dataset=TensorDataset(images, labels), batch_size=64)
    exp.train_n_steps(5 * 22)
    top = exp.train_loader.dataset.hardest(40)
    assert len(set(top.index) & set(flipped.tolist())) >= 30
    assert top["confidence"].is_monotonic_increasing
    page = exp.report(tmp_path / "page.html").read_text()
    section = page[page.index("Hardest samples") : page.index("Most forgotten")]
    shown = [int(number) for number in re.findall(r"<b>#(\d+)</b>", section)]
    assert shown == top.index[:24].tolist() and section.count("data:image/png") == 24
