"""The longest clip that fits into a GPU's memory: Wan2.1-1.3B with softmax, MHLA and a hybrid.

    python benchmarks/longest_clip.py OUT.json --verify        needs CUDA

Peak memory is linear in the number of layers L and of tokens N: (a + b L) + (c + d L) N. Four runs
with few layers and two lengths determine the four coefficients for one denoising step in bfloat16,
and for one training step as in `mhla-gen train`: float32 weights, bfloat16 arithmetic, gradient
checkpointing; AdamW and the average of the weights add 12 bytes per parameter. `--verify` runs a
denoising step of the whole model at the predicted length, if that takes only seconds.
"""

import argparse
import gc
import itertools
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import WanTransformer3DModel
from rows import machine

import mhla_gen
from mhla_gen.config import MHLAConfig
from mhla_gen.files import write_json

METHODS = {"softmax": None, "mhla": "all", "mhla 2/3": "2/3"}
PLANES = {"480p": (60, 104), "720p": (90, 160)}
DEVICE = torch.device("cuda")
LAYERS = 30
KEPT_BYTES = 12


def build(method: str, layers: int, dtype: torch.dtype):
    """Wan2.1-1.3B's sizes with `layers` layers, on the GPU."""
    torch.manual_seed(0)
    with DEVICE:
        model = WanTransformer3DModel(
            num_attention_heads=12, ffn_dim=8960, num_layers=layers, rope_max_seq_len=8192
        )
    if METHODS[method] is not None:
        mhla_gen.inject(model, MHLAConfig(layers=METHODS[method]))
    model.set_attention_backend("_native_cudnn")
    return model.to(dtype)


def peak_bytes(method: str, layers: int, frames: int, plane: tuple[int, int], train: bool) -> int:
    """Peak memory during one step, including weights and their gradients."""
    model = build(method, layers, torch.float32 if train else torch.bfloat16)
    dtype = torch.float32 if train else torch.bfloat16
    inputs = (
        torch.randn(1, 16, frames, *plane, device=DEVICE, dtype=dtype),
        torch.full((1,), 500, device=DEVICE),
        torch.randn(1, 512, 4096, device=DEVICE, dtype=dtype),
    )
    torch.cuda.reset_peak_memory_stats()
    if train:
        model.train().enable_gradient_checkpointing()
        with torch.autocast("cuda", torch.bfloat16):
            model(*inputs, return_dict=False)[0].float().square().mean().backward()
    else:
        with torch.no_grad():
            model(*inputs, return_dict=False)
    peak = torch.cuda.max_memory_allocated()
    del model, inputs
    gc.collect()
    torch.cuda.empty_cache()
    return peak


def longest(method: str, plane: tuple[int, int], train: bool, budget: float) -> dict:
    """Number of frames that fit, and the coefficients of the prediction."""
    tokens = plane[0] * plane[1] // 4
    lengths = (9, 21)
    # In a hybrid, one of every three layers is softmax.
    counts = (3, 6)
    rows, peaks = [], []
    for layers, frames in itertools.product(counts, lengths):
        peaks.append(peak_bytes(method, layers, frames, plane, train))
        rows.append((1, layers, frames * tokens, layers * frames * tokens))
    a, b, c, d = np.linalg.solve(np.array(rows, float), np.array(peaks, float))
    parameters = sum(p.numel() for p in _on_meta(method).parameters())
    constant = a + b * LAYERS + (KEPT_BYTES * parameters if train else 0)
    slope = c + d * LAYERS
    latent_frames = int((budget - constant) / slope / tokens)
    return {
        "method": method,
        "step": "training" if train else "denoising",
        "plane": list(plane),
        "gib_without_tokens": constant / 2**30,
        "kib_per_token": slope / 2**10,
        "latent_frames": latent_frames,
        "frames": max(0, 4 * (latent_frames - 1) + 1),
        "tokens": latent_frames * tokens,
    }


def _on_meta(method: str):
    with torch.device("meta"):
        model = WanTransformer3DModel(num_attention_heads=12, ffn_dim=8960, num_layers=LAYERS)
        if METHODS[method] is not None:
            mhla_gen.inject(model, MHLAConfig(layers=METHODS[method]))
    return model


def main() -> None:
    """Predict for every method, size and step; print and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--planes", nargs="+", default=list(PLANES), choices=list(PLANES))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--steps", nargs="+", default=["denoising", "training"])
    parser.add_argument("--verify", action="store_true")
    options = parser.parse_args()
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    # The allocator, cuDNN and the CUDA context need part of the memory.
    budget = total - 2 * 2**30
    facts = {**machine(), "budget_gib": budget / 2**30}
    rows = []
    for plane, method, step in itertools.product(options.planes, options.methods, options.steps):
        row = longest(method, PLANES[plane], step == "training", budget) | {"size": plane}
        if options.verify and method == "mhla" and step == "denoising":
            # The last per cent is lost to fragmentation.
            frames = int(0.97 * row["latent_frames"])
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            peak = peak_bytes(method, LAYERS, frames, PLANES[plane], False)
            end.record()
            end.synchronize()
            row["verified"] = {
                "latent_frames": frames,
                "peak_gib": peak / 2**30,
                "seconds_with_building": begin.elapsed_time(end) / 1e3,
            }
        rows.append(row)
        print(json.dumps(row), flush=True)
        write_json(options.out, facts | {"rows": rows}, indent=1)


if __name__ == "__main__":
    main()
