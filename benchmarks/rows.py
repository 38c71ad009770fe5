"""A benchmark's rows in one JSON file, written one by one; the same options add missing ones.

python benchmarks/NAME.py OUT.json [--seconds 60]    measure what is missing, print the table
python benchmarks/NAME.py OUT.json --table           print the table
"""

import argparse
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from mhla_gen.files import write_json
from mhla_gen.outputs.folders import differing_values
from mhla_gen.runtime.devices import device_name

Row = dict[str, Any]
# Options that decide no number of a row.
_FREE = ("out", "seconds", "table")


def make_parser(description: str | None, seconds: float) -> argparse.ArgumentParser:
    """Arguments of every benchmark that calls `measure_rows`.

    Args:
        description: The script's docstring.
        seconds: Default time limit.
    """
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    parser.add_argument("out", type=Path, help="the results, a JSON file")
    parser.add_argument(
        "--seconds", type=float, default=seconds, help="begin no row that would end after these"
    )
    parser.add_argument("--table", action="store_true", help="only print the table")
    return parser


def measure_rows(
    options: argparse.Namespace,
    cases: Sequence[Row],
    measure: Callable[[Row], Row],
    table: Callable[[list[Row]], str],
) -> None:
    """Measure the rows that are missing, write each when it is done, and print all as a table.

    Args:
        options: Parsed arguments of `make_parser`.
        cases: What tells a row from all others, in the order of measurement.
        measure: Returns the numbers of a case; a case that runs out of memory gets an `error`.
        table: Makes Markdown of all rows, in the order of `cases`.

    Raises:
        SystemExit: If the file has rows of other options, another device or version of torch.
    """
    asked = deciding(options)
    facts = machine() | {"options": asked}
    rows = earlier_rows(options.out, asked, any_machine=options.table)
    began, longest = time.perf_counter(), 0.0
    for case in [] if options.table else cases:
        if any(case.items() <= row.items() for row in rows):
            continue
        start = time.perf_counter()
        if start + longest > began + options.seconds:
            print(f"{case} is left out: it would end after {options.seconds:g} s", flush=True)
            continue
        try:
            row = case | measure(case)
        except torch.OutOfMemoryError:
            row = case | {"error": "out of memory"}
            torch.cuda.empty_cache()
        rows.append(row)
        write_json(options.out, facts | {"rows": rows}, indent=1)
        longest = max(longest, time.perf_counter() - start)
        print(f"{time.perf_counter() - began:.0f} s: {json.dumps(row)}", flush=True)
    print(table(rows))


def deciding(options: argparse.Namespace, *free: str) -> Row:
    """The options that decide the numbers of rows, as files have them.

    Args:
        options: All of them.
        free: Those that do not, besides `--seconds` and `--table`.
    """
    found = {key: value for key, value in vars(options).items() if key not in (*_FREE, *free)}
    return json.loads(json.dumps(found))


def earlier_rows(path: Path, options: Row, any_machine: bool = False) -> list[Row]:
    """Rows that the file has; none if there is no file.

    Args:
        path: The results.
        options: `deciding` ones of the rows to come.
        any_machine: Whether they may be of other options, another device or version of torch, to be
            printed; the file must be there then.

    Raises:
        SystemExit: If they are, and may not be.
    """
    if not any_machine and not path.exists():
        return []
    report, facts = json.loads(path.read_bytes()), machine()
    if not any_machine and any(report[name] != facts[name] for name in ("device", "torch")):
        raise SystemExit(
            f"{path} was measured on {report['device']} with torch {report['torch']}; "
            "choose another file"
        )
    changes = differing_values(report.get("options", {}), options)
    if not any_machine and changes:
        raise SystemExit(
            f"{path} was measured with other options ({'; '.join(changes)}); choose another file"
        )
    return report["rows"]


def machine() -> dict[str, str]:
    """Command, date, device and versions."""
    is_gpu = torch.cuda.is_available()
    versions = {"torch": torch.__version__}
    if is_gpu:
        import triton

        versions["triton"] = triton.__version__
    return {
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "device": device_name(),
        **versions,
    }


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(cells)} |" for cells in rows)])


def number(value: float | None, digits: int = 2) -> str:
    """A number with at least so many significant digits, or a dash."""
    if value is None:
        return "-"
    places = digits - 1 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{max(0, places)}f}"
