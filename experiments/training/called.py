"""How a command is spelled: by its module, or as `pilimit <name>` after installation. Imports no
torch."""

from __future__ import annotations

import sys
from pathlib import Path

# what stands behind `pilimit <name>`; a folder: its modules by their names
COMMANDS = {
    "train": "cifar10.cifar10mlp",
    "conv": "cifar10.cifar10conv",
    "maml": "meta.train",
    "maml-test": "meta.test",
    "transfer": "imagenet.transfer_imagenet",
    "test": "cifar10.cifar10test",
    "plot": "plots",
    "bench": "bench",
    "doctor": "doctor",
}


def called(command: str) -> str:
    """What to type for the module `command` of this package: as the process was started."""
    if Path(sys.argv[0]).stem == "pilimit":
        for name, module in COMMANDS.items():
            if command == module:
                return f"pilimit {name}"
            if command.startswith(f"{module}."):
                return f"pilimit {name} {command[len(module) + 1 :]}"
    return f"python -m {__name__.split('.')[0]}.{command}"
