"""Reading files that this package wrote, with errors that name truncated or changed ones."""

import json
import os
import pickle
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from mhla_gen.errors import UserError

# diffusers and transformers put the name of a variant before the number of a part.
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(\.\w+?)?(-\d+-of-\d+)?\.(safetensors|bin)"
)


NO_STATE = (
    *(pickle.UnpicklingError, RuntimeError, EOFError, LookupError, ValueError, TypeError),
    *(AttributeError, AssertionError, struct.error),
)
"""What `torch.load(weights_only=True)` raises for bytes that are no saved tensors, such as text."""


class DamagedFileError(UserError):
    """A file of ours that was truncated or changed; the message names it and what to do."""

    def __init__(self, path: str | Path, reason: str, remedy: str):
        super().__init__(f"{path} is damaged ({reason}); {remedy}")


def read_json(path: str | Path, remedy: str, kind: type = dict) -> Any:
    """Read JSON that this package wrote.

    Args:
        path: The file.
        remedy: What to do where it is damaged.
        kind: What it holds, dict or list.

    Raises:
        DamagedFileError: If it is none, or missing.
    """
    try:
        values = json.loads(Path(path).read_bytes())
    except FileNotFoundError as error:
        raise DamagedFileError(path, "it is missing", remedy) from error
    except ValueError as error:
        raise DamagedFileError(path, f"incomplete JSON: {error}", remedy) from error
    if not isinstance(values, kind):
        found = type(values).__name__
        raise DamagedFileError(path, f"expected a {kind.__name__}, found a {found}", remedy)
    return values


def require_utf8(name: str, path: str | Path) -> None:
    """Raise unless the name of a file or folder is UTF-8: safetensors opens no others.

    Args:
        name: What messages call it.
        path: The file or folder.

    Raises:
        UserError: If it is not.
    """
    try:
        os.path.abspath(path).encode()
    except UnicodeEncodeError as error:
        shown = os.fsencode(path).decode(errors="backslashreplace")
        raise UserError(
            f"{name} {shown} is not valid UTF-8, as files of models must be; rename it, or "
            "choose another one"
        ) from error


def sizes_below(folder: Path) -> dict[str, dict[str, Any]]:
    """Bytes of all files in a folder, by their path there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size} for path in files}


def require_whole(folder: Path, known: Mapping[str, Any], remedy: str) -> None:
    """Raise unless a folder still has the files that were written to it.

    Args:
        folder: The folder.
        known: What `sizes_below` said then.
        remedy: What to do where one is damaged.

    Raises:
        DamagedFileError: Naming one that is missing, or whose weights have another size.
    """
    found = sizes_below(folder)
    for name, fact in known.items():
        # Settings may have been edited.
        if name not in found or (name.endswith(".safetensors") and found[name] != fact):
            size = found.get(name, {}).get("bytes", 0)
            raise DamagedFileError(folder / name, f"{size} bytes of {fact['bytes']}", remedy)
        if (problem := problem_of_file(folder / name)) is not None:
            raise DamagedFileError(folder / name, problem, remedy)


def read_lines(path: str | Path) -> tuple[list[dict[str, Any]], int]:
    """The JSON objects of a log, one per line, and the number of damaged lines."""
    found, damaged = [], 0
    for line in Path(path).read_bytes().split(b"\n"):
        try:
            values = json.loads(line) if line.strip() else {}
        except ValueError:
            values = None
        if isinstance(values, dict):
            found += [values] if values else []
        else:
            damaged += 1
    return found, damaged


def read_array(path: str | Path, remedy: str, mapped: bool = False) -> np.ndarray:
    """Read an .npy file that this package wrote.

    Args:
        path: The file.
        remedy: What to do where it is damaged.
        mapped: Read rows when they are used.

    Raises:
        DamagedFileError: If it is none, or missing.
    """
    try:
        return np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
    except FileNotFoundError as error:
        raise DamagedFileError(path, "it is missing", remedy) from error
    except (ValueError, EOFError) as error:
        raise DamagedFileError(path, f"incomplete array: {error}", remedy) from error


@contextmanager
def naming_damage(place: str | Path) -> Iterator[None]:
    """Name the damaged file if it makes loading a model or pipeline fail.

    Args:
        place: What is loaded; names on the hub are ignored.

    Raises:
        DamagedFileError: In place of any error, if a safetensors or JSON file there is damaged.
        UserError: In place of errors of the system, such as a missing file.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        folder = Path(place)
        for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
            problem = problem_of_file(path)
            if problem is not None:
                remedy = "save, copy or download it again"
                raise DamagedFileError(path, problem, remedy) from error
        if variant := _only_variant(folder):
            name = variant.name.split(".")[1].split("-")[0]
            raise UserError(
                f"{variant.parent} has its weights only as a variant, {variant.name}; save them "
                f'once without it: from_pretrained(…, variant="{name}"), then '
                "save_pretrained(NEW FOLDER)"
            ) from error
        # diffusers' words for weights of other sizes than the settings have.
        misfit = isinstance(error, ValueError) and str(error).startswith("Cannot load")
        if (isinstance(error, OSError) or misfit) and folder.is_dir():
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            reason = reason.partition(". If you want")[0]
            raise UserError(f"{place} cannot be loaded: {reason}") from error
        raise


def _only_variant(folder: Path) -> Path | None:
    """A file of weights, such as model.fp16.safetensors, where a model has no others."""
    for config in sorted(folder.rglob("config.json")) if folder.is_dir() else ():
        matches = map(_WEIGHTS.fullmatch, sorted(p.name for p in config.parent.iterdir()))
        found = [match for match in matches if match]
        if found and all(match[1] for match in found):
            return config.with_name(found[0][0])
    return None


def problem_of_file(path: Path) -> str | None:
    """Why a file of a saved model cannot be read; None if it can be, or is of another kind."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "np"):
                pass
        elif path.suffix == ".json":
            json.loads(path.read_bytes())
    except (SafetensorError, ValueError, OSError) as error:
        return str(error)
    return None
