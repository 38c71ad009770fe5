"""Scaling of training, one shared sequence, samples and features to 1, 2, 4, 8 GPUs of a host.

    python benchmarks/scaling.py scaling.json --profile
    python benchmarks/scaling.py dit.json --parts dit-ddp dit-fsdp --gpus 1 8
    python benchmarks/scaling.py scaling.json --table

Runs the other benchmarks with one process per GPU, for softmax, MHLA and 5 % exact, those first
that say most. As many as fit on the GPUs compile side by side; they time in turns. Each row is
written when it is done, and the same command adds those that are missing. `times` is the speed
relative to one GPU in the same JSON (for FSDP2, which needs two GPUs, relative to DDP on one),
`share` the share of linear scaling. Prints a table in Markdown.
"""

import argparse
import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jobs import HUNG, Host, Job, run_jobs
from rows import Row, earlier_rows, machine, markdown, number

from mhla_gen.files import write_json

SOFTMAX, MHLA, EXACT = "softmax", "mhla", "mhla exact=0.05"


@dataclass(frozen=True)
class Case:
    """What a row measures, on any number of GPUs."""

    part: str
    attention: str = ""
    pixels: int | None = None
    variable: str = ""
    """`NAME=VALUE` in the environment, of a case that is compared with the one without."""

    @property
    def facts(self) -> dict[str, Any]:
        """What tells its rows from all others, but for the number of GPUs."""
        return {name: value for name, value in asdict(self).items() if value}

    @property
    def name(self) -> str:
        """For a table, in which the kind of attention has its own column."""
        return (
            TITLES[self.part].format(pixels=self.pixels)
            + ", " * bool(self.variable)
            + self.variable
        )

    def job(self, gpus: int, options: argparse.Namespace) -> Job:
        """The benchmark that measures it."""
        script, arguments, gib = PARTS[self.part](self, gpus, options)
        name = re.sub("[^A-Za-z0-9.]+", "-", f"{self.part} {self.variable} {self.attention}")
        return Job(
            f"{name}-{self.pixels}-{gpus}",
            script,
            tuple(arguments),
            gpus,
            gib,
            grouped=self.part == "sequence",
            variables=tuple(filter(None, [self.variable])),
            # It compiles two models, each for two kinds of steps.
            patience=2.0 if self.part == "sequence" else 1.0,
        )


def dit(case: Case, gpus: int, options: argparse.Namespace) -> tuple[str, list[str], float]:
    """Training of DiT-XL/2."""
    how = "fsdp" if case.part == "dit-fsdp" and gpus > 1 else "ddp"
    arguments = ["--parallelism", how, *_timing(options), "--attention", case.attention]
    arguments += ["--pixels", str(case.pixels), *["--no-cuda-graphs"] * options.no_cuda_graphs]
    small = ["--models", "DiT-S/8", "--num-layers", "1", "--batch-size", "2", "--compile", "none"]
    arguments += small if options.tiny else ["--models", "DiT-XL/2"]
    return "train_speed.py", arguments, 30 if how == "fsdp" else 34


def wan(case: Case, gpus: int, options: argparse.Namespace) -> tuple[str, list[str], float]:
    """Training of Wan2.1-1.3B on clips of 81 frames of 480 × 832, one on each GPU."""
    arguments = [*_timing(options), "--attention", case.attention]
    small = ["--tiny", "--num-layers", "1", "--clip", "9", "64", "96", "--compile", "none"]
    return "wan_speed.py", arguments + small * options.tiny, 48


def sequence(case: Case, gpus: int, options: argparse.Namespace) -> tuple[str, list[str], float]:
    """A denoising step and a training step of Wan2.1-1.3B with one shared 720p sequence.

    Also measured with one process alone, in the same run. Without an exact half, which does not
    support shared sequences.
    """
    grid = "3x8x10" if options.tiny else "21x45x80"
    arguments = ["--grids", grid, "--train", grid, "--methods", case.attention]
    return (
        "context_parallel.py",
        arguments + (["--layers=1"] if options.tiny else ["--compile"]),
        45,
    )


def work(case: Case, gpus: int, options: argparse.Namespace) -> tuple[str, list[str], float]:
    """Samples or features computed by all GPUs."""
    count = (
        ["--tiny", "--count=12", "--batch-size=3"] if options.tiny else [f"--count={options.count}"]
    )
    arguments = [case.part, "--folder", str(options.folder), *count]
    arguments += ["--attention", case.attention] if case.attention else []
    return "scaling_work.py", arguments, 12


def _timing(options: argparse.Namespace) -> list[str]:
    return ["--seconds", str(options.row_seconds), *["--profile"] * options.profile]


PARTS = {
    "dit-ddp": dit,
    "dit-fsdp": dit,
    "wan": wan,
    "sequence": sequence,
    "samples": work,
    "features": work,
}
TITLES = {
    "dit-ddp": "DiT-XL/2, {pixels} px, DDP",
    "dit-fsdp": "DiT-XL/2, {pixels} px, FSDP2",
    "wan": "Wan2.1-1.3B, 480 × 832 × 81, FSDP2",
    "sequence": "Wan2.1-1.3B, one sequence of 720 × 1280 × 81",
    "samples": "samples of 32 × 32 pixels",
    "features": "Inception features",
}
NAMES = {MHLA: "MHLA", EXACT: "MHLA, 5 % exact"}
CASES = (
    *(Case("dit-ddp", kind, pixels) for pixels in (512, 256) for kind in (MHLA, SOFTMAX)),
    *(Case("dit-fsdp", kind, 512) for kind in (MHLA, SOFTMAX)),
    Case("wan", MHLA),
    Case("sequence", MHLA),
    Case("dit-ddp", EXACT, 512),
    Case("samples", MHLA),
    Case("features"),
    # NCCL sums with fewer multiprocessors, and before what else is waiting.
    Case("dit-ddp", MHLA, 512, "NCCL_MAX_CTAS=8"),
    Case("dit-ddp", MHLA, 512, "TORCH_NCCL_HIGH_PRIORITY=1"),
    Case("dit-fsdp", MHLA, 512, "NCCL_MAX_CTAS=8"),
    Case("dit-ddp", EXACT, 256),
    *(Case("dit-fsdp", kind, 256) for kind in (MHLA, SOFTMAX)),
    Case("wan", SOFTMAX),
    Case("sequence", "softmax, ring"),
    Case("samples", SOFTMAX),
    Case("wan", EXACT),
    Case("samples", EXACT),
    *(Case("dit-fsdp", EXACT, pixels) for pixels in (512, 256)),
    Case("sequence", "softmax, ulysses"),
)
"""All cases, those first that say most."""


def missing(
    options: argparse.Namespace, counts: Sequence[int], rows: list[Row]
) -> Iterator[tuple[Case, int]]:
    """The cases, and numbers of GPUs, that have no row without an error."""
    ddp = "dit-ddp" in options.parts
    for case in CASES:
        if case.part not in options.parts:
            continue
        # The sequence is also measured alone, in the same run; one GPU needs no FSDP2, and sends
        # nothing.
        sends = case.part == "sequence" or case.variable
        least = 2 if sends or (case.part == "dit-fsdp" and ddp) else 1
        for gpus in counts:
            facts = case.facts | {"gpus": gpus}
            done = any(_is_of(row, facts) for row in rows if "error" not in row)
            if gpus >= least and not done:
                yield case, gpus


def _is_of(row: Row, facts: Row) -> bool:
    """Whether a row is of this case, and not of one with a variable more."""
    return facts.items() <= row.items() and row.get("variable") == facts.get("variable")


def rate(row: Row) -> float | None:
    """Images or clips per second, or for a shared sequence, steps."""
    if "shared_forward_s" in row:
        return 1 / row["shared_forward_s"]
    return row.get("images_per_second")


def compared(rows: list[Row]) -> list[Row]:
    """The rows with `times` and `share`, if one GPU has been measured."""

    def kind(row: Row) -> tuple[Any, ...]:
        part = row["part"].replace("dit-fsdp", "dit-ddp")
        return part, row.get("model"), row.get("pixels"), row.get("attention")

    alone = {kind(row): rate(row) for row in rows if row["gpus"] == 1 and rate(row)}
    bytes_alone = {kind(r): r["sha256"] for r in rows if r["gpus"] == 1 and "sha256" in r}
    found = []
    for row in rows:
        times = row.get("speed_up")
        if times is None and rate(row) and kind(row) in alone:
            times = rate(row) / alone[kind(row)]  # type: ignore[operator]
        more: Row = {}
        if times is not None:
            more = {"times": round(times, 3), "share": round(times / row["gpus"], 4)}
        if "sha256" in row and row["gpus"] > 1 and kind(row) in bytes_alone:
            more["same_bytes"] = row["sha256"] == bytes_alone[kind(row)]
        found.append(row | more)
    return found


def table(rows: list[Row]) -> str:
    """A line for each case, with a column for each number of GPUs."""
    counts = sorted({row["gpus"] for row in rows})
    header = ["", "attention", *(f"{n} GPU{'s' * (n > 1)}" for n in counts), "MFU"]
    header += ["a step waits for messages", "for the host"]
    lines = []
    for case in CASES:
        # A benchmark may fail after it has measured.
        own = [row for row in rows if _is_of(row, case.facts)]
        own = {row["gpus"]: row for row in sorted(own, key=lambda row: "error" not in row)}
        if not own:
            continue
        last = own[max(own)]
        cells = [
            case.name,
            NAMES.get(case.attention, case.attention),
            *(_cell(own.get(n)) for n in counts),
        ]
        cells.append(f"{100 * last['mfu']:.1f} %" if "mfu" in last else "")
        lines.append(cells + _waits(last))
    return markdown(header, lines)


def _cell(row: Row | None) -> str:
    """The speed in a row, and how many times that of one GPU it is."""
    if row is None:
        return ""
    if "error" in row and rate(row) is None:
        return str(row["error"])[:80]
    if "shared_forward_s" in row:
        texts = []
        for step, name in (("forward", "denoising"), ("training", "training")):
            if f"shared_{step}_s" in row:
                seconds = row[f"alone_{step}_s"], row[f"shared_{step}_s"]
                texts.append(
                    f"{name} {number(seconds[1], 3)} s, {seconds[0] / seconds[1]:.2f}× "
                    f"({number(seconds[0], 3)} s alone)"
                )
        received = sum(row["received_mib"].values())
        return "; ".join([*texts, f"{received:,.0f} MiB received"])
    text = f"{number(rate(row), 3)}/s"
    if row["gpus"] > 1 and "times" in row:
        text += f", {row['times']:.2f}×"
    if "same_bytes" in row:
        text += ", same bytes" if row["same_bytes"] else ", other bytes"
    if row["gpus"] > 1 and "relative_difference" in row:
        text += f", difference {row['relative_difference']:.1g}"
    return text


def _waits(row: Row) -> list[str]:
    found = row.get("kernels")
    if not found or "idle_ms" not in found:
        return ["", ""]
    step = row["milliseconds_per_step"]
    return [f"{found[f'{k}_ms']:.1f} of {step:.0f} ms" for k in ("communication_alone", "idle")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure each case with every number of GPUs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--gpus", nargs="+", type=int, help="by default 1, 2, 4, 8, if there are")
    parser.add_argument("--seconds", type=float, default=3600, help="after which all is ended")
    parser.add_argument("--limit", type=float, default=600, help="seconds for a single benchmark")
    parser.add_argument("--row-seconds", type=float, default=4.0, help="measured time of a row")
    parser.add_argument("--count", type=int, default=50_000, help="samples, and images")
    parser.add_argument("--no-cuda-graphs", action="store_true", help="launch every kernel")
    parser.add_argument("--folder", type=Path, help="for logs, and data that parts make and share")
    parser.add_argument("--profile", action="store_true", help="longest kernels of training")
    parser.add_argument("--tiny", action="store_true", help="small models, to try the script")
    parser.add_argument("--table", action="store_true", help="only print the table")
    options = parser.parse_args(arguments)
    rows = earlier_rows(options.out, any_machine=options.table)
    if not options.table:
        with tempfile.TemporaryDirectory() as temporary:
            options.folder = options.folder or Path(temporary)
            measure(options, rows)
    print(table(compared(rows)))


def measure(options: argparse.Namespace, rows: list[Row]) -> None:
    """Measure what is missing, and add it to the rows and to the file."""
    there = torch.cuda.device_count() or 2
    counts = options.gpus or [n for n in (1, 2, 4, 8) if n <= there]
    wanted = list(missing(options, counts, rows))
    origins: dict[Job, tuple[Case, int]] = {}
    facts = machine()
    options.folder.mkdir(parents=True, exist_ok=True)
    threads = str(max(1, (os.cpu_count() or 1) // 6))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", threads)
    os.environ.setdefault("OMP_NUM_THREADS", "2" if torch.cuda.is_available() else "1")

    def jobs() -> Iterator[Job]:
        for case, gpus in wanted:
            job = case.job(gpus, options)
            origins[job] = case, gpus
            yield job

    def found(job: Job, new: list[Row]) -> None:
        case, gpus = origins[job]
        own = case.facts | {"gpus": gpus}
        rows[:] = [row for row in rows if not _is_of(row, own)]
        rows.extend(row | own for row in new)
        write_json(options.out, {**facts, "rows": compared(rows)}, indent=1)
        for row in new:
            short = {k: v for k, v in row.items() if not isinstance(v, (list, dict))}
            print(json.dumps(own | short), flush=True)
        # A recording that hangs would do so in every row.
        hung = [row["error"] for row in new if "error" in row] == [HUNG] and len(new) == 1
        if case.part == "dit-ddp" and gpus > 1 and hung:
            print("from now on kernels are launched: a recording did not end", flush=True)
            options.no_cuda_graphs = True

    run_jobs(jobs(), Host.here(there), options.folder, options.seconds, options.limit, found)


if __name__ == "__main__":
    main()
