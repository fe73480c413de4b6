"""python -m pilimit_lib.lab report RUN [--out PAGE.html] [--checkpoint ID]: the page about a run's
folder."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Parse and carry out; 0, or 2 with the reason on standard error."""
    parser = argparse.ArgumentParser(prog="python -m pilimit_lib.lab", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    report = commands.add_parser("report", help="write a self-contained HTML page about a run")
    report.add_argument("run", type=Path, help="the run's folder (root_log_dir/name)")
    report.add_argument(
        "--out", type=Path, help="the page (default: report.html in the run's folder)"
    )
    report.add_argument(
        "--checkpoint", type=int, help="whose neurons and samples are shown (default: the newest)"
    )
    given = parser.parse_args(arguments)
    from .report.page import write_folder_report

    try:
        print(write_folder_report(given.run, given.out, given.checkpoint))
    except (OSError, ValueError, LookupError) as error:
        print(f"no report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
