"""Output folders: who wrote them, and whether this command may write to them."""

import os
import re
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mhla_gen.config import ConfigError, load_config
from mhla_gen.config.fields import path_settings
from mhla_gen.errors import NotWritableError, OccupiedError
from mhla_gen.files import is_temporary
from mhla_gen.files.saved import require_utf8

CONFIG_NAME = "config.yaml"
LOCK_NAME = ".lock"
WORK_NAME = ".work"
"""Folder inside an unfinished sample set, which may have some of its samples already."""

_DIGEST = re.compile(r"[0-9a-f]{32,64}")


def is_free(folder: Path) -> bool:
    """Whether a folder does not exist, or is empty except for leftovers of a killed command."""
    return not folder.exists() or (
        folder.is_dir()
        and all(path.name == LOCK_NAME or is_temporary(path) for path in folder.iterdir())
    )


def made_with(folder: str | Path, config: Any, ignore: Sequence[str] = ("output_dir",)) -> bool:
    """Whether a run with these settings wrote `folder`; False if it is free to use.

    Args:
        folder: Output folder. Ours contain the settings that made them.
        config: The settings asked for now.
        ignore: Settings that may differ.

    Raises:
        FileExistsError: If something else is there: other settings, named, or files not ours.
    """
    folder = Path(folder)
    require_utf8("output_dir", folder)
    remedy = "choose another output_dir or move it away"
    if folder.exists() and not folder.is_dir():
        raise OccupiedError(f"output_dir {folder} is a file; {remedy}")
    if is_free(folder):
        return False
    if not (folder / CONFIG_NAME).is_file():
        raise OccupiedError(
            f"output_dir {folder} has no {CONFIG_NAME}, but files that this command did not write; "
            f"{remedy}"
        )
    try:
        found = load_config(folder / CONFIG_NAME, schema=type(config))
    except ConfigError as error:
        message = f"output_dir {folder} was written by another command, or is damaged ({error})"
        raise OccupiedError(f"{message}; {remedy}") from None
    changes = differences(found, config, ignore)
    if changes:
        raise OccupiedError(
            f"output_dir {folder} was made with other settings ({'; '.join(changes)}); {remedy}"
        )
    return True


def check_output_file(setting: str, path: str | Path, is_ours: Callable[[Path], bool]) -> None:
    """Raise unless a file can be written that need not exist yet.

    Args:
        setting: What names it.
        path: The file.
        is_ours: Whether one that exists was written by this command, which then replaces it.

    Raises:
        FileExistsError: If something else is there.
        PermissionError: Naming what stands in the way.
    """
    path = Path(path)
    if path.is_dir():
        raise OccupiedError(f"{setting} {path} is a folder; name a file")
    check_writable(path.parent, setting)
    if path.exists() and not is_ours(path):
        raise OccupiedError(
            f"{setting} {path} was not written by this command, or is damaged; choose another "
            f"{setting} or move it away"
        )


def check_writable(folder: str | Path, setting: str = "output_dir") -> None:
    """Raise unless files can be written to an output folder, which need not exist yet.

    Args:
        folder: The folder.
        setting: What names it.

    Raises:
        PermissionError: Naming what stands in the way.
    """
    folder = Path(folder)
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if folder.is_symlink() and not folder.exists():
        raise NotWritableError(
            f"{setting} {folder} is a link to something that does not exist; choose another "
            f"{setting}"
        )
    if not parent.is_dir():
        raise NotWritableError(
            f"{setting} {folder} cannot be made: {parent} is a file; choose another {setting}"
        )
    try:
        # Rights alone do not tell: the superuser has them on a file system that takes no files.
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise NotWritableError(
            f"{setting} {folder} cannot be made: {parent} is not writable "
            f"({error.strerror or error}); choose another {setting}"
        ) from error


def check_replaceable(folder: str | Path) -> None:
    """Raise unless an output folder can take the place of one that is there.

    Raises:
        PermissionError: Naming what stands in the way.
    """
    # Through a link its target is replaced, not the link.
    place = Path(os.path.realpath(folder))
    if os.path.ismount(place):
        raise NotWritableError(
            f"output_dir {folder} is a mount point, which cannot be replaced; name a folder in it"
        )
    check_writable(place.parent)


def differences(found: Any, asked: Any, ignore: Sequence[str] = ()) -> list[str]:
    """The settings in which two configs differ, as `key: found X, asked for Y`.

    A path is the same under any spelling: `data`, `./data/` and its absolute path.
    """
    return differing_values(asdict(found), asdict(asked), ignore, path_settings(type(asked)))


def differing_values(
    found: dict[str, Any],
    asked: dict[str, Any],
    ignore: Sequence[str] = (),
    paths: Collection[str] = (),
) -> list[str]:
    """The values in which two nested mappings differ, as `key: found X, asked for Y`.

    Args:
        found: Nested values.
        asked: Nested values.
        ignore: Keys that may differ, with dots between levels.
        paths: Keys of paths.
    """
    old, new = dict(_flat(found)), dict(_flat(asked))
    return [
        f"{key}: found {_shown(old.get(key))}, asked for {_shown(new.get(key))}"
        for key in {**old, **new}
        if key not in ignore and not _equal(old.get(key), new.get(key), key in paths)
    ]


def _equal(one: Any, other: Any, are_paths: bool) -> bool:
    if are_paths and isinstance(one, str) and isinstance(other, str):
        return one == other or os.path.realpath(one) == os.path.realpath(other)
    if are_paths and isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(
            _equal(*pair, are_paths) for pair in zip(one, other, strict=True)
        )
    return one == other


def _shown(value: Any) -> Any:
    # Digests differ in their first digits, and nobody reads the rest.
    return value[:12] if isinstance(value, str) and _DIGEST.fullmatch(value) else value


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
