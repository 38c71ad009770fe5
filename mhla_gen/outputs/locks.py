"""Locks of output folders: never two commands in one at the same time."""

import errno
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tqdm import tqdm

from mhla_gen import files
from mhla_gen.errors import UserError
from mhla_gen.outputs.folders import CONFIG_NAME, LOCK_NAME
from mhla_gen.runtime.processes import on_main
from mhla_gen.version import __version__

ERRORS_NAME = "errors.log"
# What locking says on file systems that have none.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class FolderInUseError(UserError):
    """An output folder that another command is writing to."""


@contextmanager
def claimed(folder: str | Path) -> Iterator[None]:
    """Lock an output folder: no other command, on any machine, writes to it meanwhile.

    All processes of a launch call this and share the lock, which ends with the main one, however
    that ends. Unfinished files of killed commands are removed, and so is the folder if it was made
    here and is empty at the end. An error that ends the work is logged in a run's errors.log, with
    its traceback.

    Raises:
        FolderInUseError: If another command has it, naming its host and process.
        OSError: If it cannot be written, or was removed meanwhile.
    """
    folder = Path(folder)
    lock = _Lock(folder)
    on_main(lock.take)
    mine = files.claim(folder)
    try:
        yield
    except Exception as error:
        note_failure(folder, error)
        raise
    finally:
        if mine:
            files.release(folder)
        lock.give_back()


def note_failure(folder: Path, error: Exception) -> None:
    """Append an error with its traceback to the log of a run; nothing where there is no run."""
    if not (folder / CONFIG_NAME).is_file():
        return
    words = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    where = f"process {os.getpid()} on {socket.gethostname()}, mhla_gen {__version__}"
    trace = "".join(traceback.format_exception(error))
    log = folder / ERRORS_NAME
    # The error itself matters more than a log that cannot be written.
    with suppress(OSError), log.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {where}: {words}\n{trace}\n")


class _Lock:
    """A lock of the operating system on a file, which says who has it."""

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / LOCK_NAME
        self._descriptor: int | None = None
        self._made: list[Path] = []

    def take(self) -> None:
        if files.is_claimed(self.folder):
            # By this process, which a lock of POSIX would not keep out.
            return
        above = (self.folder.absolute(), *self.folder.absolute().parents)
        self._made = [path for path in above if not path.exists()]
        with files.errors_naming(self.path, self.path):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = self._opened()
            words = [Path(sys.argv[0]).name, *sys.argv[1:]]
            owner = {
                "host": socket.gethostname(),
                "process": os.getpid(),
                "since": time.strftime("%Y-%m-%d %H:%M:%S"),
                "command": " ".join(words)[:200],
            }
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, f"{json.dumps(owner)}\n".encode(), 0)
        _tidy(self.folder)

    def _opened(self) -> int:
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                self._lock(descriptor)
                # Its last owner may have removed the file in between.
                if os.fstat(descriptor).st_ino == self.path.stat().st_ino:
                    return descriptor
            except FileNotFoundError:
                pass
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)

    def _lock(self, descriptor: int) -> None:
        try:
            import fcntl
        except ImportError:
            return
        try:
            # Of POSIX: children that outlive a killed command do not keep it, as they do flock's.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise FolderInUseError(self._taken(descriptor)) from error
            if error.errno not in _NO_LOCKS:
                raise
            tqdm.write(
                f"{self.folder} is on a file system without locks; run no other command in it",
                file=sys.stderr,
            )

    def _taken(self, descriptor: int) -> str:
        try:
            owner = json.loads(os.pread(descriptor, 4096, 0))
            who = (
                f"process {owner['process']} on {owner['host']} since {owner['since']}: "
                f"{owner['command']}"
            )
        except (ValueError, LookupError, TypeError):
            who = "unknown"
        return (
            f"another command is writing to {self.folder} ({who}); wait for it, stop it, or choose "
            "another output_dir"
        )

    def give_back(self) -> None:
        if self._descriptor is None:
            return
        with suppress(OSError):
            if os.fstat(self._descriptor).st_ino == self.path.stat().st_ino:
                self.path.unlink()
        os.close(self._descriptor)
        self._descriptor = None
        for path in self._made:
            try:
                path.rmdir()
            except OSError:
                break


def _tidy(folder: Path) -> None:
    """Remove leftovers below a folder, but from folders that have a lock of their own."""
    files.remove_leftovers(folder, alone=True)
    for path, names, _ in os.walk(folder):
        names[:] = [name for name in names if not (Path(path) / name / LOCK_NAME).exists()]
        for name in names:
            files.remove_leftovers(Path(path) / name, alone=True)
