"""Time and memory of sampling a clip chunk by chunk: causal MHLA against softmax with a cache.

    python benchmarks/stream_speed.py OUT.json             Wan 1.3B, 480 × 832, 20 chunks
    python benchmarks/stream_speed.py OUT.json --tiny      any device, seconds
    python benchmarks/stream_speed.py OUT.json --table     only print the table

The model is Wan 2.1 1.3B in bfloat16 with random weights, which do not affect the time. A chunk of
latent frames is denoised in a few steps and then read once more without noise, so that later chunks
can attend to it. There is no guidance and no autoencoder. Both models have the same convolution and
gate. Two chunks are sampled beforehand as a warm-up.
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

METHODS = {"mhla": 0.0, "softmax": 1.0}
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
    last = max(len(row["chunks"]) for row in rows)
    shown = sorted({1, 2, 5, 10, last} & set(range(1, last + 1)))
    lines = []
    for row in rows:
        for key, unit in (("seconds", "s"), ("peak_gib", "GiB at most"), ("state_gib", "GiB kept")):
            found = [row["chunks"][number - 1].get(key) for number in shown]
            if None not in found:
                lines.append([f"{row['method']}, {unit}", *(number(x, 3) for x in found)])
    return markdown(["", *(f"chunk {number}" for number in shown)], lines)


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
            synchronize(device, reset=True)
            start = time.perf_counter()
            make_chunk(state, args, device)
            synchronize(device)
            row = {"seconds": time.perf_counter() - start, "state_gib": state.bytes / 2**30}
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
    model = state.model
    shape = (1, model.config.in_channels, args.chunk_frames, *args.plane)
    latents = torch.randn(shape, device=device, dtype=model.dtype)
    text = torch.randn(1, 512, model.config.text_dim, device=device, dtype=model.dtype)
    for step in range(args.steps, 0, -1):
        time_now = torch.full((1,), 1000 * step / args.steps, device=device)
        velocity = state(latents, time_now, encoder_hidden_states=text)
        latents = latents - velocity / args.steps
    clean = torch.zeros(1, device=device)
    state(latents, clean, encoder_hidden_states=text, append=True)


def synchronize(device: torch.device, reset: bool = False) -> None:
    """Wait for the device; with `reset`, also reset the peak memory."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        if reset:
            torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    main()
