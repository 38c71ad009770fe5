"""One benchmark in several processes on one GPU: they compile side by side and time in turns."""

import fcntl
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from mhla_gen.files import write_json

_POLL_SECONDS = 0.5

Alone = Callable[[], AbstractContextManager[Any]]
"""What is entered while the GPU is worked on, so that no other process does."""


@contextmanager
def turns(lock: str | Path | None) -> Iterator[Alone]:
    """Within it, what a process enters to have the GPU alone.

    Processes have the lock together while they compile; one that wants it alone waits until all
    others wait, too, so that nothing runs beside what it times.

    Args:
        lock: A file that they share; None for a process that is alone anyway.
    """
    if lock is None:
        yield nullcontext
        return
    with open(lock, "a") as file:

        @contextmanager
        def alone() -> Iterator[None]:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(file, fcntl.LOCK_SH)

        fcntl.flock(file, fcntl.LOCK_SH)
        yield alone


def spread(script: str, arguments: Sequence[str], out: Path, processes: int) -> None:
    """Run a benchmark in several processes and join what they write.

    Each is started with `--processes 1 --part NUMBER PROCESSES OUTPUT LOCK` behind the arguments.

    Args:
        script: Path of the benchmark.
        arguments: Of its command line.
        out: Gets the rows of all, as they come, sorted by their `number`.
        processes: How many.

    Raises:
        SystemExit: If one of them failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        parts = [Path(folder, f"{number}.json") for number in range(processes)]
        running = []
        for number, part in enumerate(parts):
            own = ["--processes=1", "--part", number, processes, part, f"{folder}/lock"]
            command = [sys.executable, script, *arguments, *map(str, own)]
            running.append(subprocess.Popen(command))
        waiting = True
        while waiting:
            time.sleep(_POLL_SECONDS)
            waiting = any(process.poll() is None for process in running)
            found = [json.loads(part.read_text()) for part in parts if part.is_file()]
            if found:
                rows = sorted((row for each in found for row in each["rows"]), key=_number)
                write_json(out, {**found[0], "rows": rows}, indent=1)
        if any(process.returncode for process in running):
            raise SystemExit("a process failed; its error is above")


def _number(row: dict[str, Any]) -> int:
    return row["number"]
