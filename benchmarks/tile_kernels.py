"""Time of every kernel of tile attention, at shapes of image and video models.

python benchmarks/tile_kernels.py OUT.json [--cases 1 2] [--forward]        needs CUDA

Means over three passes from torch's profiler, in milliseconds; bfloat16.
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from kernel_speed import time_ms
from rows import machine
from tile_speed import both, softmax

from mhla_gen.bench.ops import Case
from mhla_gen.bench.profiles import kernel_times
from mhla_gen.files import write_json
from mhla_gen.ops import auto_tiles
from mhla_gen.ops.kernels import tile_form, tile_gradients
from mhla_gen.ops.kernels.tile_call import TileCall
from mhla_gen.ops.tiles import tiling

SHARES = (0.05, 0.125)
CASES = (
    Case(32, 4, (64, 64), 64, (8, 8), False),
    Case(1, 12, (21, 30, 50), 128, (3, 5, 10), True),
    Case(1, 12, (21, 45, 80), 128, (3, 5, 10), True),
)


def kernel_ms(function: Callable[[], object]) -> dict[str, float]:
    """Milliseconds by the name of a kernel."""
    function()
    found = kernel_times(function, torch.device("cuda"))
    return {kernel["name"]: kernel["ms"] for kernel in found["kernels"]}


def measure(case: Case, share: float, *, forward: bool) -> dict[str, Any]:
    """The kernels of the exact half's forward pass, of its backward pass, and softmax."""
    tokens = math.prod(case.grid)
    shape = (case.batch, tokens, case.heads, case.head_dim)
    query, key, value, grad = torch.randn(4, *shape, dtype=torch.bfloat16, device="cuda")
    angles = torch.rand(tokens, case.head_dim // 2, device="cuda") * 2 * math.pi
    cos, sin = (angles.cos(), angles.sin()) if case.rotary else (None, None)
    layout = auto_tiles(case.grid, share)
    placed = tiling(case.grid, layout.tile, layout.window, layout.top, layout.group)
    call = TileCall(query, value, cos, sin, placed, case.head_dim**-0.5)
    loop = tile_form.forward_loop(call)
    reads = tile_form.read(query, key, value, call, loop)
    out, lse, lists = tile_form.forward(query, key, value, None, call, reads)
    packed = reads[:3] if tile_gradients.both_pack(call) else None

    def run() -> object:
        return tile_form.forward(query, key, value, None, call)

    row = {
        **case._asdict(),
        "layout": layout._asdict(),
        "share": placed.list_size / placed.num_tiles,
        "forward": kernel_ms(run),
        "forward_ms": time_ms(run),
    }
    if forward:
        return row
    return row | {
        "softmax": both(softmax, [query, key, value], grad),
        "backward": kernel_ms(
            lambda: tile_gradients.backward(
                grad, None, query, key, value, None, out, lse, lists, call, packed
            )
        ),
    }


def main() -> None:
    """Measure every shape, print the rows and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--cases", type=int, nargs="+", default=range(len(CASES)))
    parser.add_argument("--forward", action="store_true", help="the forward pass only")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for case in options.cases:
        for share in SHARES:
            rows.append(measure(CASES[case], share, forward=options.forward))
            print(json.dumps(rows[-1]), flush=True)
            write_json(options.out, {**machine(), "rows": rows}, indent=1)


if __name__ == "__main__":
    main()
