"""Omniglot in memory: 1,623 characters of 20 drawings as 28 x 28 images, in the few-shot split of
Vinyals et al. 2016.

The two zip files of the published set (`images_background.zip`, `images_evaluation.zip`), or the
folders in them, lie in DIR or DIR/omniglot. Source: Lake, Salakhutdinov & Tenenbaum 2015;
https://github.com/brendenlake/omniglot/tree/master/python
"""

from __future__ import annotations

import io
import warnings
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pilimit_lib.core import replacing

from ..training.process import shows_bars

PARTS = ("images_background", "images_evaluation")
SIDE, DRAWINGS, CHARACTERS = 28, 20, 1623
LARGEST = 1 << 20  # bytes and pixels of a drawing; the published ones have 105 x 105 pixels
WHERE = "https://github.com/brendenlake/omniglot/tree/master/python"

# The Vinyals split in words: five alphabets of the background set validate. The evaluation set is
# tested on from the last four characters of Gurmukhi onwards in alphabetical order; all the rest
# trains.
VALIDATION = ("Armenian", "Bengali", "Early_Aramaic", "Hebrew", "Mkhedruli_(Georgian)")
FIRST_TESTED = ("Gurmukhi", "character42")
COUNTS = {"train": 1028, "val": 172, "test": 423}


def split_of(part: str, alphabet: str, character: str) -> str:
    """train, val or test, for a character of one of the two published parts."""
    if part == PARTS[0]:
        return "val" if alphabet in VALIDATION else "train"
    return "test" if (alphabet, character) >= FIRST_TESTED else "train"


def load_omniglot(root: str | Path, split: str, quiet: bool = False) -> np.ndarray:
    """The images of all characters of a split: uint8 [classes 20 28 28], white paper 255.

    Reading them takes seconds, so of zip files a copy is kept beside them (omniglot_28.npz) where
    the folder may be written to. Raises FileNotFoundError where files are missing, ValueError where
    they are damaged or not the whole set.
    """
    if split not in COUNTS:
        raise ValueError(
            f"there is no split '{split}' of Omniglot; choose one of {', '.join(COUNTS)}"
        )
    sources = _sources(Path(root))
    if any(source.is_dir() for source in sources):
        # nothing about a folder tells whether its files are still the same
        return _read(sources, quiet)[split]
    kept = sources[0].parent / "omniglot_28.npz"
    stamp = [
        f"{source.name} {source.stat().st_size} {source.stat().st_mtime_ns}" for source in sources
    ]
    images = _kept(kept, stamp)
    if images is None:
        images = _read(sources, quiet)
        _keep(kept, stamp, images)
    return images[split]


def _sources(root: Path) -> list[Path]:
    folders = [root, root / "omniglot"]
    for folder in folders:
        found = [
            next((path for path in (folder / f"{part}.zip", folder / part) if path.exists()), None)
            for part in PARTS
        ]
        if all(found):
            return found
        if any(found):
            missing = PARTS[0] if found[0] is None else PARTS[1]
            raise FileNotFoundError(
                f"{folder} holds one half of Omniglot, but not {missing}.zip; get it from {WHERE}"
            )
    raise FileNotFoundError(
        f"Omniglot is not in {root.resolve()} (nor in its folder omniglot): {PARTS[0]}.zip and "
        f"{PARTS[1]}.zip were expected; get them from {WHERE}"
    )


def _files(source: Path) -> Iterator[tuple[tuple[str, ...], bytes]]:
    """(path inside the part, content) of every drawing."""

    def require_drawing(name: str, size: int) -> None:
        if size > LARGEST:
            raise ValueError(
                f"{name} in {source} is no drawing: it unpacks to {size} bytes; get the file again "
                f"from {WHERE}"
            )

    if source.is_dir():
        for path in sorted(source.rglob("*.png")):
            require_drawing(path.name, path.stat().st_size)
            yield path.relative_to(source).parts, path.read_bytes()
        return
    try:
        with zipfile.ZipFile(source) as archive:
            for name in sorted(name for name in archive.namelist() if name.endswith(".png")):
                require_drawing(name, archive.getinfo(name).file_size)
                yield tuple(name.split("/"))[-3:], archive.read(name)
    # zlib.error, NotImplementedError and RuntimeError: a damaged stream, compression method or
    # encryption flag.
    except (
        zipfile.BadZipFile,
        EOFError,
        OSError,
        zlib.error,
        NotImplementedError,
        RuntimeError,
    ) as error:
        raise ValueError(f"{source} is damaged ({error}); get it again from {WHERE}") from error


def _small(content: bytes) -> np.ndarray:
    """A drawing as bytes [28 28]. Raises ValueError where it is no image, or a picture whose
    unpacking would take more memory than any drawing's."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise ImportError(
            "reading Omniglot needs Pillow, which comes with torchvision: pip install "
            "'pilimit[images]'"
        ) from error
    try:
        # Pillow only warns of a picture that is somewhat too large, and opens it
        with warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning):
            image = Image.open(io.BytesIO(content))
        if image.width * image.height > LARGEST:
            raise ValueError(f"it has {image.width} x {image.height} pixels")
        resized = image.convert("L").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    except (
        UnidentifiedImageError,
        OSError,
        SyntaxError,
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ) as error:
        raise ValueError(str(error)) from error
    return np.asarray(resized)


def _read(sources: list[Path], quiet: bool) -> dict[str, np.ndarray]:
    drawings = defaultdict(list)
    bar = tqdm(
        total=CHARACTERS * DRAWINGS,
        desc="reading Omniglot",
        disable=not shows_bars(quiet),
        leave=False,
    )
    with bar:
        for part, source in zip(PARTS, sources):
            for where, content in _files(source):
                try:
                    image = _small(content)
                except ValueError as error:
                    raise ValueError(
                        f"{'/'.join(where)} in {source} is no image ({error}); get the file again "
                        f"from {WHERE}"
                    ) from error
                drawings[part, *where[-3:-1]].append(image)
                bar.update()
    by_split = defaultdict(list)
    for key in sorted(drawings):
        if len(drawings[key]) != DRAWINGS:
            raise ValueError(
                f"{'/'.join(key)} of Omniglot has {len(drawings[key])} drawings, {DRAWINGS} were "
                "expected: the set "
                f"in {sources[0].parent} is not whole; get it again from {WHERE}"
            )
        by_split[split_of(*key)].append(np.stack(drawings[key]))
    counts = {split: len(by_split[split]) for split in COUNTS}
    if counts != COUNTS:
        raise ValueError(
            f"Omniglot in {sources[0].parent} has {counts} characters, {COUNTS} were expected: it "
            "is not whole; "
            f"get it again from {WHERE}"
        )
    return {split: np.stack(classes) for split, classes in by_split.items()}


def _kept(path: Path, stamp: list[str]) -> dict[str, np.ndarray] | None:
    """What an earlier reading kept, None if it was of other files or can't be read."""
    try:
        with np.load(path, allow_pickle=False) as found:
            return (
                {split: found[split] for split in COUNTS} if list(found["stamp"]) == stamp else None
            )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _keep(path: Path, stamp: list[str], images: dict[str, np.ndarray]) -> None:
    # a folder that can't be written to is no error
    with suppress(OSError), replacing(path) as beside:
        np.savez(beside, stamp=np.array(stamp), **images)
