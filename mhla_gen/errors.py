"""Errors and messages for users."""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

_LONGEST = 60


class UserError(ValueError):
    """Something that the user can fix: one sentence that says what to do.

    The command line prints these as one line; every other exception keeps its traceback.
    """


class MissingError(UserError, FileNotFoundError):
    """A file or a folder that is not there."""


class OccupiedError(UserError, FileExistsError):
    """An output folder or file with other content."""


class NotWritableError(UserError, PermissionError):
    """An output folder that cannot be written to."""


class NotFiniteError(UserError):
    """A model returned NaN or infinity."""


@contextmanager
def not_worth_failing(what: str, kept: str) -> Iterator[None]:
    """Report that a picture could not be drawn, instead of failing and losing hours of work.

    Args:
        what: The picture.
        kept: What continues, or is complete, without it.
    """
    try:
        yield
    except Exception as error:
        reason = one_line(f"{type(error).__name__}: {error}", 200)
        print(f"{what} could not be drawn ({reason}); {kept}", file=sys.stderr)
        if os.environ.get("MHLA_GEN_TRACEBACK") == "1":
            traceback.print_exc()


def one_line(text: str, most: int = _LONGEST) -> str:
    """Any text, made safe to show in one line or in a picture."""
    words = " ".join(text.split())
    shown = "".join(c if c.isprintable() else "\ufffd" for c in words)
    return shown if len(shown) <= most else f"{shown[: most - 1]}…"


def shortened(message: str, most: int = 1200) -> str:
    """A message whose lines keep both ends: what is wrong, and what to do about it."""
    lines = message.split("\n")
    head, tail = 2 * most // 3, most // 3
    return "\n".join(x if len(x) <= most else f"{x[:head]} … {x[-tail:]}" for x in lines)
