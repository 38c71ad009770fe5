"""One benchmark in several processes on one GPU: they compile in parallel and time in turns."""

import fcntl
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from rows import machine

from mhla_gen.files import write_json

_POLL_SECONDS = 0.5

Alone = Callable[[], AbstractContextManager[Any]]
"""Context in which a process has the GPU to itself."""


@contextmanager
def turns(lock: str | Path | None) -> Iterator[Alone]:
    """Yield a context in which a process has the GPU to itself.

    Processes share the lock while they compile. A process that wants it exclusively waits until all
    others are waiting, too, so that nothing else runs while it times.

    Args:
        lock: A file shared by the processes; None for a single process.
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
    """Run a benchmark in several processes and join their results.

    Each is started with `--processes 1 --part NUMBER PROCESSES OUTPUT LOCK` after the arguments.

    Args:
        script: Path of the benchmark.
        arguments: Its command-line arguments.
        out: File for the rows of all processes, written as they arrive, sorted by `number`.
        processes: Number of processes.

    Raises:
        SystemExit: If one of them failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        parts = [Path(folder, f"{number}.json") for number in range(processes)]
        running = []
        threads = str(max(1, len(os.sched_getaffinity(0)) // processes))
        environment = {"TORCHINDUCTOR_COMPILE_THREADS": threads, **os.environ}
        for number, part in enumerate(parts):
            own = ["--processes=1", "--part", number, processes, part, f"{folder}/lock"]
            command = [sys.executable, script, *arguments, *map(str, own)]
            running.append(subprocess.Popen(command, env=environment))
        waiting = True
        while waiting:
            time.sleep(_POLL_SECONDS)
            waiting = any(process.poll() is None for process in running)
            found = [json.loads(part.read_text()) for part in parts if part.is_file()]
            if found:
                rows = sorted((row for each in found for row in each["rows"]), key=_number)
                write_json(out, {**machine(), "rows": rows}, indent=1)
        if any(process.returncode for process in running):
            raise SystemExit("a process failed; its error is above")


def _number(row: dict[str, Any]) -> int:
    return row["number"]
