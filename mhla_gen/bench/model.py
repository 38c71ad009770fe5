"""Whole transformers with softmax attention and with MHLA: one denoising step."""

import math
from collections.abc import Iterator
from typing import Any

import torch

from mhla_gen.bench.measure import latency_ms, peak_memory_gib
from mhla_gen.config import BenchConfig, MHLAConfig

_SOFTMAX = ("softmax", "softmax_cudnn", "softmax_flash")


def bench_model(config: BenchConfig, device: torch.device) -> Iterator[dict[str, Any]]:
    """One row for every grid and method: latency of a forward pass of random weights."""
    from mhla_gen.models import inject

    dtype = getattr(torch, config.dtype)
    grids = ((21, 30, 50),) if config.model == "wan" else ((16, 16), (32, 32))
    for grid in grids if config.grids == "models" else config.grids:
        for method in config.methods:
            row = {"method": method, "model": config.model, "grid": grid, "tokens": math.prod(grid)}
            layout = (1,) * len(grid) if method == "linear" else config.layout
            try:
                torch.manual_seed(0)
                model = _build(config, grid).to(device, dtype).eval()
                if method not in _SOFTMAX:
                    implementation = "auto" if method == "linear" else method
                    inject(model, MHLAConfig(layout=layout, implementation=implementation))
                elif method != "softmax":
                    backend = "_native_cudnn" if method == "softmax_cudnn" else "_native_flash"
                    model.set_attention_backend(backend)
                yield row | _measure(model, config, grid, device, dtype)
            except (RuntimeError, ValueError, AttributeError) as error:
                yield row | {"error": str(error).splitlines()[0]}


def _measure(
    model: Any,
    config: BenchConfig,
    grid: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Any]:
    inputs = {
        name: x.to(device, dtype) if x.is_floating_point() else x.to(device)
        for name, x in _inputs(config, grid).items()
    }
    if config.compile:
        model.compile_repeated_blocks(fullgraph=True)

    @torch.no_grad()
    def forward() -> Any:
        return model(**inputs, return_dict=False)

    forward()
    latency = latency_ms(forward, device)
    return {"forward_ms": latency, "forward_peak_gib": peak_memory_gib(forward, device)}


def _build(config: BenchConfig, grid: tuple[int, ...]) -> Any:
    """DiT-XL/2 or Wan2.1-1.3B with `num_layers` layers and random weights."""
    if config.model == "dit":
        from diffusers import DiTTransformer2DModel

        return DiTTransformer2DModel(
            num_layers=config.num_layers or 28, sample_size=2 * grid[0], out_channels=8
        )
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        num_attention_heads=12, ffn_dim=8960, num_layers=config.num_layers or 30
    )


def _inputs(config: BenchConfig, grid: tuple[int, ...]) -> dict[str, torch.Tensor]:
    batch = config.batch_size
    if config.model == "dit":
        return {
            "hidden_states": torch.randn(batch, 4, 2 * grid[0], 2 * grid[1]),
            "timestep": torch.full((batch,), 500),
            "class_labels": torch.zeros(batch, dtype=torch.int64),
        }
    frames, height, width = grid
    return {
        "hidden_states": torch.randn(batch, 16, frames, 2 * height, 2 * width),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": torch.randn(batch, 512, 4096),
    }
