"""What users are told."""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

_LONGEST = 60


class UserError(ValueError):
    """Something that the user can mend: one sentence, with what to do.

    The command line prints these as one line; every other exception keeps its traceback.
    """


class MissingError(UserError, FileNotFoundError):
    """A file or a folder that is not there."""


class OccupiedError(UserError, FileExistsError):
    """A place for output that holds something else."""


class NotWritableError(UserError, PermissionError):
    """A place for output that takes no files."""


class NotFiniteError(UserError):
    """A model gave NaN or infinity in place of a sample."""


@contextmanager
def not_worth_failing(what: str, kept: str) -> Iterator[None]:
    """Say that a picture could not be drawn, where work of hours would be lost with it.

    Args:
        what: The picture.
        kept: What goes on, or is there, without it.
    """
    try:
        yield
    except Exception as error:
        reason = one_line(f"{type(error).__name__}: {error}", 200)
        print(f"{what} could not be drawn ({reason}); {kept}", file=sys.stderr)
        if os.environ.get("MHLA_GEN_TRACEBACK") == "1":
            traceback.print_exc()


def one_line(text: str, most: int = _LONGEST) -> str:
    """A text that anyone may have written, so that a line or a picture can hold it."""
    words = " ".join(text.split())
    shown = "".join(c if c.isprintable() else "\ufffd" for c in words)
    return shown if len(shown) <= most else f"{shown[: most - 1]}…"
