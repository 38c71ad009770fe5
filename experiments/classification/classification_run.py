"""DeiT-T with every attention on 18 classes of emoji: held-out accuracy and throughput.

    python experiments/classification/classification_run.py DATA RESULT.json [--seconds 240]

DATA is an npz file with `arr_0` uint8 `[images, 64, 64, 3]` and `labels`, as
experiments/evidence/emoji_dataset.py makes one. The model is timm's DeiT-T with average pooling and
patches of 4 pixels, so 16 × 16 tokens, in 4 × 4 blocks. Every fourth image is held out; all arms
see the same images in the same order. Speeds are measured first, alone on the GPU; then models are
trained, several at a time: two seeds of the main arms, then the others. RESULT.json gets each
result as soon as it is done, and the same command resumes with the missing ones; other settings or
images need another file. Needs timm, and a GPU, except to try the script. classification_table.py
prints the table.
"""

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from classification_model import (
    SIDES,
    augmented,
    batches,
    converted,
    load,
    make_model,
    score,
    speed,
)
from classification_table import ARMS, table
from torch import Tensor, nn

from mhla_gen import LinformerConfig
from mhla_gen.files import write_json
from mhla_gen.files.digests import file_digest
from mhla_gen.outputs.folders import differing_values
from mhla_gen.runtime.devices import device_name
from mhla_gen.runtime.recorded_training import RecordedTraining
from mhla_gen.training.optim import build_optimizer

_began = time.time()
_last = 0.0


class Job(NamedTuple):
    """One training run."""

    arm: str
    seed: int
    data: str
    epochs: int
    batch: int
    depth: int
    limit: int
    deadline: float

    @property
    def name(self) -> str:
        """Name of the result."""
        return f"{self.arm}-s{self.seed}"


def train(job: Job) -> dict[str, Any] | None:
    """One run, from its initial weights to its score; None if there is no time left for it."""
    global _last
    began = time.time()
    if began + _last > job.deadline:
        return None
    # Forms that torch compiled for another arm count against its limit.
    torch.compiler.reset()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images, labels, held_out = load(job.data, job.limit, device)
    arm, classes = ARMS[job.arm], int(labels.max()) + 1
    model = converted(make_model(job.seed, classes, depth=job.depth), arm).to(device).train()
    optimizer = build_optimizer(model, 1e-3, 0.05)
    known, targets = images[~held_out], labels[~held_out]
    steps = job.epochs * (len(known) // job.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1e-3, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    generator = torch.Generator(device).manual_seed(job.seed)
    passes = forward_of(model, device)
    losses: list[Tensor] = []
    for index in batches(len(known), job.batch, job.epochs, device, job.seed):
        pixels = augmented(known[index], generator)
        # A recorded forward pass is that of the gradients that it finds.
        optimizer.zero_grad()
        loss = F.cross_entropy(passes(pixels), targets[index], label_smoothing=0.1)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
        if len(losses) in (1, steps):
            print(f"    {len(losses)} steps after {time.time() - began:.1f} s", flush=True)
    if isinstance(passes, RecordedTraining):
        passes.forget()
    # Linformer's matrices have columns for one number of tokens only.
    sides = SIDES[:1] if isinstance(arm.config, LinformerConfig) else SIDES
    scores = {
        str(side): score(model.eval(), images[held_out], labels[held_out], side) for side in sides
    }
    _last = time.time() - began
    return {
        "arm": job.arm,
        "seed": job.seed,
        "epochs": job.epochs,
        "batch": job.batch,
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_loss": float(torch.stack(losses[-len(losses) // job.epochs :]).mean()),
        "seconds": round(_last, 1),
        # One digit per held-out image: right or wrong.
        "right": scores,
    }


def forward_of(model: Any, device: str) -> Callable[[Tensor], Tensor]:
    """Pixels to logits, float32; compiled and recorded on a GPU."""

    def classify(pixels: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            return model(pixels).float()

    if device != "cuda":
        return classify
    for block in model.blocks:
        block.compile(fullgraph=True)
    # A small model takes longer to launch than to run.
    return RecordedTraining(model, classify)


def measure_speeds(
    options: argparse.Namespace, result: dict[str, Any], keep: Callable[[str, str, Any], None]
) -> list[str]:
    """Measure the arms without speeds, until their time is up; returns what failed."""
    failed = []
    for arm in options.arms:
        over = time.time() - _began > options.speed_seconds
        if arm not in result["speed"] and torch.cuda.is_available() and not over:
            try:
                keep("speed", arm, speed(ARMS[arm]))
            except Exception as error:
                # One failing arm must not stop the others.
                failed.append(f"speed of {arm}: {error!r}")
                print(failed[-1], flush=True)
    return failed


def train_missing(
    options: argparse.Namespace,
    settings: dict[str, int],
    result: dict[str, Any],
    keep: Callable[[str, str, Any], None],
    pool: Executor,
) -> list[str]:
    """Train what is missing, as far as the time allows; returns what failed."""
    deadline = _began + options.seconds
    jobs = [
        Job(arm, seed, options.data, **settings, deadline=deadline)
        for main in (True, False)
        for seed in (0, 1)
        for arm in options.arms
        if ARMS[arm].main == main
    ]
    jobs = [job for job in jobs if job.name not in result["runs"]]
    running, failed = {pool.submit(train, job): job for job in jobs}, []
    for future in as_completed(running):
        try:
            if (found := future.result()) is not None:
                keep("runs", running[future].name, found)
        except Exception as error:
            failed.append(f"{running[future].name}: {error!r}")
            print(failed[-1], flush=True)
    return failed


def workers(processes: int) -> Executor:
    """What trains several models at a time; a single process is this one."""
    if processes == 1:
        return ThreadPoolExecutor(1)
    # CUDA does not survive a fork.
    return ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"))


def machine() -> dict[str, str]:
    """Command, hardware, software and date of the results."""
    return {
        "command": " ".join(
            ["python", "experiments/classification/classification_run.py", *sys.argv[1:]]
        ),
        "device": device_name(),
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "timm": timm.__version__,
    }


def earlier(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The results so far, with these settings.

    Raises:
        SystemExit: If they are of other settings, another device or other versions.
    """
    if not path.exists():
        return {"settings": settings, "speed": {}, "runs": {}}
    found, here = json.loads(path.read_bytes()), machine()
    same = ("device", "torch", "timm")
    changes = differing_values(
        found["settings"] | {key: found.get(key) for key in same},
        settings | {key: here[key] for key in same},
    )
    if changes:
        raise SystemExit(
            f"{path} has results of other settings ({'; '.join(changes)}); choose another file"
        )
    return found


def main() -> None:
    """Compute missing results until the time is up."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("data")
    parser.add_argument("result", type=Path)
    parser.add_argument("--seconds", type=float, default=240, help="begin no run that ends later")
    parser.add_argument("--speed-seconds", type=float, default=45)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--depth", type=int, default=12, help="layers; for trying out")
    parser.add_argument("--limit", type=int, default=0, help="images; for trying out")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    options = parser.parse_args()
    settings = {name: getattr(options, name) for name in ("epochs", "batch", "depth", "limit")}
    result = earlier(options.result, settings | {"data": file_digest(options.data)})

    def keep(kind: str, name: str, found: Any) -> None:
        result[kind][name] = found
        result.update(machine())
        write_json(options.result, result, indent=1)
        print(f"{time.time() - _began:.0f} s: {kind} of {name}", flush=True)

    with workers(options.processes) as pool:
        # Processes take long to start; speeds are measured meanwhile.
        for _ in range(options.processes):
            pool.submit(time.time)
        failed = measure_speeds(options, result, keep)
        failed += train_missing(options, settings, result, keep, pool)
    missing = 2 * len(options.arms) - len(result["runs"])
    print(f"{time.time() - _began:.0f} s; {missing} runs are missing", flush=True)
    print(table(result))
    if failed:
        raise SystemExit("; ".join(failed))


if __name__ == "__main__":
    main()
