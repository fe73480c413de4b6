"""C++ compiled on the machine where it runs, once, and kept in the user's cache.

What is kept is code that later runs as this user. So it lies in a folder that only they can write
to, and carries a digest: a file of another user, or one cut short, is never loaded.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import time
from pathlib import Path

from ..core import replacing, write_text

logger = logging.getLogger(__name__)

# What this processor has, and sums in any order; NaN and Inf keep their meaning.
FLAGS = (
    "-O3",
    "-march=native",
    "-std=c++17",
    "-shared",
    "-fPIC",
    "-pthread",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fassociative-math",
    "-fno-signed-zeros",
)

LINES_A_SECOND = 100  # of such code at -O3, on a core of its own


def library(source: Path, flags: tuple[str, ...]) -> ctypes.CDLL | str:
    """The compiled functions of `source`, or why there are none.

    The first call compiles, which takes some seconds and is said in the log; later ones, in other
    processes too, load what was kept. It is compiled anew for another source, compiler, processor
    or flags, and where the kept file is damaged. `CXX` names the compiler, by default c++.
    """
    named = os.environ.get("CXX") or "c++"
    compiler = shutil.which(named)
    if compiler is None:
        return f"there is no C++ compiler {named!r}; install one or set CXX"
    try:
        folder = cache_folder()
        refused = _not_private(folder)
        if refused is not None:
            return refused
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
        made_of = repr((source.read_text(), flags, version, platform.machine(), _processor()))
        name = f"{source.stem}-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.so"
        if not _whole(folder / name):
            _compile(compiler, source, flags, folder / name)
        return ctypes.CDLL(str(folder / name))
    except subprocess.CalledProcessError as error:
        return f"{compiler} failed: {error.stderr.strip()[-500:]}"
    except (OSError, subprocess.SubprocessError, RuntimeError) as error:
        return f"{compiler} could not be used: {error}"


def cache_folder() -> Path:
    """Where compiled files are kept: XDG_CACHE_HOME or ~/.cache, in a folder of their own."""
    kept = os.environ.get("XDG_CACHE_HOME")
    return Path(kept or Path.home() / ".cache") / "pilimit"


def _not_private(folder: Path) -> str | None:
    """Why code in this folder could be another user's, or None; the folder is made if need be."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not hasattr(os, "getuid"):
        return None  # no users to tell apart on this system
    found = folder.stat()
    if found.st_uid != os.getuid():
        return f"{folder} belongs to another user; set XDG_CACHE_HOME to a folder of your own"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others may write to {folder}; take that right away: chmod go-w {folder}"
    return None


def _compile(compiler: str, source: Path, flags: tuple[str, ...], path: Path) -> None:
    lines = len(source.read_text().splitlines())
    what = f"the C++ operator {'/'.join(source.parts[-3:])}"
    logger.warning("building %s, once, about %.0f s", what, 1 + lines / LINES_A_SECOND)
    started = time.monotonic()
    with replacing(path) as beside:
        subprocess.run(
            [compiler, *flags, str(source), "-o", str(beside)],
            capture_output=True,
            text=True,
            timeout=300,
            check=True,
        )
        digest = hashlib.sha256(beside.read_bytes()).hexdigest()
    write_text(_digest_of(path), digest)
    logger.warning("built %s in %.1f s; kept in %s", what, time.monotonic() - started, path.parent)


def _digest_of(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _whole(path: Path) -> bool:
    """Whether this is what the compiler wrote: loading a file that was cut can end the process."""
    if not path.is_file() or not _digest_of(path).is_file():
        return False
    return hashlib.sha256(path.read_bytes()).hexdigest() == _digest_of(path).read_text()


def _processor() -> str:
    """What distinguishes processors for which code was compiled: the flags that Linux reports."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    flags = [line for line in lines if line.startswith(("flags", "Features"))]
    return flags[0] if flags else platform.processor()
