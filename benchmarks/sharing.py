"""Benchmarks side by side on the GPUs of a host: they compile in parallel and time in turns."""

import fcntl
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rows import machine

from mhla_gen.files import write_json

_POLL_SECONDS = 0.5

Alone = Callable[[], AbstractContextManager[Any]]
"""Context in which a benchmark has its GPUs to itself."""


@contextmanager
def turns(*locks: str | Path) -> Iterator[Alone]:
    """Yield a context in which a benchmark has its GPUs to itself.

    Benchmarks share the locks of their GPUs while they compile. One that wants them exclusively
    waits until all others are waiting, too, so that nothing else runs while it times. Processes
    that train together enter and leave together: the first one waits for the locks, the others for
    it. If one of them leaves early, because it failed, the others get an error.

    Args:
        locks: A file for each GPU that this benchmark uses, in an order that is the same for all
            benchmarks; none for one that has the machine to itself.

    Raises:
        FailedElsewhereError: Where the context is entered or left.
    """
    if not locks:
        yield nullcontext
        return
    together = dist.is_initialized() and dist.get_world_size() > 1
    # Waits on the CPU: NCCL would wait on the GPU, which another benchmark may be using.
    group: Any = dist.new_group(backend="gloo") if together else None
    with ExitStack() as stack:
        first = not together or dist.get_rank() == 0
        files = [stack.enter_context(open(lock, "a", encoding="utf-8")) for lock in locks if first]

        def hold(how: int) -> None:
            # Whoever waits for a lock has none of a later GPU, so no two wait for each other.
            for file in files:
                fcntl.flock(file, fcntl.LOCK_UN)
            for file in files:
                fcntl.flock(file, how)
            _meet(group)

        @contextmanager
        def alone() -> Iterator[None]:
            hold(fcntl.LOCK_EX)
            yield
            _meet(group)
            hold(fcntl.LOCK_SH)

        try:
            hold(fcntl.LOCK_SH)
            yield alone
        finally:
            _leave(group)


class FailedElsewhereError(RuntimeError):
    """Another process, which this one was to meet, has failed."""


def _meet(group: Any) -> None:
    """Wait for all processes of a group, of which none may be leaving."""
    if group is not None and _leaving(group, 0):
        raise FailedElsewhereError("another process of this benchmark failed; its error is above")


def _leave(group: Any) -> None:
    """Wait until all processes of a group leave."""
    while group is not None and _leaving(group, 1) < dist.get_world_size(group):
        pass


def _leaving(group: Any, own: int) -> int:
    """How many processes of a group leave, once all have said whether they do."""
    count = torch.tensor(own, device="cpu")
    try:
        dist.all_reduce(count, group=group)
    except RuntimeError as error:
        raise FailedElsewhereError(
            f"another process of this benchmark ended: {str(error).splitlines()[0]}"
        ) from error
    return int(count)


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
            found = [json.loads(part.read_bytes()) for part in parts if part.is_file()]
            if found:
                rows = sorted((row for each in found for row in each["rows"]), key=_number)
                write_json(out, {**machine(), "rows": rows}, indent=1)
        if any(process.returncode for process in running):
            raise SystemExit("a process failed; its error is above")


def _number(row: dict[str, Any]) -> int:
    return row["number"]
