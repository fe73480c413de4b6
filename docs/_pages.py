"""What mkdocs needs to show pages that lie beside the code that they are about: it takes them into
the site, with their pictures, and turns links between files of the repository into links of the
site. A link to a file that is no page becomes its name."""

from __future__ import annotations

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PAGES = {  # in the repository: on the site
    "pilimit_lib/README.md": "pages/map.md",
    "pilimit_lib/inf/README.md": "pages/pi-networks.md",
    "pilimit_lib/inf/ROWS.md": "pages/rows.md",
    "pilimit_lib/dendrites/README.md": "pages/dendrites.md",
    "pilimit_lib/sigprop/README.md": "pages/sigprop.md",
    "pilimit_lib/lab/README.md": "pages/lab.md",
    "pilimit_orig/README.md": "pages/pilimit_orig.md",
    "experiments/cifar10/README.md": "pages/cifar10.md",
    "experiments/cifar10/MOMENTS.md": "pages/moments.md",
    "experiments/cifar10/CONV.md": "pages/conv.md",
    "experiments/cifar10/KERNELS.md": "pages/kernels.md",
    "experiments/meta/README.md": "pages/meta.md",
    "experiments/imagenet/README.md": "pages/imagenet.md",
    "experiments/bench/RESULTS.md": "pages/speed.md",
    "experiments/bench/FUZZ.md": "pages/fuzz.md",
    "CHANGELOG.md": "pages/changes.md",
    "CONTRIBUTING.md": "pages/contributing.md",
    "experiments/paper/README.md": "pages/paper.md",
    "experiments/understanding/README.md": "pages/understanding.md",
    "pilimit_lib/inf/INSTRUMENTS.md": "pages/instruments.md",
    "pilimit_lib/inf/PARALLEL.md": "pages/parallel.md",
    "pilimit_lib/inf/estimators/README.md": "pages/estimators.md",
    "README.md": "index.md",
}
LINK = re.compile(r"(!?)\[((?:[^][]|\[[^]]*\])*)\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)")
PICTURES = (".png", ".svg", ".jpg")


def source_of(page: str) -> str:
    """Where a page of the site lies in the repository."""
    there = {site: repository for repository, site in PAGES.items() if site != "index.md"}
    return there.get(page, f"docs/{page}")


def place_of(path: str) -> str | None:
    """Where a file of the repository lies on the site, or None."""
    if path in PAGES:
        return PAGES[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"pages/{path}" if path.endswith(PICTURES) else None


def linked(text: str, page: str) -> str:
    """The text of a page with its links as the site has them."""
    source = source_of(page)

    def replaced(match: re.Match) -> str:
        picture, label, target, anchor = match.groups()
        path = os.path.normpath(os.path.join(os.path.dirname(source), target))
        place = place_of(path)
        if place is None:
            return f"{label} (`{path}`)"
        way = os.path.relpath(place, os.path.dirname(page) or ".")
        return f"{picture}[{label}]({way}{anchor or ''})"

    return LINK.sub(replaced, text)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Take in the pages beside the code, and their pictures."""
    for path, site in PAGES.items():
        if site == "index.md":
            continue
        text = (ROOT / path).read_text(encoding="utf-8")
        files.append(File.generated(config, site, content=text))
    for path in sorted((ROOT / "experiments").rglob("*.png")):
        name = str(path.relative_to(ROOT))
        files.append(File.generated(config, f"pages/{name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    return linked(markdown, page.file.src_uri)
