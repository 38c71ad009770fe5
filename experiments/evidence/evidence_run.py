"""Train, sample and score the runs of a plan of docs/evidence.md, one after another.

    python experiments/evidence/evidence_run.py DATA OUT [--plan PLAN.yaml] [key=value ...]

DATA is an npz file with `arr_0` and `labels` (emoji_dataset.py makes one), or a folder with one
sub-folder of images per class. OUT gets one JSON file and one picture for each run as soon as it is
done; finished runs are not repeated, and refused if they are of other settings. Any number of
processes may share one OUT, on one GPU or several (CUDA_VISIBLE_DEVICES): each takes the next free
run. On SIGTERM a run that trains writes a checkpoint into the folder --work, from which the same
command resumes; one that is being measured is measured first. evidence_launch.py starts several
processes for a limited time. Speeds are measured separately, by evidence_speed.py. key=value
changes the training settings of all runs; see base.yaml.
"""

import argparse
import shutil
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from evidence_data import claimed
from evidence_kinds import KINDS, tidy, train_new
from evidence_plan import PLAN, Plan, Run
from evidence_settings import require_settings, stated
from evidence_shop import Workshop

from mhla_gen.files import write_json
from mhla_gen.hub import PIPELINE_NAME
from mhla_gen.runtime.devices import device_name
from mhla_gen.training.stopping import Stopped
from mhla_gen.version import __version__

_WAIT_SECONDS = 2.0


def main(arguments: Sequence[str] | None = None) -> None:
    """Run everything in the plan that has no result yet."""
    options, plan = prepared(arguments)
    shop = Workshop(options, inspect=plan.tables == "mixing")
    for run in plan.runs:
        shop.config(run)  # a wrong one is found before anything is read or trained
    shop.work.mkdir(parents=True, exist_ok=True)
    failed = Worker(shop, plan.runs).work()
    if failed:
        raise SystemExit(f"no result for {', '.join(failed)}; the errors are above")


def prepared(arguments: Sequence[str] | None = None) -> tuple[argparse.Namespace, Plan]:
    """The options of the command line, and their plan, if the results that are there fit it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--plan", type=Path, default=PLAN)
    parser.add_argument("--work", type=Path, help="scratch folder; OUT/work by default")
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--sampling-steps", type=int, default=20)
    parser.add_argument("--clips", type=int, default=6144, help="clips to train on")
    parser.add_argument("--held-out-clips", type=int, default=256)
    parser.add_argument("--clip-samples", type=int, default=512)
    options = parser.parse_intermixed_args(arguments)
    plan = Plan(options.plan)
    samples = {"new": options.samples, "converted": options.samples, "clips": options.clip_samples}
    require_settings(options.out, plan.runs, options.overrides, samples)
    return options, plan


class Worker:
    """One of several processes that work on a plan.

    Args:
        shop: Settings, data and judges that all runs share.
        runs: The runs of the plan, the most informative first.
    """

    def __init__(self, shop: Workshop, runs: Sequence[Run]):
        self.shop, self.runs = shop, runs
        self.began = time.time()

    def work(self) -> list[str]:
        """Do free runs until none is left; returns the names of the runs that failed."""
        while (todo := self._todo()) and not self._stopped(todo):
            pass
        return [run.name for run in self.runs if self._failed(run.name)]

    def _todo(self) -> list[Run]:
        """Runs that can be done and lack a result, each after the run that it starts from."""
        lost = {run.name for run in self.runs if self._failed(run.name)}
        named = {run.name: run for run in self.runs}
        todo: dict[str, Run] = {}
        for run in self.runs:
            start = run.setting.start
            if self._result(run).is_file() or {run.name, start} & lost:
                continue
            if start is not None and not self._weights(named[start]).is_dir():
                todo[start] = named[start]
            todo[run.name] = run
        return list(todo.values())

    def _failed(self, name: str) -> bool:
        """Whether any process has failed at a run since this process began."""
        path = self._error(name)
        return path.is_file() and path.stat().st_mtime > self.began

    def _error(self, name: str) -> Path:
        return self.shop.work / f"{name}.error"

    def _result(self, run: Run) -> Path:
        return self.shop.out / f"{run.name}.json"

    def _weights(self, run: Run) -> Path:
        return self.shop.work / run.name / PIPELINE_NAME

    def _stopped(self, todo: Sequence[Run]) -> bool:
        """Do the first free run of these; returns whether to stop."""
        names = {run.name for run in todo}
        for run in todo:
            if run.setting.start in names:
                continue
            with claimed(self.shop.work / f"{run.name}.lock") as ours:
                if ours and run in self._todo():
                    return self._do(run)
        # Others have all runs; one may be stopped, or finish weights that other runs start from.
        time.sleep(_WAIT_SECONDS)
        return False

    def _do(self, run: Run) -> bool:
        began = time.perf_counter()
        try:
            if self._result(run).is_file():
                # Only the weights, from which other runs start, are missing.
                train_new(run, self.shop.config(run), self.shop)
            else:
                write_json(self._result(run), self._run(run))
        except Stopped as stopped:
            print(f"{run.name}: {stopped}", flush=True)
            return True
        except Exception:
            # One failing run must not stop the others.
            self._error(run.name).write_text(traceback.format_exc(), encoding="utf-8")
            traceback.print_exc()
        else:
            print(f"{run.name}: {time.perf_counter() - began:.1f} s", flush=True)
            self._tidy(run)
        finally:
            # Each run compiles its own code; after a few, torch.compile would stop compiling.
            torch.compiler.reset()
            tidy()
        return self.shop.stopped

    def _run(self, run: Run) -> dict[str, Any]:
        config = self.shop.config(run)
        facts = {
            "name": run.name,
            "arm": run.arm,
            "title": run.title,
            "setting": run.setting.name,
            "tokens": run.tokens,
            "seed": run.seed,
        }
        found = KINDS[run.setting.kind](run, config, self.shop)
        settings = {"config": stated(run, config), "machine": machine(self.shop.device)}
        return {**facts, **found, **settings}

    def _tidy(self, run: Run) -> None:
        """Remove what is no longer needed, but not weights that other runs start from."""
        if all(other.setting.start != run.name for other in self.runs):
            for folder in (run.name, f"{run.name}-layers"):
                shutil.rmtree(self.shop.work / folder, ignore_errors=True)
        (self.shop.work / f"{run.name}.points.json").unlink(missing_ok=True)


def machine(device: torch.device) -> dict[str, str]:
    """Hardware, software and date of a result."""
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "mhla_gen": __version__,
        "date": time.strftime("%Y-%m-%d"),
    }


if __name__ == "__main__":
    main()
