"""The parser of a command, whose errors are one sentence."""

import argparse


class CommandLine(argparse.ArgumentParser):
    """An argparse parser that says what is wrong without the list of all flags before it."""

    def error(self, message):
        """End with status 2."""
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")
