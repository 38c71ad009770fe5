"""Time the gradients of keys in tile attention, launched in different ways.

python benchmarks/tile_keys_sweep.py OUT.json [--seconds 25]        needs CUDA

For every way and shape: milliseconds of the kernel of dk and dv and of finding its owners (means of
three passes, from torch's profiler), of the whole backward pass (median over replays of a CUDA
graph), and relative errors of dk and dv against the blockwise form in float32. Bfloat16; rows are
written as they come.
"""

import argparse
import json
import math
import time
from dataclasses import asdict
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from kernel_resources import AbsentCard
from kernel_speed import time_ms
from tile_kernels import kernel_ms
from torch import Tensor
from triton.runtime import driver
from triton.runtime.jit import MockTensor

from mhla_gen.ops import auto_tiles, tile_attention
from mhla_gen.ops.kernels import tile_form, tile_gradients, tile_owners
from mhla_gen.ops.kernels.tile_call import TileCall
from mhla_gen.ops.kernels.tile_gradients import PatchForm
from mhla_gen.ops.tiles import tiling

WAYS = (
    PatchForm(),
    PatchForm(keys=64, slab=16),
    PatchForm(keys=64, slab=32),
    PatchForm(keys=64, slab=64),
    PatchForm(keys=64, slab=32, stages=3, registers=168),
    PatchForm(keys=32, slab=16),
    PatchForm(keys=32, slab=32),
    PatchForm(keys=64, slab=64, registers=168),
    PatchForm(keys=128, slab=32),
)
# Batch, heads, grid, shares; head_dim 64.
SHAPES = (
    (32, 4, (64, 64), (0.125, 0.05, 0.25, 0.02)),
    (1, 6, (128, 128), (0.05,)),
)
_KEYS = "backward_keys_kernel", "patches_kernel"
_NOT_OWNERS = "prepare", "read_boxes", "queries_kernel", *_KEYS


class Problem:
    """Inputs of a backward pass, and what it should give for the first sample."""

    def __init__(
        self, batch: int, heads: int, grid: tuple[int, ...], share: float, device: str = "cuda"
    ):
        layout = auto_tiles(grid, share)
        shape = batch, math.prod(grid), heads, 64
        torch.manual_seed(0)
        self.inputs = torch.randn(4, *shape, dtype=torch.bfloat16, device=device).unbind()
        self.grid, self.layout = grid, layout._asdict()
        placed = tiling(grid, layout.tile, layout.window, layout.top, layout.group)
        query, key, value, _ = self.inputs
        self.call = TileCall(query, value, None, None, placed, 64**-0.5)
        self.saved = tile_form.forward(query, key, value, None, self.call)

    def backward(self) -> tuple[Tensor, ...]:
        """All gradients."""
        query, key, value, grad = self.inputs
        out, lse, lists = self.saved
        return tile_gradients.backward(
            grad, None, query, key, value, None, out, lse, lists, self.call
        )

    def expected(self) -> tuple[Tensor, ...]:
        """Gradients of keys and values of the first sample."""
        *inputs, grad = (x[:1].float().requires_grad_() for x in self.inputs)
        options: dict[str, Any] = {"grid": self.grid, "implementation": "blockwise", **self.layout}
        return torch.autograd.grad(tile_attention(*inputs, **options)[0], inputs[1:], grad)


def compile_way(way: PatchForm) -> None:
    """Fill Triton's cache with the kernel of one way, in a process of its own without the GPU."""
    driver.set_active(AbsentCard(90))  # pyright: ignore[reportArgumentType]

    def launch(kernel: Any, grid: Any, tensors: Any, scalars: Any, constants: Any) -> None:
        if kernel.fn.__name__.endswith(_KEYS):
            given = [None if t is None else MockTensor(t.dtype) for t in tensors]
            kernel.warmup(*given, *scalars, grid=grid, **constants)

    for module in (tile_form, tile_gradients, tile_owners):
        module.launch = launch
    tile_gradients.PATCH = way
    for share in (0.125, 0.05):
        try:
            Problem(1, 4, (64, 64), share, "cpu").backward()
        except Exception as error:
            print(way, type(error).__name__, str(error)[-200:], flush=True)


def measure(problem: Problem, expected: tuple[Tensor, ...], way: PatchForm) -> dict[str, Any]:
    """One row."""
    tile_gradients.PATCH = way
    found = problem.backward()[1:3]
    pairs = zip(found, expected, strict=True)
    errors = [((f[:1].float() - e).norm() / e.norm()).item() for f, e in pairs]
    kernels = kernel_ms(problem.backward)
    owners = sum(ms for name, ms in kernels.items() if not any(n in name for n in _NOT_OWNERS))
    return {
        "keys_ms": next(ms for name, ms in kernels.items() if any(n in name for n in _KEYS)),
        "owners_ms": round(owners, 4),
        "backward_ms": round(time_ms(problem.backward), 4),
        "errors": [round(error, 5) for error in errors],
    }


def main() -> None:
    """Measure every way at every shape."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=25)
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    rows: list[dict[str, Any]] = []
    report = {
        "command": f"python benchmarks/tile_keys_sweep.py {options.out.name}",
        "date": date.today().isoformat(),
        "device": "",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "rows": rows,
    }
    compiling = [get_context("fork").Process(target=compile_way, args=(way,)) for way in WAYS]
    for process in compiling:
        process.start()
    for batch, heads, grid, shares in SHAPES:
        for share in shares:
            problem = Problem(batch, heads, grid, share)
            expected = problem.expected()
            report["device"] = torch.cuda.get_device_name()
            for process in compiling:
                process.join()
            print(f"{options.seconds - (end - time.monotonic()):.0f} s", flush=True)
            for way in WAYS:
                if time.monotonic() > end:
                    break
                row = {"shape": [batch, heads, *grid], "share": share, **asdict(way)}
                try:
                    row |= measure(problem, expected, way)
                except Exception as error:
                    row["error"] = f"{type(error).__name__}: {error}"[:300]
                rows.append(row)
                print(json.dumps(row), flush=True)
                options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
