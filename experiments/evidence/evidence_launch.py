"""Run a plan of docs/evidence.md with several processes per GPU, for a limited time.

    python experiments/evidence/evidence_launch.py DATA OUT [--seconds 520] [--processes 4]
        [--plan PLAN.yaml] [--parts speed probe runs report] [key=value ...]

The parts are: `speed`, timings, each alone on its GPU; `probe`, on the CPU, beside the next part;
`runs`, all training runs, the most informative first; `report`, the tables. Existing results are
not computed again. After --seconds, a run that trains writes a checkpoint and stops, and one that
is being measured is measured first. The same command resumes from checkpoints, if OUT/work is kept:
some 120 MB a run, for weights, their averages and AdamW's moments. The output of the processes goes
to OUT/work/*.log.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from evidence_plan import PLAN, Plan
from evidence_run import prepared
from evidence_settings import require_speeds

_HERE = Path(__file__).parent
_BENCHMARKS = _HERE.parents[1] / "benchmarks"
# Time that a run needs to finish its current step, which may compile, and write its checkpoint, or
# to be measured.
_GRACE_SECONDS = 40.0
_PARTS = ("speed", "probe", "runs", "report")
_PROBES = 4
# Speeds are timed in turns, so more processes only compile side by side.
_SPEED_PROCESSES = 4


def main(arguments: Sequence[str] | None = None) -> None:
    """Start processes, wait for them, and report what is done."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--plan", type=Path, default=PLAN)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--processes", type=int, default=4, help="of each GPU")
    parser.add_argument("--parts", nargs="+", default=list(_PARTS))
    parser.add_argument("--options", default="", help="of evidence_run.py, such as '--samples 64'")
    options = parser.parse_intermixed_args(arguments)
    unknown = sorted(set(options.parts) - set(_PARTS))
    if unknown:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(_PARTS)}")
    given = [str(options.plan), *options.overrides, *options.options.split()]
    # Here, since what the processes say goes to a log.
    _, plan = prepared([str(options.data), str(options.out), "--plan", *given])
    require_speeds(options.out, plan.speed, options.overrides)
    launcher = Launcher(options, plan)
    signal.signal(signal.SIGTERM, lambda *_: launcher.stop())
    for part in options.parts:
        getattr(launcher, part)()
    launcher.wait()


class Launcher:
    """Processes that work on one plan.

    Args:
        options: Of the command line.
        plan: The plan.
    """

    def __init__(self, options: argparse.Namespace, plan: Plan):
        self.options, self.plan = options, plan
        self.out: Path = options.out
        self.work = options.out / "work"
        self.work.mkdir(parents=True, exist_ok=True)
        self.began = time.perf_counter()
        self.running: list[subprocess.Popen[bytes]] = []
        # Indices of the GPUs for child processes; empty for the CPU.
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        numbers = seen.split(",") if seen else map(str, range(torch.cuda.device_count()))
        self.gpus = list(numbers) or [""]

    @property
    def left(self) -> float:
        """Seconds until all processes should be told to stop."""
        return self.options.seconds - (time.perf_counter() - self.began)

    def speed(self) -> None:
        """Time all arms."""
        missing = [
            run for run in self.plan.speed if not (self.out / f"{run.speed_name}.json").is_file()
        ]
        each = min(_SPEED_PROCESSES, -(-len(missing) // len(self.gpus)))
        for number in range(each):
            for gpu in self.gpus:
                self._start("evidence_speed", f"speed-{gpu}-{number}", gpu, each, self._plan())
        self.wait()

    def probe(self) -> None:
        """Start the probe on the CPU, without waiting for it."""
        for number in range(_PROBES if self.plan.probe else 0):
            self._start("evidence_probe", f"probe-{number}", "", 4 * _PROBES, self.plan.probe)

    def runs(self) -> None:
        """Train and measure."""
        if self.left <= 0:
            return
        each = self.options.processes
        given = [*self._plan(), *self.options.options.split()]
        for number in range(each):
            for gpu in self.gpus:
                self._start("evidence_run", f"run-{gpu}-{number}", gpu, each, given)
        self.wait()
        missing = [r.name for r in self.plan.runs if not (self.out / f"{r.name}.json").is_file()]
        done = len(self.plan.runs) - len(missing)
        print(f"{done} of {len(self.plan.runs)} runs are done; missing: {' '.join(missing)}")
        for path in sorted(self.work.glob("*.error")):
            if path.stem in missing:
                said = path.read_text(encoding="utf-8").strip().splitlines()
                print(f"{path.stem}: {said[-1]}")

    def report(self) -> None:
        """Write and print the tables of what is there."""
        arguments = [str(self.out), "--plan", str(self.options.plan)]
        self._run("evidence_report", arguments)

    def _plan(self) -> list[str]:
        return ["--plan", str(self.options.plan), *self.options.overrides]

    def _run(self, script: str, arguments: Iterable[str]) -> None:
        command = [sys.executable, str(_HERE / f"{script}.py"), *arguments]
        subprocess.run(command, check=True, env=self._environment("", 1), timeout=600)

    def _start(
        self, script: str, name: str, gpu: str, on_each: int, arguments: Iterable[str]
    ) -> None:
        places = [str(self.options.data)] if script == "evidence_run" else []
        command = [sys.executable, str(_HERE / f"{script}.py"), *places, str(self.out), *arguments]
        with (self.work / f"{name}.log").open("a", encoding="utf-8") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, env=self._environment(gpu, on_each)
            )
        self.running.append(process)

    def _environment(self, gpu: str, on_each: int) -> dict[str, str]:
        """Environment of a process if `on_each` of them share a GPU."""
        cpus = len(os.sched_getaffinity(0))
        paths = [str(_BENCHMARKS), os.environ.get("PYTHONPATH", "")]
        threads = max(1, cpus // (2 * on_each * len(self.gpus)))
        return {
            **os.environ,
            "CUDA_VISIBLE_DEVICES": gpu,
            "OMP_NUM_THREADS": str(threads),
            "TORCHINDUCTOR_COMPILE_THREADS": str(max(1, min(4, threads))),
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        }

    def wait(self) -> None:
        """Wait for all processes; when the time is up, tell them to stop, and kill the rest."""
        if not self._all_end(self.left):
            self.stop()
            if not self._all_end(_GRACE_SECONDS):
                for process in self.running:
                    process.kill()
                    process.wait()
        self.running = []

    def _all_end(self, seconds: float) -> bool:
        """Whether all processes end within this time."""
        deadline = time.perf_counter() + min(seconds, 1e6)
        for process in self.running:
            try:
                process.wait(max(0.0, deadline - time.perf_counter()))
            except subprocess.TimeoutExpired:
                return False
        return True

    def stop(self) -> None:
        """Pass a request to stop on to all processes."""
        for process in self.running:
            process.terminate()
        self.options.seconds = 0.0


if __name__ == "__main__":
    main()
