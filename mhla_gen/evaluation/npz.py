"""npz files: arrays read slice by slice, and statistics under ADM's names."""

import zipfile
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.lib import format as npy

from mhla_gen.errors import UserError, one_line
from mhla_gen.evaluation.errors import EvaluationError


def npz_keys(path: Path) -> frozenset[str]:
    """Names of the arrays in the file.

    Raises:
        EvaluationError: If it is missing, truncated or no npz file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return frozenset(name.removesuffix(".npy") for name in archive.namelist())
    except FileNotFoundError:
        raise EvaluationError(f"{path} does not exist") from None
    except Exception as error:
        # zipfile raises many things at bytes that are no archive.
        raise EvaluationError(
            f"{path} is truncated or not an npz file ({error}); write or copy it again"
        ) from error


def open_array(path: Path, key: str) -> np.ndarray:
    """One array of an npz file; a memory map where the file stores it uncompressed.

    Raises:
        EvaluationError: If the file or the array is missing or damaged, or holds Python objects.
    """
    keys = npz_keys(path)
    if key not in keys:
        raise EvaluationError(f"{path} has no array {key!r}; it has {', '.join(sorted(keys))}")
    try:
        return _mapped(path, key) if _is_stored(path, key) else _loaded(path, key)
    except Exception as error:
        # numpy parses a header as Python, and raises what that does.
        raise EvaluationError(
            f"{path}: array {key!r} cannot be read ({one_line(str(error), 200)})"
        ) from error


def _is_stored(path: Path, key: str) -> bool:
    with zipfile.ZipFile(path) as archive:
        return archive.getinfo(f"{key}.npy").compress_type == zipfile.ZIP_STORED


def _loaded(path: Path, key: str) -> np.ndarray:
    with np.load(path, allow_pickle=False) as archive:
        return archive[key]


def _mapped(path: Path, key: str) -> np.ndarray:
    # A stored member is the bytes of an npy file: after the zip's local header (30 bytes, then a
    # name and an extra field whose lengths stand at 26 and 28) comes the npy header, then the data.
    with zipfile.ZipFile(path) as archive:
        offset = archive.getinfo(f"{key}.npy").header_offset
    with path.open("rb") as file:
        file.seek(offset + 26)
        lengths = file.read(4)
        name, extra = int.from_bytes(lengths[:2], "little"), int.from_bytes(lengths[2:], "little")
        file.seek(offset + 30 + name + extra)
        shape, fortran, dtype = _npy_header(file)
        start = file.tell()
    if dtype.hasobject:
        raise UserError("it contains Python objects, which are never loaded")
    if 0 in shape:
        return np.zeros(shape, dtype)
    order = "F" if fortran else "C"
    return np.memmap(path, dtype, mode="r", offset=start, shape=shape, order=order)


def _npy_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = npy.read_magic(file)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    return read(file)
