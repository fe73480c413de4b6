"""What this machine and this installation can do: versions, processor, GPU, compiler, extras.

pilimit doctor
"""

from __future__ import annotations

import platform
import re
from importlib.metadata import PackageNotFoundError, requires, version
from types import ModuleType

import torch

from pilimit_lib import __version__
from pilimit_lib.inf.extension import FLAGS, library
from pilimit_lib.inf.moments import native as native_moments
from pilimit_lib.inf.rows.sums import native as native_rows

from .training.flags import plain_command_line


def installed(package: str) -> str | None:
    """Its version, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def extras(requirements: list[str]) -> dict[str, list[str]]:
    """The packages that each extra asks for, of a distribution's requirements."""
    found: dict[str, list[str]] = {}
    for requirement in requirements:
        match = re.fullmatch(
            r"([\w.-]+)(?:\[[^]]*\])?[^;]*; extra == ['\"]([\w-]+)['\"]", requirement
        )
        if match and match[1] != "pilimit":
            found.setdefault(match[2], []).append(match[1])
    return found


def gpu() -> str:
    """The GPU, or why there is none."""
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        return f"{torch.cuda.get_device_name(0)}, {memory:.0f} GiB; Triton {installed('triton')}"
    if torch.version.cuda is None:
        return "none: this torch is built for the CPU"
    return f"none: torch is built for CUDA {torch.version.cuda} and finds no device"


def sums(module: ModuleType) -> str:
    """Whether sums in C++ can be had; they are compiled now where they never were."""
    found = library(module.SOURCE, FLAGS)
    return f"no: {found}" if isinstance(found, str) else "yes"


def lines() -> list[str]:
    """What is said, a line each."""
    try:
        wanted = extras(requires("pilimit") or [])
    except PackageNotFoundError:
        wanted = {}
    instructions = torch.backends.cpu.get_cpu_capability()
    found = [
        f"pilimit {__version__}, Python {platform.python_version()}, torch {torch.__version__}",
        f"processor: {instructions}, {torch.get_num_threads()} thread(s)",
        f"GPU: {gpu()}",
        f"sums in C++ of rows: {sums(native_rows)}",
        f"sums in C++ of moments: {sums(native_moments)}",
    ]
    if not wanted:
        found.append("extras: unknown, since pilimit is not installed (pip install -e .)")
    for name, packages in wanted.items():
        absent = [package for package in packages if installed(package) is None]
        state = f"lacks {', '.join(absent)}: pip install 'pilimit[{name}]'" if absent else "there"
        found.append(f"extra {name}: {state}")
    return found


def main(argv: list[str] | None = None) -> list[str]:
    """Print what this machine and this installation can do."""
    plain_command_line("doctor", __doc__).parse_args(argv)
    said = lines()
    print(*said, sep="\n")
    return said


if __name__ == "__main__":
    main()
