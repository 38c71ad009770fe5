"""Output folders: written whole or not at all, and never over somebody else's files."""

import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mhla_gen.config import ConfigError, load_config

CONFIG_NAME = "config.yaml"
# Names that `written_whole` gives for a while.
_PARTIAL = re.compile(r"\..+\.\d+(-[0-9a-f]{8})?\.(partial|old)")

_DIGEST = re.compile(r"[0-9a-f]{32,64}")


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Write a file or a folder under a temporary name; give it its name when all is written.

    What was at `path` stays until then, and stays for good if an error comes in between.

    Yields:
        Where to write: a path beside `path` that does not exist yet.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Another process may write the same file at the same time; the last one to finish wins.
    unique = f"{os.getpid()}-{secrets.token_hex(4)}"
    partial = path.with_name(f".{path.name}.{unique}.partial")
    try:
        yield partial
        if partial.is_dir() and path.is_dir():
            # A folder cannot be renamed onto one that has files.
            old = path.with_name(f".{path.name}.{unique}.old")
            os.replace(path, old)
            os.replace(partial, path)
            _remove(old)
        else:
            os.replace(partial, path)
    finally:
        _remove(partial)


def remove_partials(folder: str | Path) -> None:
    """Remove what `written_whole` left in a folder when it was killed.

    Only where nothing writes to the folder meanwhile.
    """
    for path in list(Path(folder).glob(".*")):
        if _PARTIAL.fullmatch(path.name):
            _remove(path)


def made_with(folder: str | Path, config: Any, ignore: Sequence[str] = ("output_dir",)) -> bool:
    """Whether a run with these settings wrote `folder`; False if it is free to use.

    Args:
        folder: Output folder. Those of ours hold the settings that made them.
        config: The settings asked for now.
        ignore: Settings that may differ.

    Raises:
        FileExistsError: If something else is there: other settings, named, or files not ours.
    """
    folder = Path(folder)
    remedy = "choose another output_dir or move it away"
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"output_dir {folder} is a file; {remedy}")
    if not folder.is_dir() or not any(folder.iterdir()):
        return False
    try:
        found = load_config(folder / CONFIG_NAME, schema=type(config))
    except ConfigError:
        message = f"output_dir {folder} has files that this command did not write; {remedy}"
        raise FileExistsError(message) from None
    changes = differences(found, config, ignore)
    if changes:
        raise FileExistsError(
            f"output_dir {folder} was made with other settings ({'; '.join(changes)}); {remedy}"
        )
    return True


def check_writable(folder: str | Path) -> None:
    """Raise unless files can be written to an output folder, which need not exist yet.

    Raises:
        PermissionError: Naming what stands in the way.
    """
    folder = Path(folder)
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        # Rights alone do not tell: the superuser has them on a file system that takes no files.
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise PermissionError(
            f"output_dir {folder} cannot be made: {parent} is not writable "
            f"({error.strerror or error}); choose another output_dir"
        ) from error


def differences(found: Any, asked: Any, ignore: Sequence[str] = ()) -> list[str]:
    """The settings in which two configs differ, as `key: found X, asked for Y`."""
    return differing_values(asdict(found), asdict(asked), ignore)


def differing_values(
    found: dict[str, Any], asked: dict[str, Any], ignore: Sequence[str] = ()
) -> list[str]:
    """The values in which two nested mappings differ, as `key: found X, asked for Y`."""
    old, new = dict(_flat(found)), dict(_flat(asked))
    return [
        f"{key}: found {_shown(old.get(key))}, asked for {_shown(new.get(key))}"
        for key in {**old, **new}
        if key not in ignore and old.get(key) != new.get(key)
    ]


def _shown(value: Any) -> Any:
    # Digests differ in their first digits, and nobody reads the rest.
    return value[:12] if isinstance(value, str) and _DIGEST.fullmatch(value) else value


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
