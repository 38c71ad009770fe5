"""Attention operators side by side: softmax, linear attention, Linformer, every kind of MHLA."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhla_gen.bench.measure import (
    SOFTMAX,
    copy_bandwidth,
    device_ms,
    kernels_of,
    peak_memory_gib,
)
from mhla_gen.config import (
    BenchConfig,
    CausalMHLAConfig,
    ConfigError,
    LinformerConfig,
    MHLAConfig,
    load_config,
)
from mhla_gen.errors import UserError
from mhla_gen.models.attention import MHLA
from mhla_gen.models.exact import exact_attention, exact_share
from mhla_gen.models.linformer import Linformer
from mhla_gen.ops import IMPLEMENTATIONS, auto_layout, linear_attention, locality_mixing, mhla

_CAUSAL = ("softmax_causal", "causal")
# Settings of MHLA that ask for its layer, rather than its operator.
_OF_LAYER = ("feature_map", "magnitude", "learned_features")


class Case(NamedTuple):
    """One problem size."""

    batch: int
    heads: int
    grid: tuple[int, ...]
    head_dim: int
    layout: tuple[int, ...]
    rotary: bool


# DiT-XL/2 at 256 and at 512 pixels, a 2048-pixel image, Wan2.1-1.3B at 480p, Wan-14B at 720p.
MODELS = (
    Case(64, 16, (16, 16), 72, (4, 4), False),
    Case(16, 16, (32, 32), 72, (4, 4), False),
    Case(1, 6, (128, 128), 64, auto_layout((128, 128)), False),
    Case(1, 12, (21, 30, 50), 128, (3, 5, 10), True),
    Case(1, 40, (21, 45, 80), 128, (3, 5, 10), True),
)


def cases(config: BenchConfig) -> tuple[Case, ...]:
    """The problem sizes of a config."""
    if config.grids == "models":
        return MODELS
    return tuple(
        Case(
            config.batch_size,
            config.num_heads,
            grid,
            config.head_dim,
            auto_layout(grid) if config.layout == "auto" else config.layout,
            config.rotary,
        )
        for grid in config.grids
    )


def bench_ops(config: BenchConfig, device: torch.device, done: int = 0) -> Iterator[dict[str, Any]]:
    """One row for every problem size and method, as they are measured, after the first `done`."""
    bandwidth = copy_bandwidth(device)
    dtype = getattr(torch, config.dtype)
    rows = [(case, method) for case in cases(config) for method in config.methods]
    for case, method in rows[done:]:
        row = {"method": method, **case._asdict(), "tokens": math.prod(case.grid)}
        row["causal"] = method.split()[0] in _CAUSAL
        row["exact"] = _share(method, case.grid)
        try:
            yield row | _measure(method, case, dtype, device, bandwidth, config.backward)
        except (RuntimeError, ValueError) as error:
            # A method that cannot run a size is part of the result.
            yield row | {"error": str(error).splitlines()[0]}
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _measure(
    method: str,
    case: Case,
    dtype: torch.dtype,
    device: torch.device,
    bandwidth: float,
    backward: bool,
) -> dict[str, Any]:
    tokens = math.prod(case.grid)
    shape = (case.batch, tokens, case.heads, case.head_dim)
    query, key, value, grad = (torch.randn(shape, dtype=dtype, device=device) for _ in range(4))
    attend = attention(method, case, dtype, device)
    floor_ms = 4e3 * query.numel() * query.element_size() / bandwidth

    forward = torch.no_grad()(partial(attend, query, key, value))
    row = {
        "floor_ms": floor_ms,
        "forward_ms": device_ms(forward, device),
        "forward_peak_gib": peak_memory_gib(forward, device),
    }
    row["floor_share"] = floor_ms / row["forward_ms"]
    if not backward:
        return row
    inputs = [x.requires_grad_() for x in (query, key, value)]

    def train() -> tuple[Tensor, ...]:
        return torch.autograd.grad(attend(*inputs), inputs, grad)

    return row | {
        "train_ms": device_ms(train, device),
        "train_peak_gib": peak_memory_gib(train, device),
    }


def _share(method: str, grid: tuple[int, ...]) -> float:
    """The share of pairs that softmax computes; causal, of pairs with keys that are not later."""
    config = settings_of(method)
    if config is None:
        return 1.0
    if isinstance(config, CausalMHLAConfig):
        tokens = math.prod(grid)
        window = min(config.window, tokens)
        pairs = window * tokens - window * (window - 1) // 2
        return pairs / (tokens * (tokens + 1) // 2)
    return exact_share(config, grid)


def attention(
    method: str, case: Case, dtype: torch.dtype, device: torch.device
) -> Callable[..., Tensor]:
    """What a row of `BenchConfig.methods` measures: a function of queries, keys and values."""
    if method in SOFTMAX:
        return partial(_softmax, method)
    rotary = None
    if case.rotary:
        angles = torch.rand(math.prod(case.grid), case.head_dim // 2, device=device) * 2 * math.pi
        rotary = angles.cos(), angles.sin()
    if method == "linear":
        return partial(linear_attention, rotary=rotary)
    config: Any = settings_of(method)
    if isinstance(config, LinformerConfig):
        return _as_in_models(_linformer(config, case), case, dtype, device, rotary)
    if isinstance(config, CausalMHLAConfig):
        return _causal(config, case, dtype, device, rotary)
    linear = method.startswith("linear")
    if linear or any(setting.startswith(_OF_LAYER) for setting in method.split()[1:]):
        layout = (1,) * len(case.grid) if linear else case.layout
        config = replace(config, layout=layout, conv=False, gate=False)
        layer = MHLA(*_sizes(case), config)
        return _as_in_models(layer, case, dtype, device, rotary)
    mixing = locality_mixing(case.layout).to(device).requires_grad_()

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        halves = []
        if config.exact > 0:
            exact = exact_attention(query, key, value, config, case.grid, rotary)
            halves.append(exact)
        if config.has_linear:
            placed = {"grid": case.grid, "layout": case.layout, "rotary": rotary}
            implementation = config.implementation
            halves.append(mhla(query, key, value, mixing, **placed, implementation=implementation))
        return halves[0] if len(halves) == 1 else torch.lerp(*halves, weight=0.5)

    return attend


def _sizes(case: Case) -> tuple[int, int, int]:
    return case.heads, case.head_dim, case.heads * case.head_dim


def _linformer(config: LinformerConfig, case: Case) -> Linformer:
    config = replace(config, grid=case.grid, conv=False, gate=False)
    fits = len(config.projected) == len(config.lengths)
    if not fits or any(k > n for k, n in zip(config.projected, config.lengths, strict=True)):
        raise UserError(
            f"projected_len={config.projected_len} is more than the tokens of {case.grid}, or has "
            "another number of axes"
        )
    return Linformer(*_sizes(case), config)


def _as_in_models(
    layer: Any, case: Case, dtype: torch.dtype, device: torch.device, rotary: Any
) -> Callable[..., Tensor]:
    """The attention that `inject` puts into a layer."""
    _cast(layer, dtype, device)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # Queries stand for the layer's input, by which the halves are weighed.
        hidden = query.flatten(2)
        return layer(query, key, value, hidden, case.grid, rotary).unflatten(2, (case.heads, -1))

    return attend


def _causal(
    config: CausalMHLAConfig, case: Case, dtype: torch.dtype, device: torch.device, rotary: Any
) -> Callable[..., Tensor]:
    # transformers, which it is for, takes seconds to import.
    from mhla_gen.models.causal_attention import CausalMHLA

    heads, _, hidden_size = _sizes(case)
    layer = _cast(CausalMHLA(heads, heads, hidden_size, config), dtype, device)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return layer(query, key, value, rotary, None, query.flatten(2))

    return attend


def _cast(layer: nn.Module, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Move a layer; mixing stays float32, as in models."""
    for name, parameter in layer.to(device).named_parameters():
        if name not in ("mixing", "log_weights"):
            parameter.data = parameter.data.to(dtype)
    return layer


def settings_of(method: str) -> MHLAConfig | LinformerConfig | CausalMHLAConfig | None:
    """Settings that a row of `BenchConfig.methods` names; None for softmax.

    Raises:
        ConfigError: If a setting is wrong.
    """
    name, *settings = method.split()
    if name in SOFTMAX:
        return None
    schemas: dict[str, type] = {"linformer": LinformerConfig, "causal": CausalMHLAConfig}
    if name not in schemas:
        implementation = name if name in IMPLEMENTATIONS else "auto"
        settings = [f"implementation={implementation}", *settings]
    try:
        return load_config(None, settings, schemas.get(name, MHLAConfig))
    except ConfigError as error:
        raise ConfigError(f"methods: {error}, in {method!r}") from error


def _softmax(method: str, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    # Rotary is left out: models rotate queries and keys before they call softmax attention.
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    with kernels_of(method, query.device):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=method in _CAUSAL)
    return out.transpose(1, 2)
