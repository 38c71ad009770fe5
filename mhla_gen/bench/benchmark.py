"""`mhla-gen bench`: measure, print a table, write JSON and a picture."""

import itertools
import shlex
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from mhla_gen.bench.folder import (
    PICTURE_NAME,
    RESULTS_NAME,
    check_output_dir,
    earlier_rows,
    plain_settings,
)
from mhla_gen.bench.model import bench_model
from mhla_gen.bench.ops import bench_ops, settings_of
from mhla_gen.config import BenchConfig
from mhla_gen.errors import UserError
from mhla_gen.files import write_json, write_picture
from mhla_gen.ops import IMPLEMENTATIONS
from mhla_gen.outputs.locks import claimed
from mhla_gen.runtime.devices import device_name, resolve_device
from mhla_gen.version import __version__

_COLUMNS = {
    "tokens": "{:d}",
    "method": "{}",
    "exact": "{:.1%}",
    "forward_ms": "{:.3f}",
    "forward_ratio": "{:.2f}x",
    "floor_share": "{:.0%}",
    "forward_peak_gib": "{:.3f}",
    "train_ms": "{:.3f}",
    "train_ratio": "{:.2f}x",
    "train_peak_gib": "{:.3f}",
}
# What two rows must share for a ratio of their times.
_SIZE = ("batch", "heads", "grid", "head_dim", "model", "causal")
_ON_GPU = (
    *("softmax_cudnn", "softmax_flash", "linear"),
    *("fused", "fused exact=0.05", "fused exact=0.125"),
)
_ELSEWHERE = ("softmax", "linear", "blockwise", "blockwise exact=0.125")


def bench(config: BenchConfig, dry_run: bool = False) -> dict[str, Any]:
    """Run the measurements of `config` and write `bench.json` and `bench.png`.

    A measurement that was interrupted keeps its rows; the same settings add those that are missing.

    Args:
        config: What to measure.
        dry_run: Check the settings, print what would be measured, and stop.

    Returns:
        What the JSON holds: `rows`, and how they were measured; nothing after a dry run.

    Raises:
        OSError: If the folder holds a measurement with other settings, of another device or by
            another version, or cannot be written.
        ValueError: If a setting needs a GPU, and there is none.
    """
    folder = Path(config.output_dir)
    check_output_dir(config)
    device = resolve_device(config.device)
    if config.cuda_graphs and device.type != "cuda":
        raise UserError("cuda_graphs=true needs a GPU, found none; leave it out")
    asked, config = plain_settings(config), _resolve(config, device)
    facts = {"settings": asked, "dtype": config.dtype, **provenance(device)}
    done = len(earlier_rows(folder, facts))
    if dry_run:
        known = f", all but {done} rows that are there" if done else ""
        print(f"would measure {_subject(config)}{known}")
        return {}
    with claimed(folder):
        # Again, now that no other command writes to it.
        return _measure(config, device, folder, facts, earlier_rows(folder, facts))


def _subject(config: BenchConfig) -> str:
    subject = config.model if config.subject == "model" else config.subject
    grids = "published sizes"
    if config.grids != "models":
        grids = ", ".join("×".join(map(str, grid)) for grid in config.grids) + " tokens"
    return f"{subject}: {', '.join(config.methods)}; {grids}"


def _measure(
    config: BenchConfig,
    device: torch.device,
    folder: Path,
    facts: dict[str, Any],
    rows: list[dict[str, Any]],
) -> dict[str, Any]:
    """Measure what comes after `rows`, and return all that the JSON holds."""
    measure = bench_ops if config.subject == "ops" else bench_model
    if rows:
        print(f"{folder / RESULTS_NAME} has {len(rows)} rows already")
    result = {"rows": rows, **facts}
    widths = dict.fromkeys(_COLUMNS, 16) | {"method": max(16, *map(len, config.methods))}
    # The first row of a large model takes minutes.
    print(f"measuring {_subject(config)}, {config.dtype}, {result['device']}", flush=True)
    for row in measure(config, device, len(rows)):
        _add_ratios(row, rows)
        rows.append(row)
        if len(rows) == 1:
            print("  ".join(f"{name:>{width}}" for name, width in widths.items()))
        print(_line(row, widths), flush=True)
        # Written row by row: a long run that is cut short keeps what it measured.
        if any("error" not in row for row in rows):
            write_json(folder / RESULTS_NAME, result, indent=1)
    if all("error" in row for row in rows):
        raise UserError("nothing could be measured; each row says why")
    for step in ("forward", "train"):
        if said := _said_crossover(rows, step):
            print(said)
    plot(rows, folder / PICTURE_NAME, f"{result['device']}, {config.dtype}")
    print(f"wrote {folder / RESULTS_NAME} and {folder / PICTURE_NAME}")
    return result


def _resolve(config: BenchConfig, device: torch.device) -> BenchConfig:
    """Replace "auto" by the choice for the device."""
    gpu = device.type == "cuda"
    if config.methods == "auto":
        config = replace(config, methods=_ON_GPU if gpu else _ELSEWHERE)
    for method in config.methods:
        # A mistake stops here rather than in the middle of the rows.
        settings_of(method)
    if config.dtype == "auto":
        config = replace(config, dtype="bfloat16" if gpu else "float32")
    return config


def provenance(device: torch.device) -> dict[str, str]:
    """Device, versions, command and date of a measurement."""
    is_gpu = device.type == "cuda"
    versions = {"mhla_gen": __version__, "torch": torch.__version__}
    if is_gpu:
        import triton

        versions["triton"] = triton.__version__
    return {
        "device": device_name(device),
        "command": shlex.join(["mhla-gen", *sys.argv[1:]]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        **versions,
    }


def _add_ratios(row: dict[str, Any], earlier: list[dict[str, Any]]) -> None:
    """How many times faster than the fastest softmax of the same problem size measured so far."""
    size = {name: row.get(name) for name in _SIZE}
    for step in ("forward", "train"):
        softmax = [
            other[f"{step}_ms"]
            for other in [*earlier, row]
            if other["method"].startswith("softmax")
            and f"{step}_ms" in other
            and all(other.get(name) == value for name, value in size.items())
        ]
        if softmax and f"{step}_ms" in row:
            row[f"{step}_ratio"] = min(softmax) / row[f"{step}_ms"]


def _line(row: dict[str, Any], widths: dict[str, int]) -> str:
    if "error" in row:
        tokens, method = (f"{row[name]:>{widths[name]}}" for name in ("tokens", "method"))
        return f"{tokens}  {method}  {row['error']}"
    cells = (
        (form.format(row[name]) if row.get(name) is not None else "-", widths[name])
        for name, form in _COLUMNS.items()
    )
    return "  ".join(f"{cell:>{width}}" for cell, width in cells)


_PANELS = {
    "forward_ms": "forward latency (ms)",
    "train_ms": "forward and backward (ms)",
    "forward_peak_gib": "memory beyond inputs (GiB)",
}


def plot(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Latency and memory against tokens; a line marks where MHLA overtakes softmax.

    Softmax is dashed, what is causal dotted.
    """
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    good = [row for row in rows if "error" not in row]
    panels = [key for key in _PANELS if any(row.get(key) for row in good)] or ["forward_ms"]
    size = (4.5 * len(panels) + 2.5, 4)
    figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    figure.suptitle(title)
    tokens = sorted({row["tokens"] for row in good})
    colors = plt.get_cmap("tab20").colors  # type: ignore[attr-defined]
    methods = dict.fromkeys(row["method"] for row in good)
    # Dark ones first.
    styles = dict(zip(methods, itertools.cycle((*colors[::2], *colors[1::2])), strict=False))
    for axis, key in zip(axes[0], panels, strict=True):
        for method, color in styles.items():
            found = [row for row in good if row["method"] == method and row.get(key)]
            points = sorted((row["tokens"], row[key]) for row in found)
            style = "--" if method.startswith("softmax") else "-"
            style = ":" if any(row.get("causal") for row in found) else style
            if points:
                x, y = zip(*points, strict=True)
                axis.plot(x, y, style, marker=".", color=color, label=method)
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel=_PANELS[key])
        axis.set_xticks(tokens, [f"{count:,}" for count in tokens], rotation=45)
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3)
    crossover = find_crossover(good)
    if crossover is not None:
        axes[0, 0].axvline(crossover, color="black", linestyle=":", linewidth=1)
        axes[0, 0].set_title(f"MHLA overtakes softmax at {crossover:.0f} tokens", fontsize=10)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside right center", fontsize=8)
    write_picture(path, figure)
    plt.close(figure)


def _said_crossover(rows: list[dict[str, Any]], step: str) -> str | None:
    """The number of tokens from which MHLA is faster, for rows that differ only in tokens."""
    timed = [row for row in rows if f"{step}_ms" in row]
    kinds = {tuple(row.get(name) for name in ("batch", "heads", "head_dim")) for row in timed}
    ratios = _ratios(timed, step)
    if len(kinds) > 1 or len(ratios) < 2:
        return None
    name = "forward and backward" if step == "train" else "forward"
    crossover = find_crossover(timed, step)
    if crossover is not None:
        return f"{name}: MHLA is faster than softmax on this device from {crossover:.0f} tokens on"
    faster = "softmax" if ratios[-1][1] > 1 else "MHLA"
    sizes = f"{ratios[0][0]} to {ratios[-1][0]} tokens"
    return f"{name}: {faster} is faster on this device, {sizes}"


def _ratios(rows: list[dict[str, Any]], step: str) -> list[tuple[int, float]]:
    """Time of the fastest MHLA as a multiple of the fastest softmax's, by number of tokens."""
    best: dict[int, dict[bool, float]] = {}
    for row in rows:
        name = row["method"].split()[0]
        softmax = name.startswith("softmax") and not row.get("causal")
        # With all pairs exact it is softmax, whatever computes it.
        ours = name in ("auto", *IMPLEMENTATIONS) and row.get("exact", 0.0) < 1
        if f"{step}_ms" in row and (softmax or ours):
            sizes = best.setdefault(row["tokens"], {})
            sizes[softmax] = min(row[f"{step}_ms"], sizes.get(softmax, float("inf")))
    return [(n, both[False] / both[True]) for n, both in sorted(best.items()) if len(both) == 2]


def find_crossover(rows: list[dict[str, Any]], step: str = "forward") -> float | None:
    """Tokens from which the fastest MHLA beats the fastest softmax, interpolated on a log scale.

    None if one of them is the faster one at every size.
    """
    ratios = _ratios(rows, step)
    for (n0, r0), (n1, r1) in itertools.pairwise(ratios):
        if r0 > 1 >= r1:
            share = torch.tensor([r0, r1]).log()
            return n0 * (n1 / n0) ** float(share[0] / (share[0] - share[1]))
    return None
