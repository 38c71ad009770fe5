"""The cache of extracted features: its size, and what is removed if it is too large."""

import re
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from mhla_gen.files import remove

SETTINGS_NAME = "settings.json"
# Sets of this folder carry a hash for a name; other things in it are not ours to remove.
_SET_NAME = re.compile(r"[0-9a-f]{32}")
# Somebody may be reading a set that was opened since then.
_IN_USE_SECONDS = 24 * 3600
_GB = 1e9


class CachedSet(NamedTuple):
    """The features of one source."""

    opened: float
    """When they were last asked for, in seconds since the epoch."""
    size: int
    """Bytes on disk."""
    folder: Path


def cached_sets(cache_dir: Path) -> list[CachedSet]:
    """The sets of a folder of features, the least recently used first."""
    found: list[CachedSet] = []
    for folder in cache_dir.iterdir() if cache_dir.is_dir() else ():
        if not _SET_NAME.fullmatch(folder.name):
            continue
        # Another process may be removing it.
        with suppress(FileNotFoundError):
            opened = (folder / SETTINGS_NAME).stat().st_mtime
            size = sum(file.stat().st_size for file in folder.iterdir())
            found.append(CachedSet(opened, size, folder))
    return sorted(found)


def limit_cache(cache_dir: Path, limit_gb: float) -> None:
    """Remove the least recently used sets until the others are within the limit.

    Sets that were asked for within a day stay, whatever their size: a command may be reading them.

    Args:
        cache_dir: Folder of features.
        limit_gb: In units of 10^9 bytes.
    """
    sets = cached_sets(cache_dir)
    total, newest = sum(each.size for each in sets), time.time() - _IN_USE_SECONDS
    for each in sets:
        if total <= limit_gb * _GB or each.opened > newest:
            return
        with suppress(FileNotFoundError):
            remove(each.folder)
        total -= each.size
