"""Time the depthwise convolution over tokens against torch's, and the pass that ends a layer.

python benchmarks/depthwise_speed.py OUT.json [--sweep]        needs CUDA

`gated` is convolution, sum and gate in one pass (`gated_conv`); `apart` is the same compiled by
torch, with only the convolution as our kernel. --sweep times the line kernels with other tiles,
numbers of warps and lines in flight, to choose `_TOKENS`, `_CHANNELS`, `_WARPS` and `_STAGES`.
"""

import argparse
import math
import time
from pathlib import Path

import torch
import triton
from rows import machine

from mhla_gen.files import write_json
from mhla_gen.ops.depthwise import depthwise_conv, gated_conv, times_silu
from mhla_gen.ops.kernels import depthwise as kernels

# (batch, grid, channels): Wan-1.3B at 480p, DiT-XL/2 at 512 and 256 px.
SHAPES = [(1, (21, 30, 50), 1536), (16, (32, 32), 1152), (64, (16, 16), 1152)]
# Tokens and channels of a tile, warps.
TILES = [(16, 64, 4), (16, 64, 8), (8, 64, 2), (8, 64, 4), (32, 64, 8), (16, 128, 8), (16, 32, 2)]


def time_ms(function, brief: bool = False) -> float:
    """Median milliseconds of a call."""
    warmup, rep = (5, 20) if brief else (50, 200)
    return triton.testing.do_bench(function, warmup=warmup, rep=rep, return_mode="median")


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


def sweep(batch, grid, channels) -> list[dict]:
    """Both line kernels with other constants: forward only, and backward only."""
    tokens, weight, bias, grad = inputs(batch, grid, channels)
    rows = []
    kept = kernels._TOKENS, kernels._CHANNELS, kernels._WARPS, kernels._STAGES

    @torch.no_grad()
    def forward() -> None:
        kernels.depthwise_tokens(tokens, weight, bias, list(grid))

    def backward() -> None:
        kernels.depthwise_tokens_backward(grad, tokens, weight, list(grid))

    for size, width, warps in TILES:
        kernels._TOKENS, kernels._CHANNELS, kernels._WARPS = size, width, warps
        row = {"tokens": size, "channels": width, "warps": warps}
        try:
            row["backward_ms"] = time_ms(backward, brief=True)
            for stages in (1, 3):
                kernels._STAGES = stages
                row[f"forward_ms_{stages}_stages"] = time_ms(forward, brief=True)
        except Exception as error:
            # These constants need too many registers or too much shared memory.
            row["error"] = str(error).splitlines()[0][:100]
        rows.append(row)
    kernels._TOKENS, kernels._CHANNELS, kernels._WARPS, kernels._STAGES = kept
    return rows


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
        work = [(sweep, shape, ()) for shape in SHAPES[1:]] + work
    for function, shape, others in work:
        if time.perf_counter() - began > options.seconds:
            break
        found = function(*shape, *others)
        for row in found if isinstance(found, list) else [found]:
            row = dict(zip(("batch", "grid", "channels_of_tokens"), shape, strict=True)) | row
            print(row, flush=True)
            report["rows"].append(row)
        write_json(options.out, report, indent=1)


if __name__ == "__main__":
    main()
