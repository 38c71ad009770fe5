"""Reading from file systems that fail for a moment, such as network file systems."""

import hashlib
import io
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np

from mhla_gen.errors import UserError
from mhla_gen.media.pictures import LastingError, UnreadableImageError, read_rgb

T = TypeVar("T")

# Seconds before each further attempt.
WAITS = (0.1, 1.0, 5.0)


class ReadFailedError(UserError):
    """A file that could not be read, so that nobody knows whether it is damaged."""


def read_patiently(read: Callable[[], bytes], name: str) -> bytes:
    """The bytes of a file, after some attempts.

    Args:
        read: Reads it.
        name: What messages call it.

    Raises:
        ReadFailedError: If no attempt succeeds.
        UnreadableImageError: If it is a link that leads nowhere.
    """
    for wait in (*WAITS, None):
        try:
            return read()
        except OSError as error:
            reason = error.strerror or str(error)
            if isinstance(error, FileNotFoundError) and os.path.islink(error.filename or ""):
                raise UnreadableImageError(f"cannot be read ({reason})") from error
            if wait is None:
                raise ReadFailedError(
                    f"{name} cannot be read ({reason}) after {len(WAITS) + 1} attempts; fix it "
                    "and run the same command again (training: with resume=latest), or remove it"
                ) from error
            time.sleep(wait)
    raise AssertionError


def read_rgb_patiently(read: Callable[[], bytes], name: str, size: int | None) -> np.ndarray:
    """Decode an image; one that seems damaged only if it comes twice as the same bytes.

    Args:
        read: Reads its file.
        name: What messages call it.
        size: As in `read_rgb`.

    Raises:
        ReadFailedError: If it cannot be read.
        UnreadableImageError: If it can, and is damaged.
    """
    content = read_patiently(read, name)
    try:
        return read_rgb(io.BytesIO(content), size)
    except UnreadableImageError:
        again = read_patiently(read, name)
        if again == content:
            raise
    return read_rgb(io.BytesIO(again), size)


def read_file_patiently(path: Path, size: int | None) -> np.ndarray:
    """`read_rgb_patiently` of a file."""
    return read_rgb_patiently(path.read_bytes, str(path), size)


def decode_patiently(decode: Callable[[], T], path: str | Path) -> T:
    """What a video shows; one seems damaged only if it comes twice as the same bytes.

    Decoders read files by themselves, and take bytes that do not come for damaged ones.

    Args:
        decode: Reads the video.
        path: Its file.

    Raises:
        ReadFailedError: If it cannot be read.
        UnreadableImageError: If it can, and is damaged or not to be used.
    """
    try:
        return decode()
    except LastingError:
        raise
    except UnreadableImageError:
        before = read_patiently(lambda: _digest(path), str(path))
    try:
        return decode()
    except UnreadableImageError:
        if read_patiently(lambda: _digest(path), str(path)) == before:
            raise
    return decode()


def _digest(path: str | Path) -> bytes:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
