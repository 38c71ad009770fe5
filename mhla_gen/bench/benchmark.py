"""`mhla-gen bench`: measure, print a table, write JSON and a picture."""

import itertools
import platform
import shlex
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from mhla_gen.bench.model import bench_model
from mhla_gen.bench.ops import bench_ops, halves_of
from mhla_gen.config import BenchConfig
from mhla_gen.errors import OccupiedError
from mhla_gen.files import write_json
from mhla_gen.runtime.devices import resolve_device
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
_ON_GPU = (
    *("softmax_cudnn", "softmax_flash", "linear"),
    *("fused", "fused exact=0.05", "fused exact=0.125"),
)
_ELSEWHERE = ("softmax", "linear", "blockwise", "blockwise exact=0.125")


def bench(config: BenchConfig) -> dict[str, Any]:
    """Measure what `config` asks for and write `bench.json` and `bench.png`.

    Returns:
        What the JSON holds: `rows`, and how they were measured.

    Raises:
        FileExistsError: If the folder holds an earlier measurement.
    """
    folder = Path(config.output_dir)
    if (folder / "bench.json").exists():
        raise OccupiedError(
            f"output_dir {folder} holds an earlier measurement; choose another one or move it away"
        )
    device = resolve_device(config.device)
    config = _resolve(config, device)
    folder.mkdir(parents=True, exist_ok=True)
    measure = bench_ops if config.subject == "ops" else bench_model
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {}
    for row in measure(config, device):
        _add_ratios(row, rows)
        rows.append(row)
        if len(rows) == 1:
            print("  ".join(f"{name:>16}" for name in _COLUMNS))
        print(_line(row), flush=True)
        # Written row by row: a long run that is cut short keeps what it measured.
        result = {"rows": rows, "dtype": config.dtype, **provenance(device)}
        write_json(folder / "bench.json", result, indent=1)
    plot(rows, folder / "bench.png")
    print(f"wrote {folder / 'bench.json'} and {folder / 'bench.png'}")
    return result


def _resolve(config: BenchConfig, device: torch.device) -> BenchConfig:
    """Replace "auto" by what suits the device."""
    gpu = device.type == "cuda"
    if config.methods == "auto":
        config = replace(config, methods=_ON_GPU if gpu else _ELSEWHERE)
    for method in config.methods:
        # A mistake stops here rather than in the middle of the rows.
        halves_of(method)
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
        "device": torch.cuda.get_device_name(device) if is_gpu else platform.processor() or "cpu",
        "command": shlex.join(["mhla-gen", *sys.argv[1:]]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        **versions,
    }


def _add_ratios(row: dict[str, Any], earlier: list[dict[str, Any]]) -> None:
    """How many times faster than the fastest softmax of the same problem size measured so far."""
    size = {name: row.get(name) for name in ("batch", "heads", "grid", "head_dim", "model")}
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


def _line(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{row['tokens']:>16}  {row['method']:>16}  {row['error'][:100]}"
    cells = (
        form.format(row[name]) if row.get(name) is not None else "-"
        for name, form in _COLUMNS.items()
    )
    return "  ".join(f"{cell:>16}" for cell in cells)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Latency and memory against tokens; a dot marks where MHLA overtakes softmax."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    good = [row for row in rows if "error" not in row]
    for axis, key, label in (
        (axes[0], "forward_ms", "forward latency (ms)"),
        (axes[1], "forward_peak_gib", "memory beyond inputs (GiB)"),
    ):
        for method in dict.fromkeys(row["method"] for row in good):
            points = sorted(
                (row["tokens"], row[key])
                for row in good
                if row["method"] == method and row.get(key)
            )
            if points:
                axis.plot(*zip(*points, strict=True), marker=".", label=method)
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label)
        axis.grid(alpha=0.3)
    crossover = find_crossover(good)
    if crossover is not None:
        axes[0].axvline(crossover, color="black", linestyle=":", linewidth=1)
        axes[0].set_title(f"MHLA overtakes softmax at {crossover:.0f} tokens", fontsize=10)
    if axes[0].get_legend_handles_labels()[0]:
        axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def find_crossover(rows: list[dict[str, Any]]) -> float | None:
    """Tokens from which the fastest MHLA beats the fastest softmax, interpolated in logarithms.

    None if one of them is the faster one at every size.
    """
    best: dict[int, dict[bool, float]] = {}
    for row in rows:
        if row["method"] != "linear":
            sizes = best.setdefault(row["tokens"], {})
            softmax = row["method"].startswith("softmax")
            sizes[softmax] = min(row["forward_ms"], sizes.get(softmax, float("inf")))
    ratios = [(n, both[False] / both[True]) for n, both in sorted(best.items()) if len(both) == 2]
    for (n0, r0), (n1, r1) in itertools.pairwise(ratios):
        if r0 > 1 >= r1:
            share = torch.tensor([r0, r1]).log()
            return n0 * (n1 / n0) ** float(share[0] / (share[0] - share[1]))
    return None
