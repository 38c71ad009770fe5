"""Time and memory of sampling a clip chunk by chunk: causal MHLA against softmax with a cache.

    python benchmarks/stream_speed.py OUT.json             Wan 1.3B, 480 × 832, 20 chunks
    python benchmarks/stream_speed.py OUT.json --tiny      any device, seconds
    python benchmarks/stream_speed.py OUT.json --table     only print the table

The model is Wan 2.1 1.3B in bfloat16 with random weights, which do not affect the time. A chunk of
latent frames is denoised in a few steps and then read once more without noise, so that later chunks
can attend to it. There is no guidance and no autoencoder. Both models have the same convolution and
gate. Two chunks are sampled beforehand as a warm-up. For some chunks, a profiler sums the kernels
of one more pass: without compiling, the host takes longer to launch a pass than the GPU to run it.
"""

import argparse
import time
from contextlib import nullcontext
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from rows import Row, make_parser, markdown, measure_rows, number
from torch.nn.attention import SDPBackend, sdpa_kernel

import mhla_gen
from mhla_gen import ClipState, MHLAConfig
from mhla_gen.bench.profiles import kernel_times

METHODS = {"mhla": 0.0, "softmax": 1.0}
UNITS = {
    "seconds": "s",
    "kernels_ms": "kernels of a pass, ms",
    "peak_gib": "GiB at most",
    "state_gib": "GiB kept",
}
TINY = {"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 16, "ffn_dim": 32}


def main() -> None:
    """Measure both methods."""
    parser = make_parser(__doc__, seconds=60)
    parser.add_argument("--chunks", type=int, default=20)
    parser.add_argument("--chunk-frames", type=int, default=3)
    parser.add_argument("--plane", type=int, nargs=2, default=(60, 104), help="latents")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    if args.tiny:
        args.plane, args.layers = (8, 12), 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases: list[Row] = [{"method": method} for method in args.methods]
    measure_rows(args, cases, lambda case: measure(case["method"], args, device), table)


def table(rows: list[Row]) -> str:
    """Markdown for docs/video.md: seconds, peak memory and size of the state for some chunks."""
    shown = shown_chunks(max(len(row["chunks"]) for row in rows))
    lines = []
    for row in rows:
        for key, unit in UNITS.items():
            found = [row["chunks"][number - 1].get(key) for number in shown]
            if None not in found:
                lines.append([f"{row['method']}, {unit}", *(number(x, 3) for x in found)])
    return markdown(["", *(f"chunk {number}" for number in shown)], lines)


def shown_chunks(last: int) -> list[int]:
    """Chunks that the table shows."""
    return sorted({1, 2, 5, 10, last} & set(range(1, last + 1)))


@torch.no_grad()
def measure(method: str, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Seconds, peak memory and bytes of the state, for each chunk."""
    model = build(method, args, device)
    backends = [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
    ]
    with sdpa_kernel(backends, set_priority=True) if device.type == "cuda" else nullcontext():
        state, rows = ClipState(model), []
        for _ in range(2):
            make_chunk(state, args, device)
        state = ClipState(model)
        for number in range(args.chunks):
            kernels = {}
            if device.type == "cuda" and number + 1 in shown_chunks(args.chunks):
                found = kernel_times(lambda: read(state, args, device), device)
                kernels["kernels_ms"] = found["ms"]
            synchronize(device, reset=True)
            start = time.perf_counter()
            make_chunk(state, args, device)
            synchronize(device)
            seconds = time.perf_counter() - start
            row = {"seconds": seconds, "state_gib": state.bytes / 2**30, **kernels}
            if device.type == "cuda":
                row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            rows.append(row)
            print(f"{method} chunk {number + 1}: {row}", flush=True)
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**30
    layout = model.mhla_config.layout
    return {"layout": list(layout), "weights_gib": weights, "chunks": rows}


def build(method: str, args: argparse.Namespace, device: torch.device) -> Any:
    """The model, causal over chunks of frames."""
    torch.manual_seed(0)
    sizes = TINY if args.tiny else {"num_attention_heads": 12, "ffn_dim": 8960}
    with device:
        model = WanTransformer3DModel(**sizes, num_layers=args.layers)
        # Converted last, so that weights that must be float32 stay float32.
        model.to(torch.bfloat16 if device.type == "cuda" else torch.float32)
        mhla_gen.inject(model, MHLAConfig(causal_frames=args.chunk_frames, exact=METHODS[method]))
    return model.eval()


def make_chunk(state: ClipState, args: argparse.Namespace, device: torch.device) -> None:
    """Denoise the next chunk and finish it."""
    latents = None
    for step in range(args.steps, 0, -1):
        time_now = 1000 * step / args.steps
        latents = read(state, args, device, latents, time_now, length=1 / args.steps)
    read(state, args, device, latents, 0.0, append=True)


def read(
    state: ClipState,
    args: argparse.Namespace,
    device: torch.device,
    latents: torch.Tensor | None = None,
    timestep: float = 1000.0,
    length: float = 0.0,
    append: bool = False,
) -> torch.Tensor:
    """One pass over the next chunk, by default over noise; the latents after a step."""
    model = state.model
    if latents is None:
        shape = (1, model.config.in_channels, args.chunk_frames, *args.plane)
        latents = torch.randn(shape, device=device, dtype=model.dtype)
    text = torch.randn(1, 512, model.config.text_dim, device=device, dtype=model.dtype)
    times = torch.full((1,), timestep, device=device)
    return latents - length * state(latents, times, encoder_hidden_states=text, append=append)


def synchronize(device: torch.device, reset: bool = False) -> None:
    """Wait for the device; with `reset`, also reset the peak memory."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        if reset:
            torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    main()
