"""Scaling of training, one shared sequence, samples and features to 1, 2, 4, 8 GPUs of a host.

    python benchmarks/scaling.py scaling.json
    python benchmarks/scaling.py dit.json --parts dit-ddp dit-fsdp --gpus 1 8

Runs the other benchmarks with one process per GPU, for softmax, MHLA and 5 % exact, and writes all
rows into one JSON after each run. `times` is the speed relative to one GPU in the same JSON (for
FSDP2, which needs two GPUs, relative to DDP on one), `share` the share of linear scaling. Prints
the table in Markdown. With --profile, rows of training also list their longest kernels.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rows import machine, markdown

from mhla_gen.files import write_json

HERE = Path(__file__).parent
ATTENTION = ("softmax", "mhla", "mhla exact=0.05")


def dit(parallelism: str) -> Callable[[argparse.Namespace, int, Path], list[str]]:
    """Training of DiT-XL/2 at 256 and 512 pixels."""

    def command(options: argparse.Namespace, gpus: int, out: Path) -> list[str]:
        how = parallelism if gpus > 1 else "ddp"
        arguments = ["train_speed.py", str(out), "--parallelism", how]
        arguments += ["--seconds", str(options.seconds), "--attention", *ATTENTION]
        if options.tiny:
            arguments += ["--models", "DiT-S/8", "--pixels", "256", "--num-layers", "1"]
            arguments += ["--batch-size", "2", "--compile", "none"]
        else:
            arguments += ["--models", "DiT-XL/2", "--pixels", "256", "512"]
        arguments += ["--no-cuda-graphs"] * options.no_cuda_graphs
        return arguments + ["--profile"] * options.profile

    return command


def wan(options: argparse.Namespace, gpus: int, out: Path) -> list[str]:
    """Training of Wan2.1-1.3B on clips of 81 frames of 480 × 832, one on each GPU."""
    arguments = ["wan_speed.py", str(out), "--seconds", str(options.seconds)]
    arguments += ["--attention", *ATTENTION]
    if options.tiny:
        arguments += ["--tiny", "--num-layers", "1", "--clip", "9", "64", "96"]
        arguments += ["--compile", "none"]
    return arguments + ["--profile"] * options.profile


def sequence(options: argparse.Namespace, gpus: int, out: Path) -> list[str]:
    """A denoising step and a training step of Wan2.1-1.3B with one shared 720p sequence.

    Without an exact half, which does not support shared sequences.
    """
    grid = "3x8x10" if options.tiny else "21x45x80"
    arguments = ["context_parallel.py", str(out), "--grids", grid, "--train", grid]
    if options.tiny:
        return [*arguments, "--layers", "1", "--methods", "mhla", "softmax, ulysses"]
    return [*arguments, "--compile", "--methods", "mhla", "softmax, ring", "softmax, ulysses"]


def work(
    name: str, count: int, *given: str
) -> Callable[[argparse.Namespace, int, Path], list[str]]:
    """Samples or features computed by all GPUs."""

    def command(options: argparse.Namespace, gpus: int, out: Path) -> list[str]:
        arguments = ["scaling_work.py", name, str(out), "--folder", str(options.folder), *given]
        if options.tiny:
            return [*arguments, "--tiny", "--count", "12", "--batch-size", "3"]
        return [*arguments, "--count", str(count)]

    return command


PARTS = {
    "dit-ddp": dit("ddp"),
    "dit-fsdp": dit("fsdp"),
    "wan": wan,
    "sequence": sequence,
    "samples-softmax": work("samples", 50_000, "--attention", "softmax"),
    "samples-mhla": work("samples", 50_000, "--attention", "mhla"),
    "samples-exact": work("samples", 50_000, "--attention", "mhla exact=0.05"),
    "features": work("features", 50_000),
}


def run(part: str, gpus: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one part on this many GPUs, or one row with the error."""
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary, "rows.json")
        script, *arguments = PARTS[part](options, gpus, out)
        start = [sys.executable]
        if gpus > 1 or part == "sequence":
            start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}"]
        environment = dict(os.environ)
        if not torch.cuda.is_available():
            environment |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        began = time.perf_counter()
        error = error_of([*start, str(HERE / script), *arguments], environment, options.limit)
        spent = round(time.perf_counter() - began, 1)
        rows = json.loads(out.read_text())["rows"] if out.is_file() else []
        rows += [] if error is None else [{"error": error}]
    return [{"part": part, "gpus": gpus, "run_seconds": spent, **row} for row in rows]


def error_of(command: Sequence[str], environment: dict[str, str], limit: float) -> str | None:
    """Run a command, for a limited time; returns why it failed, or None."""
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    hung = False
    try:
        _, said = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        # torchrun ends its processes then, which a killed torchrun would leave behind.
        hung = True
        process.terminate()
        _, said = process.communicate()
    if not hung and process.returncode == 0:
        return None
    lines = said.decode(errors="replace").splitlines()
    print("\n".join(lines)[-3000:], file=sys.stderr)
    if hung:
        return f"not done after {limit:g} s"
    errors = [line.strip() for line in lines if "Error" in line]
    return errors[-1] if errors else f"ended with {process.returncode}"


def speed(row: dict[str, Any]) -> float | None:
    """Images or clips per second; None for other rows."""
    return row.get("images_per_second")


def compared(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with `times` and `share`, if one GPU has been measured."""

    def kind(row: dict[str, Any]) -> tuple[Any, ...]:
        part = row["part"].replace("dit-fsdp", "dit-ddp")
        return part, row.get("model"), row.get("pixels"), row.get("attention")

    alone = {kind(row): speed(row) for row in rows if row["gpus"] == 1 and speed(row)}
    found = []
    for row in rows:
        times = row.get("speed_up")
        if speed(row) and kind(row) in alone:
            times = speed(row) / alone[kind(row)]  # type: ignore[operator]
        more = {} if times is None else {"times": round(times, 3)}
        if times is not None:
            more["share"] = round(times / row["gpus"], 4)
        found.append(row | more)
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows in Markdown."""
    header = ("part", "model", "attention", "GPUs", "images/s or s", "times", "share", "MFU")
    lines = []
    for row in rows:
        model = " ".join(str(row[name]) for name in ("model", "pixels") if name in row)
        value = speed(row) or row.get("shared_forward_s") or row.get("error", "")
        value = f"{value:.4g}" if isinstance(value, float) else str(value)
        mfu = f"{100 * row['mfu']:.1f} %" if "mfu" in row else ""
        share = f"{100 * row['share']:.0f} %" if "share" in row else ""
        attention = row.get("attention") or row.get("method", "")
        cells = [
            row["part"],
            model,
            attention,
            row["gpus"],
            value,
            row.get("times", ""),
            share,
            mfu,
        ]
        lines.append(list(map(str, cells)))
    return markdown(header, lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure each part with every number of GPUs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--gpus", nargs="+", type=int, help="by default 1, 2, 4, 8, if there are")
    parser.add_argument("--seconds", type=float, default=4.0, help="measured time of a row")
    parser.add_argument(
        "--limit", type=float, default=900, help="seconds after which a run is ended"
    )
    parser.add_argument("--no-cuda-graphs", action="store_true", help="launch every kernel")
    parser.add_argument("--folder", type=Path, help="for data that parts make and share")
    parser.add_argument("--profile", action="store_true", help="longest kernels of training")
    parser.add_argument("--tiny", action="store_true", help="small models, to try the script")
    options = parser.parse_args(arguments)
    there = torch.cuda.device_count() or 2
    counts = options.gpus or [n for n in (1, 2, 4, 8) if n <= there]
    with tempfile.TemporaryDirectory() as temporary:
        options.folder = options.folder or Path(temporary)
        rows: list[dict[str, Any]] = []
        for part in options.parts:
            # The shared sequence is also measured with one process alone, in the same run.
            covered = part == "dit-fsdp" and "dit-ddp" in options.parts
            least = 2 if part == "sequence" or covered else 1
            for gpus in counts:
                if gpus >= least:
                    rows += run(part, gpus, options)
                    write_json(options.out, {**machine(), "rows": compared(rows)}, indent=1)
    print(table(compared(rows)))


if __name__ == "__main__":
    main()
