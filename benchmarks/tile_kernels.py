"""Time of every kernel of tile attention, at shapes of image and video models.

python benchmarks/tile_kernels.py OUT.json        needs CUDA

Means over three passes from torch's profiler, in milliseconds; bfloat16.
"""

import argparse
import json
import math
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from tile_speed import both, softmax
from torch.profiler import ProfilerActivity, profile

from mhla_gen.bench.ops import Case
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
_PASSES = 3


def kernel_ms(function: Callable[[], object]) -> dict[str, float]:
    """Milliseconds by the name of a kernel."""
    function()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(_PASSES):
            function()
        torch.cuda.synchronize()
    events = {
        event.key: event.device_time_total / _PASSES / 1e3 for event in profiler.key_averages()
    }
    return {name: round(ms, 4) for name, ms in events.items() if ms > 0}


def measure(case: Case, share: float) -> dict[str, Any]:
    """Softmax, and the kernels of both passes of the exact half."""
    tokens = math.prod(case.grid)
    shape = (case.batch, tokens, case.heads, case.head_dim)
    query, key, value, grad = torch.randn(4, *shape, dtype=torch.bfloat16, device="cuda")
    angles = torch.rand(tokens, case.head_dim // 2, device="cuda") * 2 * math.pi
    cos, sin = (angles.cos(), angles.sin()) if case.rotary else (None, None)
    layout = auto_tiles(case.grid, share)
    placed = tiling(case.grid, layout.tile, layout.window, layout.top, layout.group)
    call = TileCall(query, value, cos, sin, placed, case.head_dim**-0.5)
    out, lse, lists = tile_form.forward(query, key, value, None, call)
    return {
        **case._asdict(),
        "layout": layout._asdict(),
        "share": placed.list_size / placed.num_tiles,
        "softmax": both(softmax, [query, key, value], grad),
        "forward": kernel_ms(lambda: tile_form.forward(query, key, value, None, call)),
        "backward": kernel_ms(
            lambda: tile_gradients.backward(
                grad, None, query, key, value, None, out, lse, lists, call
            )
        ),
    }


def main() -> None:
    """Measure every shape, print the rows and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    found: dict[str, Any] = {
        "command": f"python benchmarks/tile_kernels.py {out.name}",
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "rows": [measure(case, share) for case in CASES for share in SHARES],
    }
    print(json.dumps(found["rows"]))
    out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
