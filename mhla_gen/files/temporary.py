"""Temporary names of files and folders that are not complete yet.

They say who is writing, so that leftovers of dead processes are removed, and only those.
"""

import errno
import functools
import hashlib
import os
import re
import secrets
import shutil
import socket
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# Names for a while: .NAME.MACHINE-PROCESS-RANDOM.partial, or .old for what is being replaced. The
# form without a machine is that of earlier versions.
_NAME = re.compile(
    r"\.(?P<name>.+)\.((?P<machine>[0-9a-f]{8})-)?(?P<process>\d+)(-[0-9a-f]{8})?"
    r"\.(?P<kind>partial|old)"
)
# What safetensors leaves beside a file that it was killed in.
_SAFETENSORS = re.compile(r"\.tmp[A-Za-z0-9]{6}")
_writing: set[Path] = set()


@contextmanager
def in_use(partial: Path) -> Iterator[None]:
    """Protect a name from `remove_leftovers` while this process writes it; then remove it."""
    _writing.add(partial)
    try:
        yield
    finally:
        remove(partial)
        _writing.discard(partial)


def partial_of(path: Path) -> Path:
    """A temporary name beside `path` that belongs to this process."""
    return _beside(path, "partial")


def put(partial: Path, path: Path) -> None:
    """Flush a finished file or folder to the disk and give it its final name.

    A kill leaves either the old or the new content at `path`. An old folder may be left under
    another name, which `remove_leftovers` restores.
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
    """Remove a file or folder, if it exists; half a folder never keeps its name."""
    if path.is_dir() and not path.is_symlink():
        hidden = path
        if not _NAME.fullmatch(path.name) or path.name.endswith(".old"):
            hidden = partial_of(path)
            os.replace(path, hidden)
        shutil.rmtree(hidden, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def is_temporary(path: Path) -> bool:
    """Whether a file or folder has one of our temporary names."""
    return _NAME.fullmatch(path.name) is not None or _SAFETENSORS.fullmatch(path.name) is not None


def remove_leftovers(folder: str | Path, alone: bool = False) -> None:
    """Remove unfinished files of killed processes from a folder; restore what they had set aside.

    Those of files that links in the folder lead to are removed, too.

    Args:
        folder: Need not exist.
        alone: Whether nobody else writes to it; then processes of other machines count as dead,
            too.
    """
    entries = _entries(Path(folder))
    for entry in entries:
        if entry.name.startswith("."):
            _remove_leftover(Path(entry), alone)
    # Through a link, a file is first written beside what the link leads to, where others are, too.
    linked: defaultdict[Path, set[str]] = defaultdict(set)
    for entry in entries:
        if entry.is_symlink():
            target = Path(os.path.realpath(entry))
            linked[target.parent].add(target.name)
    for place, names in linked.items():
        for entry in _entries(place):
            found = _NAME.fullmatch(entry.name)
            if found is not None and found["name"] in names:
                # What another user left there may not be ours to remove.
                with suppress(OSError):
                    _remove_leftover(Path(entry), alone=False)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with (
        suppress(FileNotFoundError, NotADirectoryError, PermissionError),
        os.scandir(folder) as found,
    ):
        return list(found)
    return []


def _remove_leftover(path: Path, alone: bool) -> None:
    """Remove, or restore, a file or folder if it is a leftover."""
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
    """This host since its last boot, and this container: where process ids are unique."""
    facts = [socket.gethostname()]
    with suppress(OSError):
        facts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8"))
        facts.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:8]


def _beside(path: Path, kind: str) -> Path:
    name = found["name"] if (found := _NAME.fullmatch(path.name)) else path.name
    who = f"{_machine()}-{os.getpid()}-{secrets.token_hex(4)}"
    return path.with_name(f".{name}.{who}.{kind}")
