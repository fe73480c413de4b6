"""How a command ends that can't go on: what is said, and the exit status. Imports no torch."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


@contextmanager
def errors_of(parser: argparse.ArgumentParser) -> Iterator[None]:
    """What a user can mend is said without a traceback: the exit status is 2 where it is the
    command line, 1 where the run failed, 130 after Ctrl-C.

    A reader of the output that has gone, such as `head`, ends the command without a word, as it
    ends others.
    """
    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        parser.exit(128 + signal.SIGINT, "interrupted; nothing has changed since the last save\n")
    except BrokenPipeError:
        # else Python tries once more to write what is left, and complains
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except FloatingPointError as error:
        _fail(parser, str(error))
    except (
        ValueError,
        OSError,
        ImportError,
        RuntimeError,
        MemoryError,
    ) as error:
        if _disk_is_full(error):
            _fail(
                parser,
                f"the disk is full ({error}); what was written before is whole: make room, and "
                "give the command again, with --resume where it has saved a checkpoint",
            )
        _fail(parser, str(error), 2)


def _fail(parser: argparse.ArgumentParser, message: str, status: int = 1) -> NoReturn:
    parser.exit(status, f"{parser.prog}: error: {message}\n")


def _disk_is_full(error: BaseException | None) -> bool:
    """Whether that is behind an error: torch makes another of it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False
