"""The public operator: check the arguments, choose an implementation, call it."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mhla_gen.errors import UserError
from mhla_gen.ops.blockwise import blockwise_mhla
from mhla_gen.ops.feature_maps import FEATURE_MAPS
from mhla_gen.ops.fused_limits import HAS_TRITON, require_triton, trains, unsupported
from mhla_gen.ops.naive import naive_mhla
from mhla_gen.ops.partition import check_grid, check_whole


def _fused_mhla(
    query: Tensor, key: Tensor, value: Tensor, mixing: Tensor, **options: Any
) -> Tensor:
    require_triton()
    # Imported on first use: Triton is neither needed nor installed everywhere.
    from mhla_gen.ops.fused import fused_mhla

    return fused_mhla(query, key, value, mixing, **options)


IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {
    "naive": naive_mhla,
    "blockwise": blockwise_mhla,
    "fused": _fused_mhla,
}


def mhla(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mixing: Tensor,
    *,
    grid: tuple[int, ...],
    layout: tuple[int, ...],
    feature_map: str = "relu",
    rotary: tuple[Tensor, Tensor] | None = None,
    normalize: bool = True,
    causal: bool = False,
    eps: float = 1e-6,
    implementation: str = "auto",
) -> Tensor:
    r"""Token-level multi-head linear attention over blocks of a token grid.

    With the feature map φ, the rotary embedding R, summaries
    $S_b = \sum_{n \in b} R(\varphi(k_n)) v_n^\top$ and key sums
    $z_b = \sum_{n \in b} \varphi(k_n)$, a token $n$ of block $i$ reads
    $$o_n = R(\varphi(q_n))^\top \sum_b m_{ib} S_b \,/\,
      (\varphi(q_n)^\top \sum_b m_{ib} z_b + \epsilon).$$
    The rotation acts on the numerator only. Causal attention sums the blocks before `i`, and of
    block `i` itself the tokens up to `n`.

    Args:
        query: `[batch, seq_len, num_heads, head_dim]`, before the feature map, tokens in raster
            order of `grid`.
        key: Like `query`.
        value: `[batch, seq_len, num_heads, value_dim]`.
        mixing: Row `i` weighs the summaries that query block `i` reads. `[num_blocks, num_blocks]`,
            or `[num_heads, num_blocks, num_blocks]` for one matrix per head.
        grid: Tokens along each axis: `(length,)`, `(height, width)` or `(frames, height, width)`.
        layout: Blocks along each axis of `grid`. Sizes need not divide, see `block_starts`.
        feature_map: Name of φ in `FEATURE_MAPS`.
        rotary: `(cos, sin)`, each `[seq_len, head_dim / 2]`; channels 2i and 2i + 1 are a pair.
        normalize: Divide by the denominator. Video and language models often do without.
        causal: Read earlier tokens only; one-dimensional grids.
        eps: Added to the denominator.
        implementation: `naive` (the definition), `blockwise` (PyTorch, any device), `fused` (CUDA
            kernels; an error where they cannot run), or `auto`: see `resolve_implementation`.

    Returns:
        `[batch, seq_len, num_heads, value_dim]` in the dtype of `query`. Sums accumulate in
        float32, or in float64 for float64 inputs.

    Raises:
        ValueError: If shapes, dtypes, devices or names do not fit; the message says what does.

    Source:
        Zhang et al. 2026, arXiv:2601.07832, Eq. (4).
    """
    grid, layout = tuple(grid), tuple(layout)
    check_tokens(query, key, value, grid)
    check_blocks(query, mixing, grid, layout)
    check_options(query, feature_map, rotary, causal, len(grid))
    implementation = resolve_implementation(
        implementation,
        device=query.device,
        dtype=query.dtype,
        head_dim=query.shape[3],
        value_dim=value.shape[3],
        num_blocks=math.prod(layout),
        trainable_rotary=trains(rotary),
    )
    return IMPLEMENTATIONS[implementation](
        query,
        key,
        value,
        mixing,
        grid=grid,
        layout=layout,
        feature_map=feature_map,
        rotary=rotary,
        normalize=normalize,
        causal=causal,
        eps=eps,
    )


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    feature_map: str = "relu",
    rotary: tuple[Tensor, Tensor] | None = None,
    normalize: bool = True,
    causal: bool = False,
    eps: float = 1e-6,
    implementation: str = "auto",
) -> Tensor:
    """Plain linear attention: MHLA with a single block. Arguments as in `mhla`.

    Source:
        Katharopoulos et al. 2020, arXiv:2006.16236, Eq. (5) and (12).
    """
    return mhla(
        query,
        key,
        value,
        torch.ones(1, 1, dtype=torch.float32, device=query.device),
        grid=tuple(query.shape[1:2]),
        layout=(1,),
        feature_map=feature_map,
        rotary=rotary,
        normalize=normalize,
        causal=causal,
        eps=eps,
        implementation=implementation,
    )


def resolve_implementation(
    implementation: str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    head_dim: int = 64,
    value_dim: int = 64,
    num_blocks: int = 1,
    trainable_rotary: bool = False,
) -> str:
    """The implementation that `mhla` runs when asked for `implementation`.

    `auto` uses the fused kernels for every call that they support, which on a GPU is never the
    slower choice, and `blockwise` otherwise.

    Args:
        implementation: `auto`, or a name in `IMPLEMENTATIONS`, which is returned as it is.
        device: Device of the tensors, like the next arguments for `auto` only.
        dtype: Dtype of query, key and value.
        head_dim: Channels of a head of query and key.
        value_dim: Channels of a head of value.
        num_blocks: Number of blocks.
        trainable_rotary: Whether the rotary tables need gradients.

    Raises:
        ValueError: If there is no such implementation.
    """
    if implementation not in ("auto", *IMPLEMENTATIONS):
        names = ", ".join(["auto", *IMPLEMENTATIONS])
        raise UserError(f"implementation must be one of {names}, found {implementation!r}")
    if implementation != "auto":
        return implementation
    if torch.device(device).type != "cuda" or not HAS_TRITON:
        return "blockwise"
    reason = unsupported(device, dtype, head_dim, value_dim, num_blocks, trainable_rotary)
    return "fused" if reason is None else "blockwise"


def check_tokens(query: Tensor, key: Tensor, value: Tensor, grid: tuple[int, ...]) -> None:
    """Raise `ValueError` unless tokens share dtype and device and fill the grid."""
    if query.ndim != 4 or key.shape != query.shape:
        raise ValueError(
            "query and key must both be [batch, seq_len, num_heads, head_dim], found "
            f"{tuple(query.shape)} and {tuple(key.shape)}"
        )
    if value.ndim != 4 or value.shape[:3] != query.shape[:3]:
        raise ValueError(
            f"value must be [batch, seq_len, num_heads, value_dim] with the first three sizes of "
            f"query {tuple(query.shape[:3])}, found {tuple(value.shape)}"
        )
    check_alike(query, key, value)
    if query.shape[3] == 0:
        raise ValueError(f"head_dim must be at least 1, found query {tuple(query.shape)}")
    check_grid(grid)
    if math.prod(grid) != query.shape[1]:
        raise ValueError(
            f"the axes of grid must multiply to seq_len={query.shape[1]}, found {grid}"
        )


def check_alike(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise `ValueError` unless tokens share one floating dtype and one device."""
    if not query.dtype == key.dtype == value.dtype or not query.is_floating_point():
        raise ValueError(
            "query, key and value must share one floating dtype, found "
            f"{query.dtype}, {key.dtype} and {value.dtype}"
        )
    if not query.device == key.device == value.device:
        raise ValueError(
            "query, key and value must be on one device, found "
            f"{query.device}, {key.device} and {value.device}"
        )


def check_blocks(
    query: Tensor, mixing: Tensor, grid: tuple[int, ...], layout: tuple[int, ...]
) -> None:
    """Raise `ValueError` unless layout and mixing fit the grid and the query's heads."""
    check_whole(layout=layout)
    if len(layout) != len(grid):
        raise UserError(f"layout needs one entry per axis of grid={grid}, found layout={layout}")
    for axis, (length, num_blocks) in enumerate(zip(grid, layout, strict=True)):
        if not 1 <= num_blocks <= length:
            raise UserError(
                f"layout={layout} must have 1 to {length} blocks along axis {axis} of grid={grid}, "
                f"found {num_blocks}"
            )
    num_heads, num_blocks = query.shape[2], math.prod(layout)
    shapes = ((num_blocks, num_blocks), (num_heads, num_blocks, num_blocks))
    if tuple(mixing.shape) not in shapes or not mixing.is_floating_point():
        raise UserError(
            f"mixing for layout={layout} and {num_heads} heads must be floating with shape "
            f"{shapes[0]} or {shapes[1]}, found {mixing.dtype} {tuple(mixing.shape)}"
        )
    if mixing.device != query.device:
        raise ValueError(f"mixing is on {mixing.device} but query on {query.device}")


def check_options(
    query: Tensor,
    feature_map: str,
    rotary: tuple[Tensor, Tensor] | None,
    causal: bool,
    rank: int,
) -> None:
    """Raise `ValueError` unless names are known and rotary tables fit the query's tokens."""
    check_feature_map(feature_map)
    if causal and rank != 1:
        raise ValueError(f"causal attention needs a one-dimensional grid, found {rank} axes")
    check_rotary(query, rotary)


def check_feature_map(name: str) -> None:
    """Raise `ValueError` unless there is such a feature map."""
    if name not in FEATURE_MAPS:
        raise UserError(f"feature_map must be one of {list(FEATURE_MAPS)}, found {name!r}")


def check_rotary(query: Tensor, rotary: tuple[Tensor, Tensor] | None) -> None:
    """Raise `ValueError` unless rotary tables fit the query's tokens."""
    if rotary is None:
        return
    shape = (query.shape[1], query.shape[3] // 2)
    found = [tuple(table.shape) for table in rotary]
    if query.shape[3] % 2 or found != [shape, shape]:
        raise ValueError(
            f"rotary must be (cos, sin), each [seq_len, head_dim / 2] = {shape} with an even "
            f"head_dim, found {found} for head_dim={query.shape[3]}"
        )
    check_tables(query, rotary)


def check_tables(query: Tensor, rotary: tuple[Tensor, Tensor]) -> None:
    """Raise `ValueError` unless rotary tables are real numbers on the query's device."""
    for table in rotary:
        if not table.is_floating_point():
            raise ValueError(f"rotary must be (cos, sin) in a floating dtype, found {table.dtype}")
        if table.device != query.device:
            raise ValueError(f"rotary is on {table.device} but query on {query.device}")
