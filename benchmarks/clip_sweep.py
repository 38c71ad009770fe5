"""Time the convolution of a clip with what ends a layer, in several forms of its kernel.

python benchmarks/clip_sweep.py OUT.json [--seconds S]        needs CUDA

At the shape of a layer of Wan, in bfloat16: first in the form in use, with each of the tensors that
follow the convolution in the same pass, and the two passes apart; then the whole in other forms.
Medians over replays of a CUDA graph with a flushed cache. `error` is the largest difference from
the same in float32, of the first head, in parts of the largest entry.
"""

import argparse
import json
import math
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from kernel_resources import AbsentCard, watch
from kernel_speed import time_ms
from rows import machine
from torch import Tensor
from triton.runtime import driver

from mhla_gen.files import write_json
from mhla_gen.ops.depthwise import Blend, gated_conv
from mhla_gen.ops.kernels import depthwise as kernels
from mhla_gen.ops.kernels.depthwise import After, convolve

GRID, HEADS, HEAD_DIM = (21, 30, 50), 12, 128


class Form(NamedTuple):
    """Columns, channels, frames and registers of a program; see `depthwise.py`."""

    columns: int = 2
    channels: int = 64
    frames: int = 2
    max_registers: int = 128


STREAMS = ("", "added", "added gate", "added beside", "added beside gate")
WHOLE = STREAMS[-1]
FORMS = (
    Form(max_registers=255),
    Form(max_registers=112),
    Form(frames=1),
    Form(frames=3),
    Form(frames=3, max_registers=255),
    Form(columns=4),
    Form(columns=4, max_registers=255),
)
Job = tuple[str, Form]
JOBS: tuple[Job, ...] = (
    *((stream, Form()) for stream in STREAMS),
    *((stream, form) for form in FORMS for stream in (WHOLE, "")),
)


class Inputs:
    """Random inputs of a layer."""

    def __init__(self, device: str, grid: tuple[int, ...] = GRID):
        self.grid, channels = grid, HEADS * HEAD_DIM
        shape = (1, math.prod(grid), channels)
        self.tokens, self.added, self.beside, self.gate = torch.randn(
            4, *shape, dtype=torch.bfloat16, device=device
        )
        self.shares = torch.randn(*shape[:2], HEADS, dtype=torch.bfloat16, device=device)
        self.weight = torch.randn(channels, 1, 3, 3, 3, dtype=torch.bfloat16, device=device)
        self.bias = torch.randn(channels, dtype=torch.bfloat16, device=device)

    def after(self, stream: str) -> After | None:
        """What follows the convolution."""
        if not stream:
            return None
        blend = (self.beside, self.shares) if "beside" in stream else (None, None)
        gate = self.gate if "gate" in stream else None
        return After(self.added, *blend, gate, HEADS, keeps=False)

    def run(self, stream: str) -> Tensor:
        """The pass."""
        after = self.after(stream)
        return convolve(self.tokens, self.weight, self.bias, list(self.grid), after)[0]

    def apart(self) -> Tensor:
        """The convolution, and the rest in another pass, as that of a filter of a single tap."""
        out = self.run("")
        one = torch.ones_like(self.weight[..., :1, :1, :1])
        return convolve(out, one, None, list(self.grid), self.after(WHOLE))[0]

    def expected(self, stream: str) -> Tensor:
        """The first head of the pass, in float32."""

        def first(x: Tensor) -> Tensor:
            return x[..., :HEAD_DIM].float()

        weight, bias = (x[:HEAD_DIM].float() for x in (self.weight, self.bias))
        added: Tensor | Blend = first(self.added) if stream else torch.zeros_like(first(self.added))
        if "beside" in stream:
            beside, shares = first(self.beside)[:, :, None], self.shares[..., :1].float()
            added = Blend(first(self.added)[:, :, None], beside, shares)
        gate = first(self.gate) if "gate" in stream else None
        return gated_conv(
            added, first(self.tokens), weight, bias, gate,
            grid=self.grid, num_heads=1, implementation="torch",
        )  # fmt: skip


def use(form: Form) -> None:
    """Let the kernel run in this form."""
    names = "_COLUMNS", "_CHANNELS", "_FRAMES", "_REGISTERS"
    for name, value in zip(names, form, strict=True):
        setattr(kernels, name, value)


def compile_form(job: Job) -> dict[str, Any]:
    """Compile one form, without a GPU, into Triton's cache; figures from its machine code."""
    driver.set_active(AbsentCard(90))  # pyright: ignore[reportArgumentType]
    found: dict[str, Any] = {}
    watch(lambda _name, figures: found.update(figures), "conv_frames")
    use(job[1])
    try:
        Inputs("meta").run(job[0])
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:400]}
    return {figure: found[figure] for figure in ("registers", "spills", "programs")}


def measure(inputs: Inputs, stream: str, form: Form) -> dict[str, Any]:
    """Time and error of a form, or why there are none."""
    use(form)
    try:
        found, expected = inputs.run(stream)[..., :HEAD_DIM].float(), inputs.expected(stream)
        error = float((found - expected).abs().max() / expected.abs().max())
        return {"ms": time_ms(lambda: inputs.run(stream)), "error": round(error, 5)}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:400]}


def main() -> None:
    """Compile, measure, print and write row by row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=20.0, help="no row is begun after these")
    parser.add_argument("--processes", type=int, default=12, help="that compile")
    options = parser.parse_args()
    began = time.monotonic()
    rows: list[dict[str, Any]] = []

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        print(f"{time.monotonic() - began:.1f}", json.dumps(row), flush=True)
        write_json(options.out, {**machine(), "grid": GRID, "rows": rows}, indent=1)

    # Forked before CUDA is in use: imports take longer than all that is compiled.
    pool = ProcessPoolExecutor(options.processes, multiprocessing.get_context("fork"))
    compiled = {job: pool.submit(compile_form, job) for job in JOBS}
    # The workers have been forked by then.
    compiled[JOBS[0]].result()
    inputs = Inputs("cuda")
    with torch.no_grad():
        for index, (job, figures) in enumerate(compiled.items()):
            if time.monotonic() - began > options.seconds:
                print("out of time")
                break
            stream, form = job
            row = {"stream": stream, **form._asdict(), **figures.result()}
            if "error" not in row:
                row |= measure(inputs, stream, form)
            keep(row)
            if index + 1 == len(STREAMS):
                use(Form())
                keep({"stream": "apart", **Form()._asdict(), "ms": time_ms(inputs.apart)})
    pool.shutdown(cancel_futures=True)


if __name__ == "__main__":
    main()
