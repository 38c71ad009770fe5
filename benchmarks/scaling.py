"""Scaling of training, one shared sequence, samples and features to 1, 2, 4, 8 GPUs of a host.

    python benchmarks/scaling.py scaling.json --profile
    python benchmarks/scaling.py dit.json --parts dit-ddp dit-fsdp --gpus 1 8
    python benchmarks/scaling.py scaling.json --table

Runs the other benchmarks with one process per GPU, for softmax, MHLA and 5 % exact, those first
that say most. As many as fit on the GPUs begin together and compile side by side; they time in
turns. Each row is written when it is done, and the same options add those that are missing.
`times` is the speed relative to one GPU in the same JSON (for FSDP2, which needs two GPUs, relative
to DDP on one), `share` the share of linear scaling. Prints a table in Markdown.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jobs import HUNG, Host, Job, run_jobs
from rows import Row, deciding, earlier_rows, machine, markdown, number
from scaling_cases import CASES, NAMES, PARTS, Case, is_of, missing

from mhla_gen.files import write_json

# Options that choose rows, or for how long they are measured; see `deciding`.
_FREE = ("parts", "names", "gpus", "limit", "row_seconds", "folder", "profile")


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
        own = [row for row in rows if is_of(row, case.facts)]
        own.sort(key=lambda row: (rate(row) is not None, "error" not in row))
        own = {row["gpus"]: row for row in own}
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
    # Where the host is the limit, a step takes longer in a profile.
    step = found and found.get("step_ms", row["milliseconds_per_step"] if row["recorded"] else None)
    if not found or step is None:
        return ["", ""]
    return [f"{found[f'{k}_ms']:.1f} of {step:.0f} ms" for k in ("communication_alone", "idle")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure each case with every number of GPUs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--names", nargs="+", default=["*"], help="patterns of names of logs")
    parser.add_argument("--gpus", nargs="+", type=int, help="by default 1, 2, 4, 8, if there are")
    parser.add_argument("--seconds", type=float, default=3600, help="after which all is ended")
    parser.add_argument("--limit", type=float, default=600, help="seconds for a single benchmark")
    parser.add_argument("--row-seconds", type=float, default=4.0, help="measured time of a row")
    parser.add_argument("--count", type=int, default=50_000, help="samples, and images")
    parser.add_argument("--no-cuda-graphs", action="store_true", help="launch every kernel")
    parser.add_argument("--folder", type=Path, help="for logs, and data that parts make and share")
    parser.add_argument("--profile", action="store_true", help="longest kernels of steps")
    parser.add_argument("--tiny", action="store_true", help="small models, to try the script")
    parser.add_argument("--table", action="store_true", help="only print the table")
    options = parser.parse_args(arguments)
    asked = deciding(options, *_FREE)
    rows = earlier_rows(options.out, asked, any_machine=options.table)
    if not options.table:
        with tempfile.TemporaryDirectory() as temporary:
            options.folder = options.folder or Path(temporary)
            measure(options, rows, machine() | {"options": asked})
    print(table([row for row in compared(rows) if row["part"] in options.parts]))


def measure(options: argparse.Namespace, rows: list[Row], facts: Row) -> None:
    """Measure what is missing, and add it to the rows, and with `facts` to the file."""
    there = torch.cuda.device_count() or 2
    counts = options.gpus or [n for n in (1, 2, 4, 8) if n <= there]
    wanted = list(missing(options, counts, rows))
    origins: dict[Job, tuple[Case, int]] = {}
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
        rows[:] = [row for row in rows if not is_of(row, own)]
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
