"""Files that are there whole or not at all, and errors that name them.

Everything that this package keeps is written here: under a temporary name, on the disk (`fsync`)
before it gets its own, so that neither a kill nor a power loss leaves half of it. Temporary names
tell who is writing: what a dead process left is removed, what a living one writes is not.
"""

import errno
import functools
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from mhla_gen.errors import MissingError, UserError

if TYPE_CHECKING:
    from torch import Tensor

# Names for a while: .NAME.MACHINE-PROCESS-RANDOM.partial, or .old for what is being replaced. The
# form without a machine is that of earlier versions.
_NAME = re.compile(
    r"\.(?P<name>.+)\.((?P<machine>[0-9a-f]{8})-)?(?P<process>\d+)(-[0-9a-f]{8})?"
    r"\.(?P<kind>partial|old)"
)
# What safetensors leaves beside a file that it was killed in.
_SAFETENSORS = re.compile(r"\.tmp[A-Za-z0-9]{6}")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What torch.save and NumPy say of a full disk, without the system's error.
_UNSAID = re.compile(r"PytorchStreamWriter|inline_container|\d+ requested and \d+ written")
_IN_RUST = re.compile(r"(?:\bcode: |os error )(\d+)")
# Output folders that this process writes to, and which folder each was when it began.
_claimed: dict[Path, tuple[int, int]] = {}
_writing: set[Path] = set()


class WriteError(OSError, UserError):
    """A file that could not be written, with its name."""

    def __str__(self) -> str:
        return f"{self.filename} cannot be written ({self.strerror})"

    @property
    def is_full(self) -> bool:
        """Whether there was no room for it."""
        return self.errno in _FULL


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Write a file or a folder under a temporary name; give it its name when all is on the disk.

    What was at `path` stays until then, and stays for good if an error comes in between.

    Yields:
        Where to write: a path beside `path` that does not exist yet.

    Raises:
        WriteError: If it cannot be written, naming `path`.
        MissingError: If the output folder that it belongs to was removed meanwhile.
    """
    path = Path(path)
    partial = partial_of(path)
    with errors_naming(path, partial):
        make_folder(path.parent)
        # Another process may write the same file at the same time; the last one to finish wins.
        _writing.add(partial)
        try:
            yield partial
            put(partial, path)
        finally:
            remove(partial)
            _writing.discard(partial)


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


def append_line(path: str | Path, line: str) -> None:
    """Add a line to a log, with one write, so that what others append meanwhile stays whole."""
    rest = f"{line}\n".encode(errors="backslashreplace")
    require_claimed(Path(path))
    with errors_naming(Path(path)), Path(path).open("ab", buffering=0) as file:
        # A disk that fills up takes less than it is given.
        while rest:
            rest = rest[file.write(rest) :]


def partial_of(path: Path) -> Path:
    """A name for a while beside `path`, which tells that this process gave it."""
    return _beside(path, "partial")


def put(partial: Path, path: Path) -> None:
    """Give a finished file or folder its name, once it is on the disk.

    A kill leaves what was at `path`, or the new; of a folder it may leave the old one under another
    name, which `remove_leftovers` gives back.
    """
    flush(partial)
    if partial.is_dir() and path.is_dir():
        # A folder cannot be renamed onto one that has files.
        old = _beside(path, "old")
        os.replace(path, old)
        try:
            os.replace(partial, path)
        except BaseException:
            os.replace(old, path)
            raise
        _sync(path.parent)
        remove(old)
    else:
        os.replace(partial, path)
        _sync(path.parent)


def flush(path: Path) -> None:
    """Wait until a file, or a folder with all that is in it, is on the disk."""
    if path.is_symlink():
        return
    if path.is_dir():
        for child in path.iterdir():
            flush(child)
    _sync(path)


def _sync(path: Path) -> None:
    if os.name != "posix" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems know no fsync of folders.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there; half a folder never keeps its name."""
    if path.is_dir() and not path.is_symlink():
        hidden = path
        if not _NAME.fullmatch(path.name) or path.name.endswith(".old"):
            hidden = partial_of(path)
            os.replace(path, hidden)
        shutil.rmtree(hidden, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def is_temporary(path: Path) -> bool:
    """Whether a file or a folder has one of our names for a while."""
    return _NAME.fullmatch(path.name) is not None or _SAFETENSORS.fullmatch(path.name) is not None


def remove_leftovers(folder: str | Path, alone: bool = False) -> None:
    """Remove what killed processes left half-written in a folder; give back what they set aside.

    Args:
        folder: Need not exist.
        alone: Whether nobody else writes to it: processes of other machines, too, are taken for
            dead then.
    """
    for path in list(Path(folder).glob(".*")):
        found = _NAME.fullmatch(path.name)
        if found is None:
            if alone and _SAFETENSORS.fullmatch(path.name) and path.is_file():
                path.unlink(missing_ok=True)
        elif _is_dead(path, found, alone):
            target = path.with_name(found["name"])
            with suppress(FileNotFoundError):
                if found["kind"] == "old" and not target.exists():
                    os.replace(path, target)
                else:
                    remove(path)


def _is_dead(path: Path, found: re.Match[str], alone: bool) -> bool:
    if path in _writing:
        return False
    if found["machine"] != _machine():
        return alone
    process = int(found["process"])
    return process == os.getpid() or not _is_alive(process)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@functools.cache
def _machine() -> str:
    """Where process numbers mean the same: this host since it started, in this container."""
    facts = [socket.gethostname()]
    with suppress(OSError):
        facts.append(Path("/proc/sys/kernel/random/boot_id").read_text())
        facts.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:8]


def _beside(path: Path, kind: str) -> Path:
    name = found["name"] if (found := _NAME.fullmatch(path.name)) else path.name
    who = f"{_machine()}-{os.getpid()}-{secrets.token_hex(4)}"
    return path.with_name(f".{name}.{who}.{kind}")


def claim(folder: Path) -> bool:
    """Take a folder as one that must not be removed while this process writes to it.

    Returns:
        False if this process had done so before.
    """
    folder = folder.absolute()
    if folder in _claimed:
        return False
    _claimed[folder] = _identity(folder)
    return True


def is_claimed(folder: Path) -> bool:
    """Whether this process has claimed a folder."""
    return folder.absolute() in _claimed


def release(folder: Path) -> None:
    """Undo `claim`."""
    _claimed.pop(folder.absolute(), None)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, but no output folder again that was removed meanwhile.

    Raises:
        MissingError: Naming an output folder that was removed, moved or replaced.
    """
    require_claimed(folder)
    root = _claimed_above(folder)
    if root is None:
        folder.mkdir(parents=True, exist_ok=True)
        return
    below = [path for path in (folder.absolute(), *folder.absolute().parents) if path != root]
    for path in reversed([path for path in below if path.is_relative_to(root)]):
        path.mkdir(exist_ok=True)


def require_claimed(path: Path) -> None:
    """Raise if the output folder that a path lies in is not the one any more that it was.

    Raises:
        MissingError: Naming it.
    """
    root = _claimed_above(path)
    if root is None:
        return
    try:
        same = _identity(root) == _claimed[root]
    except FileNotFoundError:
        same = False
    if not same:
        raise MissingError(
            f"{root} was removed, moved or replaced while this command wrote to it; nothing more "
            "is written; give the command again to begin anew"
        )


def _claimed_above(path: Path) -> Path | None:
    above = (path.absolute(), *path.absolute().parents)
    return next((folder for folder in above if folder in _claimed), None)


def _identity(folder: Path) -> tuple[int, int]:
    found = folder.stat()
    return found.st_dev, found.st_ino


@contextmanager
def errors_naming(path: Path, partial: Path | None = None) -> Iterator[None]:
    """Give errors of writing the name of the file that a user knows.

    Args:
        path: The file or folder.
        partial: Its name for a while.

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
