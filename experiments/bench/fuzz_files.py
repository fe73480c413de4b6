"""Damaged files: every format of the library's checkpoints, cut, flipped, zeroed and exchanged.

    python -m experiments.bench.fuzz_files                        # the table, about a minute
    python -m experiments.bench.fuzz_files --tries 400 --out experiments/bench/FUZZ.md

A try damages one file and reads it. It may be refused with an error that names the file, or read as
it was (the damage lies where nothing is read from: padding, a date). It must not be read as
something else, end in an error without the file's name, or change the network that was to be
loaded. The exit status is 1 where one of these happened.
"""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pilimit_lib.core import load, restore, save, snapshot, write_text
from pilimit_lib.inf import InfMLP, InfPiConvNet, PiSGD
from pilimit_lib.inf.checkpoints import to_pilimit_orig
from pilimit_lib.inf.gp import ReLUKernel, kernel_matrix
from pilimit_lib.inf.rows.files import load_rows, save_rows

from ..training.flags import plain_command_line

REFUSED, UNHARMED, OTHER = "refused, named", "read as it was", "READ AS SOMETHING ELSE"
UNNAMED, CHANGED = "ERROR WITHOUT NAME", "NETWORK CHANGED"
OUTCOMES = (REFUSED, UNHARMED, OTHER, UNNAMED, CHANGED)


@dataclass(frozen=True)
class Format:
    """A kind of file: `write` it into a folder, which gives the file that will be damaged, and
    `read` that into numbers. `checked`: whether its numbers have a checksum."""

    name: str
    write: Callable[[Path], Path]
    read: Callable[[Path], list[Tensor]]
    checked: bool = True


def network() -> InfMLP:
    torch.manual_seed(0)
    return InfMLP(5, 3, 6, 1)


def numbers(net: nn.Module) -> list[Tensor]:
    return [value.clone() for value in net.state_dict().values()]


class Changed(Exception):
    """A network is not what it was before it refused a file."""


def into(net: nn.Module, read: Callable[[nn.Module], object]) -> list[Tensor]:
    """The numbers of `net` after `read`, which must leave it alone where it fails."""
    before = numbers(net)
    try:
        read(net)
    except Exception as error:
        if not same(before, numbers(net)):
            raise Changed from error
        raise
    return numbers(net)


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


def written(name: str, content: Callable[[], object], **how) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        torch.save(content(), folder / name, **how)
        return folder / name

    return write


def snapshot_file(folder: Path) -> Path:
    net = network()
    optimizer = PiSGD(net.parameters(), lr=0.1, momentum=0.5)
    net(torch.ones(2, 5)).sum().backward()
    optimizer.step()
    save(snapshot(net, optimizer, epoch=3), folder / "snapshot.pt")
    return folder / "snapshot.pt"


def read_snapshot(path: Path) -> list[Tensor]:
    net = InfMLP(5, 3, 6, 1)
    optimizer = PiSGD(net.parameters(), lr=0.2, momentum=0.5)
    return into(net, lambda net: restore(net, load(path), optimizer))


def rows_folder(file: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        save_rows(network(), folder / "rows")
        return folder / "rows" / file

    return write


def read_rows(path: Path) -> list[Tensor]:
    return into(InfMLP(5, 3, 6, 1), lambda net: load_rows(net, path.parent))


def kernel_cache(file: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        read_kernel(folder / file)
        return folder / file

    return write


def read_kernel(path: Path) -> list[Tensor]:
    x = torch.linspace(-1, 1, 60).view(20, 3)
    how = {"block": 8, "cache": path.with_suffix(".npy"), "progress": False}
    return [kernel_matrix(ReLUKernel(2), x, **how)]


def conv_net() -> InfPiConvNet:
    torch.manual_seed(0)
    return InfPiConvNet(3, 4, (3, 4))


FORMATS = (
    Format("snapshot of network and optimiser", snapshot_file, read_snapshot),
    Format(
        "state dict, rows",
        written("net.pt", lambda: network().state_dict()),
        lambda path: numbers(InfMLP.from_state_dict(load(path))),
    ),
    Format(
        "state dict, conv",
        written("net.pt", lambda: conv_net().state_dict()),
        lambda path: numbers(InfPiConvNet.from_state_dict(load(path))),
    ),
    Format(
        "state dict, format before torch 1.6",
        written("net.pt", lambda: network().state_dict(), _use_new_zipfile_serialization=False),
        lambda path: numbers(InfMLP.from_state_dict(load(path))),
        checked=False,
    ),
    Format(
        "network of the paper's code",
        written("net.th", lambda: to_pilimit_orig(network())),
        lambda path: numbers(InfMLP.from_pilimit_orig(path)),
    ),
    *(
        Format(f"folder of rows, {file}", rows_folder(file), read_rows)
        for file in ("state.pt", "rank-0.pt", "A.0.layers.1")
    ),
    Format("kernel cache, matrix", kernel_cache("kernel.npy"), read_kernel),
    Format("kernel cache, note", kernel_cache("kernel.json"), read_kernel),
)


def cut(content: bytes, tries: int, random: random.Random) -> Iterator[bytes]:
    yield from (content[:length] for length in (0, 1, len(content) - 1))
    for _ in range(tries - 3):
        yield content[: random.randrange(len(content))]


def flip(content: bytes, tries: int, random: random.Random) -> Iterator[bytes]:
    for _ in range(tries):
        at = random.randrange(len(content))
        yield content[:at] + bytes([content[at] ^ 1 << random.randrange(8)]) + content[at + 1 :]


def zero(content: bytes, tries: int, random: random.Random) -> Iterator[bytes]:
    """As a file system leaves a file whose last blocks were not written."""
    for _ in range(tries):
        at = random.randrange(len(content))
        yield content[:at] + bytes(len(content) - at)


def exchange(content: bytes, tries: int, random: random.Random) -> Iterator[bytes]:
    """Another kind of file under this name."""
    yield b'{"a": 1}'
    yield b"\x89PNG\r\n\x1a\n" + content[8:]
    yield b"PK\x05\x06" + bytes(18)
    yield content * 2
    yield b"\x80\x04N."
    for _ in range(tries - 5):
        yield random.randbytes(len(content))


CASES = {"cut": cut, "flipped bit": flip, "zeros to the end": zero, "another kind": exchange}


def outcome(form: Format, path: Path, expected: list[Tensor]) -> str:
    try:
        found = form.read(path)
    except Changed:
        return CHANGED
    except Exception as error:
        return REFUSED if str(path.parent) in str(error) else UNNAMED
    return UNHARMED if same(found, expected) else OTHER


def tried(form: Format, tries: int, seed: int = 0) -> Iterator[tuple[str, Counter]]:
    """(case, how often each outcome came) for one format."""
    for case, damage in CASES.items():
        counts: Counter = Counter()
        with tempfile.TemporaryDirectory(prefix="fuzz") as folder:
            path = form.write(Path(folder))
            others = {p: p.read_bytes() for p in path.parent.iterdir() if p != path}
            expected, content = form.read(path), path.read_bytes()
            for damaged in damage(content, tries, random.Random(seed)):
                path.write_bytes(damaged)
                counts[UNHARMED if damaged == content else outcome(form, path, expected)] += 1
                for other, kept in others.items():
                    other.write_bytes(kept)
        yield case, counts


def failures(form: Format, counts: Counter) -> int:
    """How many tries ended as they must not."""
    return counts[CHANGED] + (counts[UNNAMED] + counts[OTHER] if form.checked else 0)


def table(rows: list[tuple[Format, str, Counter]]) -> str:
    lines = ["| format | case | tries | " + " | ".join(OUTCOMES) + " |"]
    lines.append("|---" * (3 + len(OUTCOMES)) + "|")
    for form, case, counts in rows:
        shown = " | ".join(str(counts[name]) for name in OUTCOMES)
        lines.append(f"| {form.name} | {case} | {counts.total()} | {shown} |")
    return "\n".join(lines)


HEAD = """# Damaged files

Made by `python -m experiments.bench.fuzz_files --tries {tries} --out experiments/bench/FUZZ.md`.
One file of each format is damaged and read: cut, with one flipped bit, with zeros to its end, or
exchanged for another kind. In capitals is what must not happen. The one exception: the format of
torch before 1.6 has no checksums, so that a flipped bit of its numbers is another number, and one
in a name an error of the network, which does not know the file.

"""


def main(arguments: list[str] | None = None) -> int:
    parser = plain_command_line("bench.fuzz_files", __doc__)
    parser.add_argument(
        "--tries",
        type=int,
        default=40,
        help="damages of each format and case, at least 6 (default 40)",
    )
    parser.add_argument("--out", type=Path, help="a Markdown file for the table")
    settings = parser.parse_args(arguments)
    if settings.tries < 6:
        parser.error(f"--tries is {settings.tries}; at least 6 were expected")
    rows = [
        (form, case, counts)
        for form in tqdm(FORMATS, disable=None)
        for case, counts in tried(form, settings.tries)
    ]
    text = table(rows)
    print(text)
    if settings.out:
        write_text(settings.out, HEAD.format(tries=settings.tries) + text + "\n")
    return int(any(failures(form, counts) for form, _, counts in rows))


if __name__ == "__main__":
    raise SystemExit(main())
