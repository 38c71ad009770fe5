"""Writing files whole or not at all, and errors that name them."""

import errno
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from mhla_gen.errors import UserError
from mhla_gen.files.claims import make_folder, require_claimed
from mhla_gen.files.temporary import in_use, partial_of, put

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike
    from PIL.Image import Image
    from torch import Tensor

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What torch.save and NumPy say of a full disk, without the system's error.
_UNSAID = re.compile(r"PytorchStreamWriter|inline_container|\d+ requested and \d+ written")
_IN_RUST = re.compile(r"(?:\bcode: |os error )(\d+)")


class WriteError(OSError, UserError):
    """A file that could not be written, with its name."""

    def __str__(self) -> str:
        return f"{self.filename} cannot be written ({self.strerror})"

    @property
    def is_full(self) -> bool:
        """Whether the disk is full."""
        return self.errno in _FULL


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Write a file or folder under a temporary name; rename it when all of it is on the disk.

    What was at `path` stays until then, and also if there is an error. A link stays, and what it
    leads to is replaced.

    Yields:
        Where to write: a path beside `path` that does not exist yet.

    Raises:
        WriteError: If it cannot be written, naming `path`.
        MissingError: If the output folder that it belongs to was removed meanwhile.
    """
    path = Path(path)
    place = Path(os.path.realpath(path)) if path.is_symlink() else path
    partial = partial_of(place)
    with errors_naming(path, partial):
        make_folder(place.parent)
        # Another process may write the same file at the same time; the last one to finish wins.
        with in_use(partial):
            yield partial
            put(partial, place)


def write_text(path: str | Path, text: str) -> None:
    """Write text as UTF-8, whole or not at all."""
    with written_whole(path) as partial:
        # Names of files that are no UTF-8 become escapes, which JSON reads back.
        partial.write_bytes(text.encode(errors="backslashreplace"))


def write_json(path: str | Path, values: Any, indent: int | None = 2) -> None:
    """Write JSON, whole or not at all."""
    write_text(path, json.dumps(values, indent=indent, ensure_ascii=False) + "\n")


def write_lines(path: str | Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON lines, whole or not at all."""
    with written_whole(path) as partial, partial.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def write_tensors(
    path: str | Path, tensors: "Mapping[str, Tensor]", metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file, whole or not at all; for tensors that fit into memory twice.

    safetensors' own `save_file` has a temporary file that a kill leaves behind.
    """
    # Not above: settings are read and written without torch.
    from safetensors.torch import save

    whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with written_whole(path) as partial:
        partial.write_bytes(save(whole, metadata))


def write_arrays(path: str | Path, arrays: "Mapping[str, ArrayLike]") -> None:
    """Write an uncompressed npz file, whole or not at all."""
    import numpy as np

    with written_whole(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]


def write_picture(path: str | Path, picture: "Image | Figure") -> None:
    """Write a picture or a figure as PNG, whole or not at all."""
    # Neither PIL nor matplotlib is loaded for its class.
    drawn: Any = picture
    with written_whole(path) as partial:
        if hasattr(drawn, "savefig"):
            drawn.savefig(partial, dpi=150, format="png")
        else:
            drawn.save(partial, format="png")


def append_line(path: str | Path, line: str) -> None:
    """Append a line to a log with a single write, so that lines of other processes stay whole."""
    rest = f"{line}\n".encode(errors="backslashreplace")
    require_claimed(Path(path))
    with errors_naming(Path(path)), Path(path).open("ab", buffering=0) as file:
        # A disk that fills up takes less than it is given.
        while rest:
            rest = rest[file.write(rest) :]


@contextmanager
def errors_naming(path: Path, partial: Path | None = None) -> Iterator[None]:
    """Make errors of writing name the file that the user knows.

    Args:
        path: The file or folder.
        partial: Its temporary name.

    Raises:
        WriteError: In place of errors of the system that name nothing, or `partial`.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        number = None if isinstance(error, WriteError) else _number_of(error, partial)
        if number is None:
            raise
        require_claimed(path)
        raise WriteError(number, os.strerror(number), str(path)) from error


def _number_of(error: Exception, partial: Path | None) -> int | None:
    """The system's number of an error of writing `partial`; None for any other."""
    if isinstance(error, OSError) and error.errno is not None:
        named = None if error.filename is None else Path(os.fsdecode(error.filename))
        ours = named is None or (partial is not None and named.is_relative_to(partial))
        return error.errno if ours else None
    code = _IN_RUST.search(str(error))
    if code is not None:
        return int(code[1])
    return errno.ENOSPC if _UNSAID.search(str(error)) else None
