"""Whole transformers with softmax attention and with MHLA: one denoising or training step."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from mhla_gen.bench.measure import (
    kernels_of,
    latency_ms,
    peak_memory_gib,
    training_kernels_of,
)
from mhla_gen.bench.profiles import as_table, kernel_times
from mhla_gen.config import BenchConfig, MHLAConfig, load_config
from mhla_gen.models import inject
from mhla_gen.models.families.dit import disable_label_dropout
from mhla_gen.models.overview import exact_pairs
from mhla_gen.models.short import unmentioned
from mhla_gen.models.transformer import MHLATransformerMixin
from mhla_gen.runtime.compiling import SUMS_APART, compile_blocks, repeated_blocks
from mhla_gen.runtime.cuda_graphs import RecordedForward
from mhla_gen.runtime.recomputing import recompute_activations
from mhla_gen.runtime.recorded_training import RecordedTraining
from mhla_gen.runtime.softmax_kernels import AttentionLengths

# The number of calls by which a step has been recorded.
_RECORDED_BY = 3

# 256 and 512 pixels; 1024 and 2048 pixels; 81 frames at 480×800.
_GRIDS = {"dit": ((16, 16), (32, 32)), "flux": ((64, 64), (128, 128)), "wan": ((21, 30, 50),)}


def bench_model(
    config: BenchConfig, device: torch.device, done: int = 0
) -> Iterator[dict[str, Any]]:
    """One row for every grid and method, after the first `done`.

    They have a forward pass of random weights, and a training step.
    """
    dtype = getattr(torch, config.dtype)
    grids = _GRIDS[config.model] if config.grids == "models" else config.grids
    rows = [(grid, method) for grid in grids for method in config.methods]
    for grid, method in rows[done:]:
        row = {"method": method, "model": config.model, "grid": grid, "tokens": math.prod(grid)}
        try:
            torch.manual_seed(0)
            # Around all of it: diffusers' DiT has no setting for its kernels.
            with kernels_of(method, device):
                model = _prepare(method, config, grid, device, dtype)
                row["exact"] = exact_pairs(model, grid)
                inputs = _inputs_of(model, config, grid, device, dtype)
                lengths = _softmax_lengths(model, inputs) if config.backward else set[int]()
                _compile(model, config)
                row |= _measure(method, model, inputs, lengths, config, device)
            yield row
        except (RuntimeError, ValueError, AttributeError) as error:
            if device.type == "cuda":
                # After a GPU fault nothing runs in this process, so it must not end as a row.
                torch.cuda.synchronize(device)
            yield row | {"error": str(error).splitlines()[0]}
        # Neither weights nor compiled code of one method are there when the next is measured.
        model = None
        torch.compiler.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _prepare(
    method: str,
    config: BenchConfig,
    grid: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
) -> Any:
    """The model with the attention that `method` names."""
    with device:
        # Without diffusers' advice about what should stay float32, which is for results.
        model: Any = torch.nn.Module.to(_build(config, grid), dtype)
    name, *settings = method.split()
    if not name.startswith("softmax"):
        layout = (1,) * len(grid) if name == "linear" else config.layout
        defaults = [f"layout={list(layout) if isinstance(layout, tuple) else layout}"]
        defaults.append(f"implementation={'auto' if name == 'linear' else name}")
        with unmentioned():
            inject(model, load_config(None, [*defaults, *settings], MHLAConfig))
    if config.backward and config.checkpointing:
        recompute_activations(model, config.checkpointing)
    return model


def _compile(model: Any, config: BenchConfig) -> None:
    if config.compile == "whole":
        model.compile(fullgraph=True, options=dict(SUMS_APART))
    elif config.compile:
        compile_blocks(model)


def _inputs_of(
    model: Any,
    config: BenchConfig,
    grid: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Any]:
    inputs: dict[str, Any] = {
        name: x.to(device, dtype) if x.is_floating_point() else x.to(device)
        for name, x in _inputs(config, grid).items()
    }
    converted = isinstance(model, MHLATransformerMixin)
    if config.model == "flux" and converted:
        # A compiled or recorded pass cannot read the grid from the values of img_ids.
        inputs["joint_attention_kwargs"] = {"grid": grid}
    return inputs


@torch.no_grad()
def _softmax_lengths(model: Any, inputs: dict[str, Any]) -> set[int]:
    """Numbers of queries and keys that attend by softmax, seen before anything is compiled."""
    with AttentionLengths() as lengths:
        model(**inputs, return_dict=False)
    return lengths.found


def _measure(
    method: str,
    model: Any,
    inputs: dict[str, Any],
    lengths: set[int],
    config: BenchConfig,
    device: torch.device,
) -> dict[str, Any]:
    model.eval()

    @torch.no_grad()
    def forward(model_or_recording: Callable[..., Any]) -> Any:
        return model_or_recording(**inputs, return_dict=False)

    recorded = RecordedForward(model) if config.cuda_graphs else None
    row = _time("forward", forward, model, recorded, config, device)
    if not config.backward:
        return row
    model.train()

    def train(model_or_recording: Callable[..., Any]) -> None:
        output = model_or_recording(**inputs, return_dict=False)[0]
        output.float().square().mean().backward()
        model.zero_grad()

    recorded = RecordedTraining(model, model) if config.cuda_graphs else None
    with training_kernels_of(method, lengths, len(repeated_blocks(model)), device):
        row |= _time("train", train, model, recorded, config, device)
    if recorded is not None:
        recorded.forget()
    return row


def _time(
    step: str,
    function: Callable[[Callable[..., Any]], object],
    model: Callable[..., Any],
    recorded: RecordedForward | RecordedTraining | None,
    config: BenchConfig,
    device: torch.device,
) -> dict[str, Any]:
    """Peak memory of `function(model)`, and its time, or that of its replays if it is recorded."""
    launched = partial(function, model)
    launched()
    # Replays allocate nothing, so the peak is that of the launched step.
    peak = peak_memory_gib(launched, device)
    timed = launched
    if recorded is not None:
        timed = partial(function, recorded)
        for _ in range(_RECORDED_BY):
            timed()
        if not recorded.replays:
            raise RuntimeError(
                "not enough memory to record this step; time it with cuda_graphs=false"
            )
    found: dict[str, Any] = {f"{step}_ms": latency_ms(timed, device), f"{step}_peak_gib": peak}
    if config.profile:
        found[f"{step}_kernels"] = kernel_times(launched, device)
        print(as_table(found[f"{step}_kernels"]), flush=True)
    return found


def _build(config: BenchConfig, grid: tuple[int, ...]) -> Any:
    """DiT-XL/2, FLUX.1-dev or Wan2.1-1.3B with `num_layers` layers and random weights."""
    if config.model == "dit":
        from diffusers import DiTTransformer2DModel

        model = DiTTransformer2DModel(
            num_layers=config.num_layers or 28, sample_size=2 * grid[0], out_channels=8
        )
        # As in training, where labels are dropped before the model. Recomputing what draws random
        # numbers cannot be recorded.
        disable_label_dropout(model)
        return model
    if config.model == "flux":
        from diffusers import FluxTransformer2DModel

        double = config.num_layers or 19
        return FluxTransformer2DModel(
            num_layers=double, num_single_layers=2 * double, guidance_embeds=True
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
    if config.model == "flux":
        height, width = grid
        return {
            "hidden_states": torch.randn(batch, height * width, 64),
            "encoder_hidden_states": torch.randn(batch, 512, 4096),
            "pooled_projections": torch.randn(batch, 768),
            "timestep": torch.full((batch,), 0.5),
            "guidance": torch.full((batch,), 3.5),
            "img_ids": torch.cartesian_prod(
                torch.zeros(1), torch.arange(float(height)), torch.arange(float(width))
            ),
            "txt_ids": torch.zeros(512, 3),
        }
    frames, height, width = grid
    return {
        "hidden_states": torch.randn(batch, 16, frames, 2 * height, 2 * width),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": torch.randn(batch, 512, 4096),
    }
