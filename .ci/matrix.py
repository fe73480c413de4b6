#!/usr/bin/env python3
"""The test command under many versions, each in a fresh environment: .ci/matrix.py [NAME ...]

A row of the matrix is a Python and the versions that pip is held to. Each result is appended to
docs/matrix.jsonl, and docs/MATRIX.md is made of the newest result of every row. Rows that have a
result for this commit are passed over, so that an interrupted run goes on; --again runs them too.
A Python that is not at hand (pythonX.Y on PATH, or pyenv's) is said and passed over. An environment
takes some 6 GB where pip brings torch's CUDA build, and is removed after its row.
"""

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "docs" / "matrix.jsonl", ROOT / "docs" / "MATRIX.md"
OLDEST = ["numpy==1.26.*", "pandas==2.1.*", "scikit-learn==1.4.*", "scipy==1.11.*", "pyarrow==15.*"]
ROWS = {
    "lowest": ("3.11", ["torch==2.4.*", *OLDEST]),
    **{f"torch-2.{minor}": ("3.11", [f"torch==2.{minor}.*"]) for minor in range(5, 15)},
    "python-3.12": ("3.12", []),
    "python-3.13": ("3.13", []),
}
SHOWN = ["torch", "numpy", "pandas", "scikit-learn", "scipy"]


def python_of(version: str) -> str | None:
    """An interpreter of this version: on PATH, or among pyenv's."""
    candidates = [shutil.which(f"python{version}")]
    candidates += sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    for path in filter(None, map(str, filter(None, candidates))):
        said = subprocess.run([path, "--version"], capture_output=True, text=True)
        if said.returncode == 0 and f" {version}." in said.stdout:
            return path
    return None


def run(name: str, tests: list[str]) -> dict | None:
    version, pins = ROWS[name]
    python = python_of(version)
    if python is None:
        print(f"{name}: there is no Python {version} here; passed over", flush=True)
        return None
    print(f"{name}: Python {version}, {', '.join(pins) or 'the newest of everything'}", flush=True)
    with tempfile.TemporaryDirectory(prefix="pilimit-matrix-") as folder:
        held = Path(folder) / "held.txt"
        held.write_text("\n".join(pins) + "\n")
        inside = str(Path(folder) / "env" / "bin" / "python")
        subprocess.run([python, "-m", "venv", str(Path(folder) / "env")], check=True)
        installed = subprocess.run(
            [inside, "-m", "pip", "install", "-q", "-c", str(held), "-e", f"{ROOT}[test]"],
            capture_output=True,
            text=True,
        )
        record = {
            "row": name,
            "date": datetime.date.today().isoformat(),
            "commit": commit(),
            "cpu": processor(),
            "python": output(inside, "-V").split()[1],
        }
        if installed.returncode:
            return record | {"result": "does not install", "why": installed.stderr.strip()[-300:]}
        listed = json.loads(output(inside, "-m", "pip", "list", "--format", "json"))
        record["versions"] = {p["name"]: p["version"] for p in listed if p["name"] in SHOWN}
        start = time.monotonic()
        done = subprocess.run(
            [inside, "-m", "pytest", "-n", "2", "-p", "no:cacheprovider", *tests],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        last = (done.stdout.strip().splitlines() or [done.stderr.strip()[-300:]])[-1]
        for line in done.stdout.splitlines():
            if line.startswith(("FAILED", "ERROR")):
                print(line)
        return record | {
            "result": re.sub(r" in [\d.]+s.*", "", last).strip("= "),
            "status": done.returncode,
            "minutes": round((time.monotonic() - start) / 60, 1),
            "tests": " ".join(tests),
        }


def output(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def commit() -> str:
    return output("git", "rev-parse", "--short", "HEAD")


def processor() -> str:
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    name = re.search(r"model name\s*: (.*)", text)
    flags = re.search(r"flags\s*: (.*)", text)
    widest = next((f for f in ("avx512f", "avx2", "avx") if flags and f in flags[1].split()), "")
    return f"{name[1] if name else platform.processor() or platform.machine()} {widest}".strip()


def results() -> dict[str, dict]:
    lines = RESULTS.read_text().splitlines() if RESULTS.is_file() else []
    return {record["row"]: record for record in map(json.loads, lines)}


def page(found: dict[str, dict]) -> str:
    rows = [
        f"| {name} | {r['python']} | "
        + " | ".join(r.get("versions", {}).get(p, "") for p in SHOWN)
        + f" | {r['result']} | {r.get('minutes', '')} | {r['cpu']} | {r['date']}, {r['commit']} |"
        for name in ROWS
        if (r := found.get(name))
    ]
    absent = [name for name in ROWS if name not in found]
    return (
        "\n".join(
            [
                "# Versions under which the tests ran",
                "",
                "Made by `.ci/matrix.py`: the test command in a fresh environment per row.",
                "",
                f"| row | Python | {' | '.join(SHOWN)} | result | minutes | processor | when |",
                "|" + "---|" * (len(SHOWN) + 6),
                *rows,
                "",
                *([f"Not run so far: {', '.join(absent)}."] if absent else []),
            ]
        ).rstrip()
        + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known_rows = ", ".join(ROWS)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"rows to run, of {known_rows}; all by default"
    )
    parser.add_argument(
        "--again", action="store_true", help="run rows that have a result for this commit too"
    )
    parser.add_argument(
        "--tests", nargs="+", default=[], help="only these tests, instead of the whole suite"
    )
    args = parser.parse_args()
    unknown = set(args.names) - set(ROWS)
    if unknown:
        parser.error(f"there is no row {', '.join(sorted(unknown))}; choose among {known_rows}")
    failed = False
    for name in args.names or ROWS:
        known = results().get(name, {})
        if not args.again and known.get("commit") == commit():
            continue
        record = run(name, args.tests)
        if record is None:
            continue
        print(f"{name}: {record['result']}", flush=True)
        failed |= record.get("status") != 0
        with RESULTS.open("a") as file:
            file.write(json.dumps(record) + "\n")
        PAGE.write_text(page(results()))
    sys.exit(failed)


if __name__ == "__main__":
    main()
