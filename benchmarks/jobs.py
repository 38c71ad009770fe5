"""Benchmarks as processes that share the GPUs of a host, as many at a time as there is room for.

They compile side by side and time in turns (`sharing.turns`), with a lock for each GPU. On a GPU,
jobs begin together: one that began later would compile while those that are ready wait for it.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rows import Row

HERE = Path(__file__).parent
_POLL_SECONDS = 0.2
# Time in which torchrun ends its processes.
_GRACE_SECONDS = 40
# Beside compilation a benchmark has a thread or two for each of its processes.
_CORES_PER_JOB = 3
# Between the first and the last job that begin together; they import for longer.
_TOGETHER_SECONDS = 15
HUNG = "did not end in time"
"""The error of a job that was ended."""


@dataclass(frozen=True)
class Job:
    """A benchmark with one process for each of its GPUs."""

    name: str
    """Of its log."""
    script: str
    """In this folder; takes the file for its rows, then `arguments`, then `--locks`."""
    arguments: tuple[str, ...]
    gpus: int
    gib: float
    """Memory that it takes of each of its GPUs, at most."""
    grouped: bool = False
    """Whether it needs a process group on one GPU, too."""
    variables: tuple[str, ...] = ()
    """`NAME=VALUE`, of its environment."""
    patience: float = 1.0
    """Times the limit of other jobs after which it is ended."""


class Host:
    """The GPUs of this host, or on a host without any, places for processes on its CPUs.

    Args:
        count: GPUs.
        gib: Memory of each.
        most: Jobs at a time.
    """

    def __init__(self, count: int, gib: float, most: int):
        self._free, self._room = [gib] * count, most
        # When each of the jobs of a GPU began.
        self._began: list[list[float]] = [[] for _ in range(count)]

    @classmethod
    def here(cls, count: int) -> "Host":
        """This host, of whose GPUs `count` are used."""
        gib = 1000.0
        if torch.cuda.is_available():
            # Contexts and NCCL take some of it.
            gib = torch.cuda.get_device_properties(0).total_memory / 2**30 - 8
        return cls(count, gib, max(1, (os.cpu_count() or 1) // _CORES_PER_JOB))

    def take(self, job: Job) -> list[int] | None:
        """GPUs for a job, those with most memory left; None if there is no room at present.

        A job that is larger than a GPU gets one that has no other, and may find out.
        """
        now = time.perf_counter()
        late = [any(now - began > _TOGETHER_SECONDS for began in each) for each in self._began]
        order = sorted(range(len(late)), key=lambda gpu: (late[gpu], -self._free[gpu]))
        chosen = sorted(order[: job.gpus])
        full = not self._room or any(late[gpu] or self._free[gpu] < job.gib for gpu in chosen)
        if full and any(self._began):
            return None
        self._room -= 1
        for gpu in chosen:
            self._free[gpu] -= job.gib
            self._began[gpu].append(now)
        return chosen

    def give_back(self, job: Job, gpus: Sequence[int]) -> None:
        """Free what `take` gave."""
        self._room += 1
        for gpu in gpus:
            self._free[gpu] += job.gib
            # Whichever it was: those of a GPU began together.
            self._began[gpu].pop()


class _Running:
    """A job that has been started."""

    def __init__(self, job: Job, gpus: Sequence[int], folder: Path, limit: float):
        self.job, self.gpus = job, gpus
        self._out, self._log = folder / f"{job.name}.json", folder / f"{job.name}.txt"
        start = [sys.executable]
        if job.gpus > 1 or job.grouped:
            start += ["-m", "torch.distributed.run", "--standalone"]
            start += [f"--nproc-per-node={job.gpus}"]
        locks = [str(folder / f"gpu-{gpu}.lock") for gpu in gpus]
        command = [*start, str(HERE / job.script), str(self._out), *job.arguments]
        # All processes are on this host, whose name may lead nowhere.
        environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
        # This process may see some of the host's GPUs only.
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        names = [seen[gpu] if seen[0] else str(gpu) for gpu in gpus]
        environment |= {"CUDA_VISIBLE_DEVICES": ",".join(names)}
        environment |= dict(variable.split("=", 1) for variable in job.variables)
        if not torch.cuda.is_available():
            environment |= {"ACCELERATE_USE_CPU": "true"}
        # Of an earlier job of this name: this one may fail before it writes.
        self._out.unlink(missing_ok=True)
        self._began, self._limit, self._hung = time.perf_counter(), limit, False
        with self._log.open("w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [*command, "--locks", *locks], env=environment, stdout=log, stderr=log
            )

    def has_ended(self) -> bool:
        """Whether it has; one that takes too long is told to end."""
        if time.perf_counter() - self._began > self._limit:
            self.stop()
        return self._process.poll() is not None

    def stop(self) -> None:
        """Tell it to end, and kill it if it does not."""
        if self._process.poll() is not None:
            return
        if not self._hung:
            # torchrun ends its processes then, which a killed torchrun would leave behind.
            self._process.terminate()
            self._hung, self._limit = True, time.perf_counter() - self._began + _GRACE_SECONDS
        elif time.perf_counter() - self._began > self._limit:
            self._process.kill()

    def rows(self) -> list[Row]:
        """What it has measured, and why it failed."""
        spent = round(time.perf_counter() - self._began, 1)
        found = json.loads(self._out.read_bytes())["rows"] if self._out.is_file() else []
        if error := self._error():
            found.append({"error": error})
        return [{"run_seconds": spent, **row} for row in found]

    def _error(self) -> str | None:
        if self._hung:
            return HUNG
        if self._process.returncode == 0:
            return None
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        # torchrun's own comes last, and says less.
        errors = [x.strip() for x in lines if "Error: " in x and "ChildFailedError" not in x]
        return errors[-1] if errors else f"ended with {self._process.returncode}"


def run_jobs(
    jobs: Iterable[Job],
    host: Host,
    folder: Path,
    seconds: float,
    limit: float,
    found: Callable[[Job, list[Row]], None],
) -> None:
    """Run jobs, in their order as soon as there is room for the next one.

    Args:
        jobs: Those that come first are started first; asked for when there may be room for one.
        host: Where they run.
        folder: Gets what each job prints, as `NAME.txt`.
        seconds: After which no job begins, and those that run are ended.
        limit: Seconds after which a job is ended.
        found: Called with the rows of each job when it has ended.
    """
    stop = time.perf_counter() + seconds
    waiting, running = iter(jobs), list[_Running]()
    following = next(waiting, None)
    try:
        while following or running:
            while following and (gpus := host.take(following)):
                running.append(_Running(following, gpus, folder, limit * following.patience))
                following = next(waiting, None)
            time.sleep(_POLL_SECONDS)
            if time.perf_counter() > stop:
                following = None
                for each in running:
                    each.stop()
            for each in [each for each in running if each.has_ended()]:
                running.remove(each)
                host.give_back(each.job, each.gpus)
                found(each.job, each.rows())
    finally:
        for each in running:
            each.stop()
