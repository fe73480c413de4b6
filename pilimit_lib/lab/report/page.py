"""The page itself: plain HTML and CSS, pictures inlined, no scripts."""

from __future__ import annotations

import time
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd

from ...core import write_text
from ..data.ledger import hardest
from ..run.session import Session
from . import figures
from .data import RunView
from .stats import most_forgotten
from .style import CSS

SHOWN = 24


def write_report(session: Session, path: str | Path) -> Path:
    """The page about a run as it stands now."""
    write_text(Path(path), page(RunView.of(session)))
    return Path(path)


def write_folder_report(
    folder: str | Path, path: str | Path | None = None, checkpoint_id: int | None = None
) -> Path:
    """The page about a run's folder, with ledger and neurons of one checkpoint (default: the
    newest)."""
    target = Path(folder) / "report.html" if path is None else Path(path)
    write_text(target, page(RunView.of_folder(Path(folder), checkpoint_id)))
    return target


def page(view: RunView) -> str:
    """The whole page."""
    sections = [
        _curves(view),
        _tree(view),
        _neurons(view),
        _map(view),
        _hardest(view),
        _forgotten(view),
        _timeline(view),
    ]
    written = time.strftime("%Y-%m-%d %H:%M")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(view.name)} - training report</title><style>{CSS}</style></head>
<body><main><h1>{escape(view.name)}</h1>
<p class="note">{_subtitle(view)}</p>
{_tiles(view)}
{"".join(sections)}
<footer>Written {written} by pilimit_lib.lab. This file is self-contained.</footer>
</main></body></html>
"""


def _subtitle(view: RunView) -> str:
    settings = view.settings
    groups = settings.get("groups") or [{}]
    rate = (
        f", learning rate {groups[0]['lr']:g}"
        if isinstance(groups[0].get("lr"), int | float)
        else ""
    )
    what = (
        f"{settings['model']}, {settings['optimizer']}{rate}, batches of {settings['batch_size']}. "
        if settings
        else ""
    )
    return escape(f"{what}Neurons and samples are those of {view.moment}.")


def _tiles(view: RunView) -> str:
    tiles = [(f"{view.age:,}", "samples learned from (age)"), (f"{view.steps:,}", "steps")]
    evaluation = view.curve("eval").dropna(subset=["loss"])
    if len(evaluation):
        tiles += [(f"{evaluation['loss'].iloc[-1]:.4g}", "last evaluation loss")]
        if evaluation["accuracy"].notna().any():
            tiles += [
                (
                    f"{evaluation['accuracy'].iloc[-1]:.1%}",
                    f"last accuracy (best {evaluation['accuracy'].max():.1%})",
                )
            ]
    if not view.neurons.empty:
        silent = int((view.neurons["train_rate"] == 0).sum())
        tiles.append((f"{len(view.neurons):,}", f"neurons, {silent} of them silent"))
    if view.samples is not None:
        tiles.append(
            (
                f"{len(view.samples):,}",
                f"training samples, {int(view.samples['deny_listed'].sum()):,} denied",
            )
        )
    return (
        '<div class="tiles">'
        + "".join(
            f'<div class="tile"><b>{value}</b><span>{escape(label)}</span></div>'
            for value, label in tiles
        )
        + "</div>"
    )


def _section(title: str, note: str, body: str) -> str:
    return f'<section><h2>{escape(title)}</h2><p class="note">{escape(note)}</p>{body}</section>'


def _figure(uri: str, description: str) -> str:
    return f'<img class="figure" alt="{escape(description)}" src="{uri}">'


def _table(columns: list[str], rows: list[list[Any]], numeric: set[str] = frozenset()) -> str:
    def side(column: str) -> str:
        return ' class="n"' if column in numeric else ""

    def line(row: list[Any]) -> str:
        named = zip(columns, row)
        cells = (f'<td{side(c)} data-name="{escape(c)}">{value}</td>' for c, value in named)
        return f"<tr>{''.join(cells)}</tr>"

    head = "".join(f"<th{side(column)}>{escape(column)}</th>" for column in columns)
    body = "".join(map(line, rows))
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _curves(view: RunView) -> str:
    drawn = figures.curves(view)
    if drawn is None:
        return _section("Learning curves", "Nothing was recorded yet.", "")
    return _section(
        "Learning curves",
        "Training (thin) and evaluation (dots). A branch begins at the checkpoint that it was "
        "loaded from. Dotted lines are operations: see the timeline.",
        _figure(drawn, "loss and accuracy over age"),
    )


def _tree(view: RunView) -> str:
    drawn = figures.tree(view)
    if drawn is None:
        return _section("Checkpoints", "None was written yet.", "")
    hashes = ("structure", "data", "settings")
    rows = [
        [
            "&nbsp;&nbsp;" * depth + f"<b>{entry['id']}</b>",
            "" if entry["parent"] is None else entry["parent"],
            f"{entry.get('age', 0):,}",
            *(f"<code>{escape(str(entry.get(key, '')))}</code>" for key in hashes),
            escape(entry.get("note", "")),
        ]
        for depth, entry in view.checkpoints.lines()
    ]
    table = _table(["checkpoint", "parent", "age", *hashes, "note"], rows, {"age"})
    return _section(
        "Checkpoints",
        "Equal hashes: same structure, same position and deny list, same settings. The one that "
        "the "
        "run stands on is red.",
        _figure(drawn, "the tree of checkpoints over age") + table,
    )


def _neurons(view: RunView) -> str:
    drawn = figures.neurons(view)
    if drawn is None:
        return _section("Neurons", "No forward pass was counted yet.", "")
    return _section(
        "Neurons",
        "How often each neuron is above zero, per sample: bars in training, dots in evaluation (a "
        "convolution counts every position). Red crosses never triggered; purple triangles learn "
        "at less than "
        "the full rate.",
        _figure(drawn, "trigger rates of the neurons of each layer"),
    )


def _map(view: RunView) -> str:
    drawn, text, dots = figures.data_map(view)
    if drawn is None:
        return ""
    width, height = (100 * size for size in figures.MAP_SIZE)
    spots = []
    for row in dots.itertuples():
        x, y = row.x * width, row.y * height
        side, shift = ("end", -10) if x > width / 2 else ("start", 10)
        spots.append(
            f'<g tabindex="-1"><circle cx="{x:.0f}" cy="{y:.0f}" r="6"/><text x="{x + shift:.0f}" '
            f'y="{y - 8:.0f}" text-anchor="{side}">#{row.Index} {_verdict(row)}</text></g>'
        )
    overlay = f'<svg viewBox="0 0 {width:.0f} {height:.0f}">{"".join(spots)}</svg>'
    figure = _figure(drawn, "data map: confidence against variability")
    named = f" of the {len(dots):,} least certain ones" if len(dots) == figures.MOST_LOCATED else ""
    return _section(
        "Data map",
        f"{text}. Each point is a training sample: what probability its true class got whenever it "
        f"was seen. Point at a dot{named}, or tap it, for its id.",
        f'<div class="map">{figure}{overlay}</div>',
    )


def _hardest(view: RunView) -> str:
    worst = _seen(view)
    if worst.empty or worst["confidence"].isna().all():
        return ""
    return _section(
        "Hardest samples, probably mislabelled",
        "The label got the least probability, on average over training. Wrong labels gather here: "
        "of 40 labels of digits that were flipped on purpose, 33 to 38 were among the 40 samples "
        "at the top of this list (5 seeds, 5 epochs). dataset.hardest() is the list.",
        _cards(view, hardest(worst, SHOWN)),
    )


def _forgotten(view: RunView) -> str:
    seen = _seen(view)
    if seen.empty:
        return ""
    return _section(
        "Most forgotten samples",
        "Right when last seen, wrong the next time: counted over training. Between equals, "
        "the ones whose true class got the least probability come first.",
        _cards(view, most_forgotten(seen, SHOWN)),
    )


def _seen(view: RunView) -> pd.DataFrame:
    if view.samples is None:
        return pd.DataFrame()
    return view.samples[view.samples["exposure_amount"] > 0]


def _cards(view: RunView, samples: pd.DataFrame) -> str:
    cards = (_card(view, int(row.Index), row) for row in samples.itertuples())
    return f'<div class="samples">{"".join(cards)}</div>'


def _verdict(row: Any) -> str:
    if row.label < 0:
        return f"loss {row.prediction_loss:.3g}"
    return f"label {row.label}, said {row.predicted_class}"


def _card(view: RunView, sample: int, row: Any) -> str:
    image = view.pictures.get(sample)
    shown = '<div class="none"></div>'
    if image is not None:
        shown = f'<img alt="sample {sample}" src="{figures.picture(image)}">'
    confidence = "" if pd.isna(row.confidence) else f", p {row.confidence:.2f}"
    denied = ", denied" if row.deny_listed else ""
    forgotten = f"<b>#{sample}</b> forgotten {row.forgotten}&times;"
    return f'<div class="sample">{shown}{forgotten}<br>{_verdict(row)}{confidence}{denied}</div>'


def _timeline(view: RunView) -> str:
    def badge(kind: str) -> str:
        return f'<span class="kind {escape(kind)}">{escape(kind)}</span>'

    rows = [
        [f"{event.get('age', 0):,}", event["branch"], badge(event["kind"]), escape(_what(event))]
        for event in view.timeline()
    ]
    return _section(
        "Timeline",
        "What was done to the run, in order." if rows else "Nothing was done to the run yet.",
        _table(["age", "branch", "kind", "what"], rows, {"age"}) if rows else "",
    )


def _what(event: dict[str, Any]) -> str:
    if event["kind"] == "checkpoint":
        return f"checkpoint {event['id']}"
    if "layers" in event:
        return f"layers {', '.join(event['layers'])}"
    return (f"{event['data']} set: " if "data" in event else "") + event.get("what", "")
