"""Time the backward pass of tile attention, kernel by kernel and in several forms.

python benchmarks/tile_backward_sweep.py OUT.json [--seconds S]        needs CUDA

Milliseconds of one kernel, its registers and spills, and how far gradients are from those of the
kernel that reads tokens in place, in parts of the largest entry. A form that does not compile or
launch has an `error` instead. Rows `pass`: every kernel of the backward pass, from torch's
profiler. Rows are written as they come. Kernels are compiled first, in parallel.
"""

import argparse
import json
import math
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch
from kernel_resources import AbsentCard, watch
from kernel_speed import time_ms
from tile_kernels import kernel_ms
from tile_sweep import Inputs
from torch import Tensor
from triton.runtime import driver

from mhla_gen.bench.ops import Case
from mhla_gen.ops.kernels import tile_gradients, tile_reads
from mhla_gen.ops.kernels.tile_form import Loop
from mhla_gen.ops.kernels.tile_owners import owners_of_tiles

WAN_480 = Case(1, 12, (21, 30, 50), 128, (3, 5, 10), True)
WAN_720 = Case(1, 12, (21, 45, 80), 128, (3, 5, 10), True)
PLACES = ((WAN_480, 0.05), (WAN_480, 0.125), (WAN_720, 0.05))


# How many queries and keys a program handles, with how many warps and stages; in place, or packed.
FORMS = {
    "tile_backward_keys_kernel": (Loop(64, 64, 4, 2),),
    "tile_backward_packed_keys_kernel": (
        Loop(64, 64, 4, 2, packed=True),
        Loop(64, 64, 4, 3, packed=True),
        Loop(32, 64, 4, 3, packed=True),
    ),
    "tile_backward_queries_kernel": (
        Loop(64, 64, 4, 2),
        Loop(128, 64, 8, 3, packed=True),
        Loop(128, 32, 4, 2, packed=True),
        Loop(128, 32, 4, 3, packed=True),
        Loop(128, 32, 8, 3, packed=True, max_registers=128),
    ),
}
Job = tuple[Case, float, str, Loop]


class Problem:
    """The inputs of backward's kernels, packed."""

    def __init__(self, case: Case, share: float, device: str):
        self.inputs = inputs = Inputs(case, share, device)
        meta = device == "meta"
        self.out, self.lse, self.lists = inputs.unwritten() if meta else inputs.forward()
        call = inputs.call
        self.packs = tile_gradients.pack_queries(
            inputs.grad, None, inputs.query, self.out, self.lse, call, 128
        )
        self.keys = tile_reads.read_tiles(inputs.key, call, pack=True)[0]
        self.values = tile_reads.pack_tiles(inputs.value, call)
        self.rotated = tile_reads.read_tiles(inputs.key, call)[0]
        self.owners = owners_of_tiles(self.lists, call.placed.num_tiles)

    def run(self, name: str, loop: Loop) -> tuple[Tensor, ...]:
        """Gradients by one kernel."""
        call = self.inputs.call
        keys = self.keys if loop.packed else self.rotated
        values = self.values if loop.packed else self.inputs.value
        if name == "tile_backward_queries_kernel":
            packs = self.packs
            return (
                tile_gradients.backward_queries(packs, keys, values, self.lists, None, call, loop),
            )
        gradients = tile_gradients.backward_keys
        if loop.packed:
            gradients = tile_gradients.backward_packed_keys
        return gradients(self.packs, keys, values, self.owners, loop.options, call)

    def whole(self) -> tuple[Tensor, ...]:
        """The whole pass."""
        x = self.inputs
        return tile_gradients.backward(
            x.grad, None, x.query, x.key, x.value, None, self.out, self.lse, self.lists, x.call
        )


def compile_form(job: Job) -> dict[str, Any]:
    """Compile one form, without a GPU, into Triton's cache; figures from its machine code."""
    case, share, name, loop = job
    driver.set_active(AbsentCard(90))  # pyright: ignore[reportArgumentType]
    found: dict[str, Any] = {}
    watch(lambda _name, figures: found.update(figures), name)
    try:
        Problem(case, share, "meta").run(name, loop)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:400]}
    return {figure: found[figure] for figure in ("registers", "spills", "programs")}


class Bench:
    """Measures forms one after the other, at one place at a time."""

    def __init__(self) -> None:
        self.place: Any = None

    def at(self, case: Case, share: float) -> Problem:
        """The problem of a place."""
        if self.place != (case, share):
            self.place, self.problem = (case, share), Problem(case, share, "cuda")
            self.expected: dict[str, tuple[Tensor, ...]] = {}
        return self.problem

    def __call__(self, job: Job) -> dict[str, Any]:
        """Time and error of a form, or why there are none."""
        case, share, name, loop = job
        problem = self.at(case, share)
        try:
            found = problem.run(name, loop)
            # The first form of a kernel reads in place.
            expected = self.expected.setdefault("queries" if "queries" in name else "keys", found)
            pairs = zip(found, expected, strict=True)
            errors = [float((a - e).abs().max() / e.abs().max()) for a, e in pairs]
            same = all(map(torch.equal, found, problem.run(name, loop)))
            ms = time_ms(lambda: problem.run(name, loop))
            return {"ms": ms, "errors": errors, "same": same}
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"[:400]}


def main() -> None:
    """Compile, measure, print and write row by row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=55.0)
    parser.add_argument("--processes", type=int, default=14)
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    rows: list[dict[str, Any]] = []
    found: dict[str, Any] = {
        "command": f"python benchmarks/tile_backward_sweep.py {options.out.name}",
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "rows": rows,
    }

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        print(json.dumps(row), flush=True)
        options.out.write_text(json.dumps(found, indent=1) + "\n")

    jobs: list[Job] = [
        (case, share, name, loop)
        for case, share in PLACES
        for name, loops in FORMS.items()
        for loop in loops
    ]
    pool = ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn"))
    compiled = {job: pool.submit(compile_form, job) for job in jobs}
    bench = Bench()
    for job, figures in compiled.items():
        if time.monotonic() > end:
            print("out of time")
            break
        case, share, name, loop = job
        shape = [case.batch, case.heads, math.prod(case.grid), case.head_dim]
        row = {"shape": shape, "share": share, "kernel": name, **asdict(loop)}
        row |= figures.result()
        if found["device"] != "none" and "error" not in row:
            row |= bench(job)
        keep(row)
        if found["device"] != "none" and loop is list(FORMS.values())[-1][-1]:
            problem = bench.at(case, share)
            run: Callable[[], object] = problem.whole
            keep({"shape": shape, "share": share, "kernel": "pass", "ms": time_ms(run)})
            keep({"shape": shape, "share": share, "kernel": "pass", "kernels": kernel_ms(run)})
    pool.shutdown(cancel_futures=True)


if __name__ == "__main__":
    main()
