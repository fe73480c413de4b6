"""What pyproject.toml can't say: the commands, experiments/ in the source, are installed as
pilimit_experiments, since `experiments` is a name that users' own folders have; and the description
shows nothing that lies only in the source."""

import re
from pathlib import Path

from setuptools import find_packages, setup

COMMANDS = "pilimit_experiments"


def outside(readme: str) -> str:
    """The README for a page outside of the repository: without its pictures, and with the names of
    files instead of links to them."""
    readme = re.sub(r"!\[[^]]*\]\((?!https?:)[^)]*\)\n*", "", readme)
    return re.sub(r"\[([^]]*)\]\((?!https?:|#)([^)]*)\)", r"\1 (`\2`)", readme)


def packages() -> list[str]:
    """All packages, under the names that they are installed by."""
    commands = find_packages(include=["experiments", "experiments.*"])
    library = find_packages(include=["pilimit_lib*", "pilimit_orig*"])
    return library + [name.replace("experiments", COMMANDS, 1) for name in commands]


setup(
    packages=packages(),
    package_dir={COMMANDS: "experiments"},
    long_description=outside(Path("README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
)
