"""Time the depthwise convolution over tokens against torch's, and the pass that ends a layer.

python benchmarks/depthwise_speed.py OUT.json [--sweep]        needs CUDA

`gated` is convolution, sum and gate in one pass (`gated_conv`); `apart` is the same compiled by
torch, with only the convolution as our kernel. --sweep times the line kernels with other tiles,
numbers of warps and lines in flight, to choose `_TOKENS`, `_CHANNELS`, `_WARPS`, `_STAGES` and
`_BACKWARD`.
"""

import argparse
import math
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from kernel_speed import time_ms as kernel_ms
from rows import machine

from mhla_gen.files import write_json
from mhla_gen.ops.depthwise import depthwise_conv, gated_conv, times_silu
from mhla_gen.ops.kernels import depthwise as kernels

# (batch, grid, channels): Wan-1.3B at 480p, DiT-XL/2 at 512 and 256 px.
SHAPES = [(1, (21, 30, 50), 1536), (16, (32, 32), 1152), (64, (16, 16), 1152)]
# Tokens and channels of a tile, warps, lines in flight: those in use, then others.
FORWARD = [
    (16, 64, 4, 1), (8, 64, 4, 1), (16, 64, 4, 3), (8, 64, 2, 4), (4, 64, 4, 4), (8, 64, 4, 4),
]  # fmt: skip
BACKWARD = [
    (8, 64, 4, 4), (16, 64, 4, 1), (16, 64, 4, 3), (8, 64, 2, 4), (4, 64, 4, 4), (8, 64, 4, 1),
]  # fmt: skip
PROGRAMS = (1024, 4096)


def time_ms(function) -> float:
    """Median milliseconds of a call, with its launches."""
    return triton.testing.do_bench(function, warmup=50, rep=200, return_mode="median")


def inputs(batch, grid, channels) -> tuple:
    """Tokens, weight, bias and a gradient."""
    tokens = torch.randn(
        batch, math.prod(grid), channels, device="cuda", dtype=torch.bfloat16, requires_grad=True
    )
    weight = torch.randn(channels, 1, *[3] * len(grid), device="cuda", dtype=torch.bfloat16)
    bias = torch.zeros(channels, device="cuda", dtype=torch.bfloat16)
    weight.requires_grad_(), bias.requires_grad_()
    return tokens, weight, bias, torch.randn_like(tokens)


def measure(batch, grid, channels, implementation) -> dict:
    """Forward and forward + backward of one shape."""
    tokens, weight, bias, grad = inputs(batch, grid, channels)

    def forward():
        return depthwise_conv(tokens, weight, bias, grid=grid, implementation=implementation)

    # Lower bound: every token is read and written once.
    floor_ms = 2 * tokens.numel() * tokens.element_size() / 3.0e12 * 1e3
    times = times_of(forward, (tokens, weight, bias), grad)
    return {"implementation": implementation, **times, "floor_forward_ms": round(floor_ms, 4)}


def measure_gated(batch, grid, channels, gate, way) -> dict:
    """The pass that ends a layer, with a gate per channel, a gate per head, or none."""
    tokens, weight, bias, grad = inputs(batch, grid, channels)
    heads = channels // (72 if channels % 72 == 0 else 128)
    size = {"none": 0, "channel": channels, "head": heads}[gate]
    logits = torch.randn(*tokens.shape[:2], size, device="cuda", dtype=torch.bfloat16)
    logits = logits.requires_grad_() if size else None
    added = torch.randn_like(tokens).requires_grad_()
    options = {"grid": grid, "num_heads": heads}

    def apart():
        out = added + depthwise_conv(tokens, weight, bias, grid=grid)
        return out if logits is None else times_silu(out, logits, heads)

    def gated():
        return gated_conv(added, tokens, weight, bias, logits, **options)

    forward = torch.compile(gated if way == "gated" else apart, fullgraph=True)
    trained = [x for x in (added, tokens, weight, bias, logits) if x is not None]
    return {"implementation": way, "gate": gate, **times_of(forward, trained, grad)}


def times_of(forward, trained, grad) -> dict:
    """Milliseconds without gradients, and with a backward pass."""

    def training_step():
        torch.autograd.grad(forward(), trained, grad)

    with torch.no_grad():
        forward_ms = time_ms(forward)
    return {
        "forward_ms": round(forward_ms, 4),
        "forward_backward_ms": round(time_ms(training_step), 4),
    }


def sweep(batch, grid, channels) -> Iterator[dict]:
    """Both line kernels with other constants: the pass that ends a layer, and the backward pass."""
    tokens, weight, bias, grad = inputs(batch, grid, channels)
    logits = torch.randn_like(grad)

    @torch.no_grad()
    def forward() -> None:
        gated_conv(grad, tokens, weight, bias, logits, grid=grid, num_heads=16)

    def backward() -> None:
        kernels.depthwise_tokens_backward(grad, tokens, weight, list(grid))

    names = "_TOKENS", "_CHANNELS", "_WARPS", "_STAGES", "_BACKWARD", "_ENOUGH_PROGRAMS"
    kept = {name: getattr(kernels, name) for name in names}
    try:
        for programs, tile in product(PROGRAMS, BACKWARD):
            kernels._ENOUGH_PROGRAMS, kernels._BACKWARD = programs, tile
            yield {"kernel": "backward", **timed(tile, programs, backward)}
        for programs, tile in product(PROGRAMS, FORWARD):
            kernels._ENOUGH_PROGRAMS = programs
            kernels._TOKENS, kernels._CHANNELS, kernels._WARPS, kernels._STAGES = tile
            yield {"kernel": "forward", **timed(tile, programs, forward)}
    finally:
        for name, value in kept.items():
            setattr(kernels, name, value)


def timed(tile, programs, function) -> dict:
    """A row of the sweep."""
    names = "tokens", "channels", "warps", "lines", "programs"
    row: dict[str, Any] = dict(zip(names, (*tile, programs), strict=True))
    try:
        row["ms"] = kernel_ms(function)
    except Exception as error:
        # These constants need too many registers or too much shared memory.
        row["error"] = str(error).splitlines()[0][:100]
    return row


def main() -> None:
    """Measure, print and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--seconds", type=float, default=100, help="no row is started after these")
    options = parser.parse_args()
    report = {**machine(), "dtype": "bfloat16", "rows": []}
    began = time.perf_counter()
    work = [(measure, shape, (name,)) for shape in SHAPES for name in ("fused", "torch")]
    work += [
        (measure_gated, shape, (gate, way))
        for shape in SHAPES
        for gate in ("head", "channel", "none")
        for way in ("gated", "apart")
    ]
    if options.sweep:
        work = [(sweep, SHAPES[1], ()), *work]
    for function, shape, others in work:
        if time.perf_counter() - began > options.seconds:
            break
        found = function(*shape, *others)
        for row in [found] if isinstance(found, dict) else found:
            row = dict(zip(("batch", "grid", "channels_of_tokens"), shape, strict=True)) | row
            print(row, flush=True)
            report["rows"].append(row)
            write_json(options.out, report, indent=1)
            if time.perf_counter() - began > options.seconds:
                break


if __name__ == "__main__":
    main()
