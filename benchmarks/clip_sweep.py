"""Time what surrounds tile attention in a Wan layer, in several forms: packing and convolution.

python benchmarks/clip_sweep.py OUT.json [--seconds S]        needs CUDA

Milliseconds at [1, 12, 31500, 128], bfloat16: `read` are the three launches that rotate, average
and pack queries, keys and values; `conv` is the 3×3×3 convolution that also blends both halves and
applies the gate. Kernels are compiled beforehand, in parallel.
"""

import argparse
import json
import math
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from kernel_resources import AbsentCard, watch
from kernel_speed import time_ms
from rows import machine
from tile_sweep import WAN_480, Inputs
from triton.runtime import driver

from mhla_gen.files import write_json
from mhla_gen.ops.kernels import depthwise, tile_reads

# Constants of the modules, then those of the launch.
FORMS: dict[str, list[tuple[dict[str, int], dict[str, int]]]] = {
    "conv": [
        ({"_FRAMES": 3, "_COLUMNS": 4}, {}),
        ({"_FRAMES": 3, "_COLUMNS": 4}, {"maxnreg": 168}),
        ({"_FRAMES": 3, "_COLUMNS": 4}, {"maxnreg": 128}),
        ({"_FRAMES": 3, "_COLUMNS": 4, "_ENOUGH_WARPS": 8192}, {"maxnreg": 168}),
        ({"_FRAMES": 2, "_COLUMNS": 4}, {}),
        ({"_FRAMES": 2, "_COLUMNS": 4}, {"maxnreg": 128}),
        ({"_FRAMES": 3, "_COLUMNS": 8}, {"num_warps": 2}),
        ({"_FRAMES": 3, "_COLUMNS": 16}, {"num_warps": 4, "maxnreg": 168}),
        ({"_FRAMES": 1, "_COLUMNS": 8}, {}),
    ],
    "read": [
        ({"_HEADS": heads}, {"BT": rows, "num_warps": warps})
        for heads in (1, 4, 12)
        for rows, warps in ((64, 4), (32, 4), (64, 8))
    ]
    + [({"_HEADS": 2}, {"BT": 64, "num_warps": 4}), ({"_HEADS": 4}, {"BT": 16, "num_warps": 4})],
}
Job = tuple[str, dict[str, int], dict[str, int]]


def runner(job: Job, device: str) -> Callable[[], object]:
    """A call of the job's form; what it changes in a module stays changed."""
    kind, settings, options = job
    module: Any = {"conv": depthwise, "read": tile_reads}[kind]
    for name, value in settings.items():
        setattr(module, name, value)
    ordinary = module.launch

    def launch(kernel: Any, grid: Any, tensors: Any, scalars: Any, constants: Any) -> None:
        ordinary(kernel, grid, tensors, scalars, constants | options)

    inputs = Inputs(WAN_480, 0.05, device)
    query, key, value, call = inputs.query, inputs.key, inputs.value, inputs.call

    def read() -> None:
        tile_reads.read_tiles(key, call, mean=True, lengths=True, pack=True)
        tile_reads.pack_tiles(value, call)
        tile_reads.read_groups(query, call, mean=True, slots=128)

    tokens, gate = value.flatten(2), key.flatten(2)
    channels = tokens.shape[2]
    weight = tokens.new_zeros(channels, 1, 3, 3, 3)
    bias, shares = tokens.new_zeros(channels), tokens.new_zeros(*tokens.shape[:2], WAN_480.heads)
    after = depthwise.After(tokens, query.flatten(2), shares, gate, WAN_480.heads, False)

    def conv() -> None:
        depthwise.convolve(tokens, weight, bias, list(WAN_480.grid), after)

    def run() -> None:
        module.launch = launch
        (conv if kind == "conv" else read)()
        module.launch = ordinary

    return run


def compile_form(job: Job) -> list[dict[str, Any]]:
    """Compile one form, without a GPU, into Triton's cache; figures from its machine code."""
    driver.set_active(AbsentCard(90))  # pyright: ignore[reportArgumentType]
    found: list[dict[str, Any]] = []
    watch(lambda _name, figures: found.append(figures), "")
    runner(job, "meta")()
    return [{name: figures[name] for name in ("registers", "spills")} for figures in found]


def main() -> None:
    """Compile, measure, print and write row by row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--processes", type=int, default=12)
    options = parser.parse_args()
    started = time.monotonic()
    rows: list[dict[str, Any]] = []
    jobs = [(kind, *form) for kind, forms in FORMS.items() for form in forms]
    context = multiprocessing.get_context("spawn")
    # Each process compiles once, since a form changes its modules.
    pool = ProcessPoolExecutor(options.processes, context, max_tasks_per_child=1)
    compiled = [(job, pool.submit(compile_form, job)) for job in jobs]
    for job, figures in compiled:
        if time.monotonic() - started > options.seconds:
            print("out of time")
            break
        row = {"shape": [1, 12, math.prod(WAN_480.grid), 128], "kind": job[0], **job[1], **job[2]}
        row["machine_code"] = figures.result()
        row["ms"] = time_ms(runner(job, "cuda"))
        rows.append(row)
        print(json.dumps(row), flush=True)
        write_json(options.out, {**machine(), "rows": rows}, indent=1)
    pool.shutdown(cancel_futures=True)


if __name__ == "__main__":
    main()
