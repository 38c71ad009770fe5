"""MHLA that is causal over chunks of frames and full within a chunk, as streaming needs.

The first axis of the grid is time. It is split into chunks of a fixed number of frames, and each
chunk into blocks along the other axes. As in causal MHLA over tokens, there is one weight per
distance between chunks, so a clip may have any number of chunks.

Source: Zhang et al. 2026, arXiv:2601.07832, Sec. 4 and App. C (causal, over blocks of text).
"""

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mhla_gen.errors import UserError
from mhla_gen.ops.causal import distance_mixing
from mhla_gen.ops.dispatch import check_options, check_tokens, mhla
from mhla_gen.ops.feature_maps import FEATURE_MAPS
from mhla_gen.ops.mixing import check_axes
from mhla_gen.ops.naive import naive_frame_causal_mhla
from mhla_gen.ops.partition import check_whole


def frame_locality(layout: tuple[int, ...]) -> Tensor:
    r"""Weights that favour near blocks and near chunks.

    $w_{dij} \propto 1 - \mathrm{dist} / \mathrm{furthest}$ with Euclidean distances in chunks and
    blocks, where `furthest` is the largest distance of row $i$ with one more chunk. So no weight
    is 0, since the last distance also covers all larger ones. The weights that a block reads sum
    to 1.

    Args:
        layout: Number of distances between chunks that get weights, then blocks along each other
            axis.

    Returns:
        Float32 `[distances, blocks, blocks]`.

    Raises:
        ValueError: If an axis has no blocks.
    """
    check_axes(layout)
    places = list(itertools.product(*map(range, layout[1:])))
    blocks = torch.tensor(places, dtype=torch.float64).reshape(len(places), -1)
    space = (blocks.unsqueeze(1) - blocks).square().sum(-1)
    time = torch.arange(layout[0] + 1, dtype=torch.float64).square()
    distance = (time[:, None, None] + space).sqrt()
    weights = 1 - distance[:-1] / distance.amax(dim=(0, 2), keepdim=True)
    return (weights / weights.sum(dim=(0, 2), keepdim=True)).float()


def frame_uniform(layout: tuple[int, ...]) -> Tensor:
    """Equal weights; argument, result and errors as for `frame_locality`."""
    check_axes(layout)
    blocks = math.prod(layout[1:])
    shape = (layout[0], blocks, blocks)
    return torch.full(shape, 1 / math.prod(layout), dtype=torch.float32)


FRAME_MIXING_INITS = {"locality": frame_locality, "uniform": frame_uniform}


def frame_mixing(weights: Tensor, num_chunks: int) -> Tensor:
    """The mixing matrix of a clip: chunk g reads chunk c with `weights[min(g - c, D - 1)]`.

    Args:
        weights: `[..., D, blocks, blocks]`.
        num_chunks: Number of chunks of the clip.

    Returns:
        `[..., num_chunks * blocks, num_chunks * blocks]`, 0 where chunk c comes after chunk g.
    """
    # [..., row, column, chunk of the row, chunk of the column]
    pairs = distance_mixing(weights.movedim(-3, -1), num_chunks)
    return pairs.movedim(-2, -4).transpose(-2, -1).flatten(-4, -3).flatten(-2)


def frame_causal_mhla(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Tensor,
    *,
    grid: tuple[int, ...],
    chunk_frames: int,
    layout: tuple[int, ...],
    feature_map: str = "relu",
    rotary: tuple[Tensor, Tensor] | None = None,
    normalize: bool = True,
    eps: float = 1e-6,
    implementation: str = "auto",
) -> Tensor:
    r"""MHLA of a whole clip, causal over chunks.

    Token $n$ in block $i$ of chunk $g$ reads all tokens $s$ of chunks $c \le g$, where $j$ is the
    block of $s$:
    $$o_n = \sum_s w_{\min(g - c, D - 1), i, j} R(\varphi(q_n))^\top R(\varphi(k_s)) v_s \,/\,
      (\sum_s w_{\min(g - c, D - 1), i, j} \varphi(q_n)^\top \varphi(k_s) + \epsilon).$$
    `FrameState` computes the same function chunk by chunk.

    Args:
        query: `[batch, seq_len, num_heads, head_dim]`, before the feature map, raster order.
        key: Like `query`.
        value: `[batch, seq_len, num_heads, value_dim]`.
        weights: $w$, `[D, blocks, blocks]` or `[num_heads, D, blocks, blocks]`, row = query block.
            Non-negative if `normalize`.
        grid: Number of frames, then of tokens along each other axis.
        chunk_frames: Frames per chunk; the last chunk may have fewer.
        layout: Blocks of a chunk along each axis except the first.
        feature_map: Name of φ in `FEATURE_MAPS`.
        rotary: `(cos, sin)`, each `[seq_len, head_dim / 2]`, by positions in the whole clip.
        normalize: Divide by the denominator.
        eps: Added to the denominator.
        implementation: As in `mhla`.

    Returns:
        `[batch, seq_len, num_heads, value_dim]` in the dtype of `query`.

    Raises:
        ValueError: If shapes, dtypes, devices or names do not fit; the message says what does.
    """
    check_frame_causal(query, key, value, weights, grid, chunk_frames, layout)
    check_options(query, feature_map, rotary, False, len(grid))
    options: dict[str, Any] = {"rotary": rotary, "normalize": normalize, "eps": eps}
    if implementation == "naive":
        sizes = {"grid": grid, "chunk_frames": chunk_frames, "layout": layout}
        return naive_frame_causal_mhla(
            query, key, value, weights, feature_map=feature_map, **sizes, **options
        )
    dtype, padding = query.dtype, -grid[0] % chunk_frames
    if padding:
        # Frames of zeros fill up the last chunk after the feature map, so they contribute nothing.
        phi = FEATURE_MAPS[feature_map]
        rows = padding * math.prod(grid[1:])
        # Features are not rounded, and squares do not overflow; kernels round bfloat16's anyway.
        if not (dtype == torch.bfloat16 and query.is_cuda):
            wide = torch.promote_types(dtype, torch.float32)
            query, key, value = (x.to(wide) for x in (query, key, value))
        query, key, value = (F.pad(x, (0, 0, 0, 0, 0, rows)) for x in (phi(query), phi(key), value))
        feature_map = "identity"
        if rotary is not None:
            options["rotary"] = tuple(F.pad(table, (0, 0, 0, rows)) for table in rotary)
    chunks = (grid[0] + padding) // chunk_frames
    out = mhla(
        query,
        key,
        value,
        frame_mixing(weights, chunks),
        grid=(grid[0] + padding, *grid[1:]),
        layout=(chunks, *layout),
        feature_map=feature_map,
        implementation=implementation,
        **options,
    )
    return out[:, : math.prod(grid)].to(dtype)


def check_next(frames: int, chunk_frames: int, ended: bool) -> None:
    """Raise `ValueError` unless a clip that has not `ended` can continue with so many frames."""
    if ended:
        raise UserError(
            f"the chunk before had fewer than {chunk_frames} frames, so it was the clip's last; "
            "begin a new state"
        )
    if not 1 <= frames <= chunk_frames:
        raise UserError(
            f"a chunk has 1 to {chunk_frames} frames, found {frames}; give one at a time"
        )


def check_frame_causal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Tensor,
    grid: tuple[int, ...],
    chunk_frames: int,
    layout: tuple[int, ...],
) -> None:
    """Raise `ValueError` unless tokens fill the grid, and weights and layout fit them."""
    check_tokens(query, key, value, grid)
    space = grid[1:]
    if len(layout) != len(space) or any(
        not 1 <= blocks <= n for blocks, n in zip(layout, space, strict=True)
    ):
        raise UserError(
            f"layout needs 1 block or more, and no more than tokens, along each axis of {space}, "
            f"found {layout}"
        )
    check_chunks(weights, chunk_frames, layout)
    heads = query.shape[2]
    if weights.ndim == 4 and weights.shape[0] != heads:
        raise UserError(
            f"weights for {heads} heads must be [distances, blocks, blocks] or the same for each "
            f"head, found {tuple(weights.shape)}"
        )
    if weights.device != query.device:
        raise ValueError(f"weights are on {weights.device} but query on {query.device}")


def check_chunks(weights: Tensor, chunk_frames: int, layout: tuple[int, ...]) -> None:
    """Raise `ValueError` unless weights fit the blocks of a chunk, and it has a frame."""
    check_whole(chunk_frames=chunk_frames, layout=layout)
    if chunk_frames < 1:
        raise UserError(f"chunk_frames must be at least 1, found {chunk_frames}")
    num_blocks = math.prod(layout)
    fits = weights.ndim in (3, 4) and weights.shape[-3] >= 1 and weights.is_floating_point()
    if not fits or tuple(weights.shape[-2:]) != (num_blocks, num_blocks):
        raise UserError(
            f"weights for {num_blocks} blocks must be floating, "
            f"[distances, {num_blocks}, {num_blocks}] or the same for each head, found "
            f"{weights.dtype} {tuple(weights.shape)}"
        )
