"""The page made from the logs of named runs: published, ours, difference, seeds, cost."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pilimit_lib.core import write_text

from .logs import LOGS, Log, read_logs
from .runs import RIDGES, RUNS, Run

PAGE = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- made by `python -m experiments.paper table` -->", "<!-- end of what is made -->"
HEAD = (
    "| run | what | published | last epoch | epoch chosen on held-out images | difference | "
    "best epoch on test images, as the paper reports | seeds | hours of one seed |"
)


@dataclass(frozen=True)
class Result:
    """Test accuracies of one seed in %: of the last epoch, of the epoch that is best on the
    held-out images, and of the one that is best on the test images."""

    last: float
    chosen: float
    best: float


def result_of(log: Log) -> Result | None:
    """None where nothing was tested yet."""
    frame = log.frame.reset_index(drop=True)
    if "test_acc" not in frame or frame.test_acc.isna().all():
        return None
    test = 100 * frame.test_acc
    tested = frame.index[frame.test_acc.notna()]
    choosing = next(
        (name for name in ("average_held_out_acc", "held_out_acc") if name in frame), None
    )
    if choosing == "average_held_out_acc":
        test = 100 * frame.average_test_acc
        tested = frame.index[frame.average_test_acc.notna()]
    chosen = tested[-1] if choosing is None else frame.loc[tested, choosing].idxmax()
    return Result(float(test[tested[-1]]), float(test[chosen]), float(test[tested].max()))


def page(logs: Sequence[Log]) -> str:
    """What stands between BEGIN and END."""
    of_run = {name: [log for log in logs if log.run.name == name] for name in RUNS}
    sections = dict.fromkeys(run.section for run in RUNS.values() if run.section != RIDGES)
    parts = []
    for section in sections:
        lines = [HEAD, "|" + "---|" * HEAD.count(" | ") + "---|"]
        for run in RUNS.values():
            if run.section == section:
                lines += _rows(run, of_run[run.name])
        parts.append(f"### {section}\n\n" + "\n".join(lines))
    parts.append(_ridges([log for log in logs if log.run.section == RIDGES]))
    return "\n\n".join(parts)


def _rows(run: Run, logs: Sequence[Log]) -> list[str]:
    """The row of the finished seeds, and one for each that is unfinished; else that it was not
    run."""
    done = [log for log in logs if log.finished and result_of(log) is not None]
    rows = [_finished(run, done)] if done else []
    for log in logs:
        if log not in done:
            rows.append(_unfinished(run, log))
    published = f"{run.published:.2f}" if run.published else "–"
    return rows or [f"| `{run.name}` | {run.what} | {published} | not run | | | | 0 | |"]


def _finished(run: Run, logs: Sequence[Log]) -> str:
    found = [result_of(log) for log in logs]
    chosen = [result.chosen for result in found]
    difference = f"{statistics.mean(chosen) - run.published:+.2f}" if run.published else ""
    epochs = bool(logs[0].epochs)
    return _row(
        run,
        _mean(result.last for result in found),
        _mean(chosen) if epochs else "",
        difference,
        _mean(result.best for result in found) if epochs else "",
        f"{len(logs)} ({', '.join(str(log.seed) for log in logs)})" if epochs else "none enters",
        _mean((_hours(log) for log in logs), 1),
    )


def _unfinished(run: Run, log: Log) -> str:
    found = result_of(log)
    so_far = "" if found is None else f"{found.last:.2f} "
    state = f"{so_far}({log.state})"
    return _row(run, state, "", "", "", f"seed {log.seed}", f"{_hours(log):.1f} so far")


def _row(run: Run, *cells: str) -> str:
    published = f"{run.published:.2f}" if run.published else "–"
    return f"| `{run.name}` | {run.what} | {published} | {' | '.join(cells)} |"


def _mean(values: Iterable[float], digits: int = 2) -> str:
    """Mean and, of several, standard deviation."""
    found = list(values)
    text = f"{statistics.mean(found):.{digits}f}"
    return text if len(found) < 2 else f"{text} ± {statistics.stdev(found):.{digits}f}"


def _hours(log: Log) -> float:
    """Of processor time, where it was measured. Of an epoch each record holds its own seconds, of a
    kernel those since its beginning."""
    if "seconds" not in log.frame:
        return 0.0
    seconds = log.frame.seconds
    if "cpu_seconds" in log.frame:
        seconds = log.frame.cpu_seconds.fillna(seconds)
    return float(seconds.sum() if log.epochs else seconds.max()) / 3600


def _ridges(logs: Sequence[Log]) -> str:
    """Held-out and test accuracy of kernels against the ridge."""
    lines = ["| kernel | ridge / mean diagonal | held out | test |", "|---|---|---|---|"]
    for log in logs:
        frame = log.frame
        if "held_out_acc" not in frame:
            continue
        best = frame.held_out_acc.idxmax()
        for place, record in frame.iterrows():
            if record.notna().held_out_acc:
                held_out = f"{100 * record.held_out_acc:.2f}"
                marked = f"**{held_out}**" if place == best else held_out
                test = f"{100 * record.test_acc:.2f}"
                lines.append(f"| {log.run.what} | {record.reg:g} | {marked} | {test} |")
    if len(lines) == 2:
        lines.append("| not run | | | |")
    return "### Ridges of the kernels\n\n" + "\n".join(lines)


def with_table(text: str, table: str) -> str:
    """A page's text with the table in its place."""
    if BEGIN not in text or END not in text:
        raise ValueError(f"the page has no {BEGIN} or no {END}, between which the table goes")
    before, rest = text.split(BEGIN, 1)
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{rest.split(END, 1)[1]}"


def write_page(logs: Path = LOGS, path: Path = PAGE) -> None:
    """Put what the logs say into the page."""
    write_text(path, with_table(path.read_text(encoding="utf-8"), page(read_logs(logs))))
