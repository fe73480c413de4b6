"""Real processes that begin with everything imported: forked from a server that has done so once,
which saves some four seconds of processor time each. What is said about a new process alone
(imports, environment, the command line) is tested in one of its own instead."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PRELOADED = ["torch.distributed", "experiments.cifar10.cifar10mlp", "tests.inf.test_rows_shard"]


def process(work: Callable[..., Any], *args: Any) -> multiprocessing.Process:
    """A process that will do `work(*args)`; not started."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)  # counts for the first process of a test session
    return context.Process(target=work, args=args)


def finish(code: str) -> tuple[int | None, str, str]:
    """(exit status, output, errors) of Python code in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("output", "errors")]
        child = process(_run, code, *map(str, paths))
        child.start()
        child.join(600)
        if child.is_alive():
            child.kill()
            child.join()
        output, errors = (path.read_text() for path in paths)
    return child.exitcode, output, errors


def _run(code: str, *paths: str) -> None:
    for descriptor, path in zip((1, 2), paths):
        with open(path, "wb") as file:
            os.dup2(file.fileno(), descriptor)
    torch.set_num_threads(1)
    exec(compile(code, "<warm>", "exec"), {"__name__": "__main__"})
