"""Time the depthwise convolution over tokens against torch's, forward and forward + backward.

python benchmarks/depthwise_speed.py OUT.json        needs CUDA
"""

import json
import math
import platform
import sys
from datetime import date
from pathlib import Path

import torch
import triton

from mhla_gen.ops.depthwise import depthwise_conv

# (batch, grid, channels): Wan-1.3B at 480p, DiT-XL/2 at 512 and 256 px.
SHAPES = [(1, (21, 30, 50), 1536), (16, (32, 32), 1152), (64, (16, 16), 1152)]


def time_ms(function) -> float:
    """Median milliseconds of a call."""
    return triton.testing.do_bench(function, warmup=50, rep=200, return_mode="median")


def measure(batch, grid, channels, implementation) -> dict:
    """Forward and forward + backward of one shape."""
    tokens = torch.randn(
        batch, math.prod(grid), channels, device="cuda", dtype=torch.bfloat16, requires_grad=True
    )
    weight = torch.randn(channels, 1, *[3] * len(grid), device="cuda", dtype=torch.bfloat16)
    bias = torch.zeros(channels, device="cuda", dtype=torch.bfloat16)
    weight.requires_grad_(), bias.requires_grad_()
    grad = torch.randn_like(tokens)

    def forward():
        return depthwise_conv(tokens, weight, bias, grid=grid, implementation=implementation)

    def training_step():
        torch.autograd.grad(forward(), (tokens, weight, bias), grad)

    with torch.no_grad():
        forward_ms = time_ms(forward)
    # The floor: every token read and written once.
    floor_ms = 2 * tokens.numel() * tokens.element_size() / 3.0e12 * 1e3
    return {
        "batch": batch,
        "grid": grid,
        "channels": channels,
        "implementation": implementation,
        "forward_ms": round(forward_ms, 4),
        "forward_backward_ms": round(time_ms(training_step), 4),
        "floor_forward_ms": round(floor_ms, 4),
    }


def main(out: str) -> None:
    """Measure every shape with every implementation, print and write the rows."""
    rows = [measure(*shape, name) for shape in SHAPES for name in ("torch", "fused")]
    for row in rows:
        print(row)
    report = {
        "command": "python benchmarks/depthwise_speed.py",
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name(),
        "versions": {
            "torch": torch.__version__,
            "triton": triton.__version__,
            "python": platform.python_version(),
        },
        "dtype": "bfloat16",
        "rows": rows,
    }
    Path(out).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
