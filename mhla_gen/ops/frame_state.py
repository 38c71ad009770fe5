"""The state of frame-causal MHLA: its form chunk by chunk; see `frame_causal.py`."""

import math
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

from mhla_gen.errors import UserError
from mhla_gen.ops.blockwise import mix, to_blocks, to_tokens
from mhla_gen.ops.dispatch import check_feature_map, check_options, resolve_implementation
from mhla_gen.ops.feature_maps import FEATURE_MAPS, rotate
from mhla_gen.ops.frame_causal import check_chunks, check_frame_causal, check_next
from mhla_gen.ops.fused_limits import require_fused
from mhla_gen.ops.partition import block_slots


class FrameState:
    r"""The state of frame-causal MHLA after the finished chunks of a clip.

    `read` returns the output of `frame_causal_mhla` for the next chunk. It can be called for every
    denoising step of the chunk, and adds it to the finished ones on request. Time and memory are
    the same for every chunk: the state has one summary per block and distance, and all chunks from
    the last distance on are one sum, because they are read with the same weight.

    Args:
        weights: As in `frame_causal_mhla`, like all other arguments.
        chunk_frames: Frames per chunk.
        layout: Blocks of a chunk along each axis except the first.
        feature_map: Name of φ.
        normalize: Divide by the denominator.
        eps: Added to the denominator.
        implementation: `blockwise`, `fused` (the kernels, in sampling without torch.compile), or
            `auto`: `fused` where it can run.

    Attributes:
        ended: Whether the last finished chunk was shorter than the others and so ended the clip.

    Raises:
        ValueError: If an argument does not fit.
    """

    def __init__(
        self,
        weights: Tensor,
        *,
        chunk_frames: int,
        layout: tuple[int, ...],
        feature_map: str = "relu",
        normalize: bool = True,
        eps: float = 1e-6,
        implementation: str = "auto",
    ):
        if implementation not in ("auto", "blockwise", "fused"):
            raise UserError(
                f"implementation must be auto, blockwise or fused, found {implementation!r}"
            )
        check_chunks(weights, chunk_frames, layout)
        check_feature_map(feature_map)
        self.weights, self.chunk_frames, self.layout = weights, chunk_frames, layout
        self.feature_map, self.normalize, self.eps = feature_map, normalize, eps
        self.implementation = implementation
        self.ended = False
        # By distance from 1 on, the last entry for all larger ones:
        # [batch, distances, blocks, heads, head_dim, value_dim] and without the last axis.
        self.finished: tuple[Tensor, Tensor] | None = None
        # Their weighted sums for the blocks of the next chunk: the same axes without distances.
        self.past: tuple[Tensor, Tensor] | None = None

    def read(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        grid: tuple[int, ...],
        rotary: tuple[Tensor, Tensor] | None = None,
        append: bool = False,
    ) -> Tensor:
        """Attend from the next chunk to itself and to the finished chunks.

        Args:
            query: Queries of the chunk, as in `frame_causal_mhla`, like all other arguments.
            key: Keys.
            value: Values.
            grid: Grid of the chunk; the first axis has `chunk_frames`, or fewer in the last chunk.
            rotary: Tables by positions in the whole clip.
            append: Add the chunk to the finished ones afterwards.

        Returns:
            The output of `frame_causal_mhla` for these tokens.

        Raises:
            ValueError: If arguments do not fit each other, or the chunk cannot be the next one.
        """
        check_frame_causal(query, key, value, self.weights, grid, self.chunk_frames, self.layout)
        check_options(query, self.feature_map, rotary, False, len(grid))
        check_next(grid[0], self.chunk_frames, self.ended)
        self._check_finished(key, value)
        layout, options = (1, *self.layout), (self.feature_map, rotary, self.normalize, self.eps)
        summarised = _fused if self._can_fuse(query, key, value, rotary) else _blockwise
        # Autocast would compute the float32 sums in bfloat16.
        with torch.autocast(query.device.type, enabled=False):
            summaries, key_sums, apply = summarised(query, key, value, grid, layout, *options)
            own = self.weights.to(summaries)[..., 0, :, :]
            mixed, mixed_keys = mix(own, summaries), mix(own, key_sums.unsqueeze(-1)).squeeze(-1)
            if self.past is not None:
                mixed, mixed_keys = mixed + self.past[0], mixed_keys + self.past[1]
            out = apply(mixed, mixed_keys)
            if append:
                self._remember(summaries, key_sums, grid[0])
        return out.to(query.dtype)

    def to(self, device: torch.device | str) -> Self:
        """Move everything to a device; returns the state itself."""
        device = torch.device(device)
        self.weights = self.weights.to(device)
        for name in ("finished", "past"):
            if pair := getattr(self, name):
                setattr(self, name, tuple(x.to(device) for x in pair))
        return self

    def _check_finished(self, key: Tensor, value: Tensor) -> None:
        if self.finished is None:
            return
        sums = self.finished[0]
        held = (len(sums), *sums.shape[3:])
        found = (len(key), *key.shape[2:], value.shape[3])
        if found != held or sums.device != key.device:
            raise ValueError(
                f"the state holds (batch, num_heads, head_dim, value_dim) {held} on {sums.device}, "
                f"found tokens of {found} on {key.device}"
            )

    def _can_fuse(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
    ) -> bool:
        """Whether the kernels run: in sampling, on a GPU, without torch.compile."""
        leaves = (query, key, value, self.weights, *(rotary or ()))
        trains = torch.is_grad_enabled() and any(x.requires_grad for x in leaves)
        if trains or torch.compiler.is_compiling():
            if self.implementation == "fused":
                raise UserError(
                    "implementation='fused' reads chunks without gradients and torch.compile; use "
                    "'auto' or 'blockwise'"
                )
            return False
        sizes: dict[str, Any] = {
            "device": query.device,
            "dtype": query.dtype,
            "head_dim": query.shape[3],
            "value_dim": value.shape[3],
            "num_blocks": math.prod(self.layout),
        }
        if self.implementation == "fused":
            require_fused(**sizes)
        return resolve_implementation(self.implementation, **sizes) == "fused"

    def _remember(self, summaries: Tensor, key_sums: Tensor, frames: int) -> None:
        """Move every finished chunk one distance away; the last distance is a sum."""
        num_distances = self.weights.shape[-3]
        places = max(1, num_distances - 1)
        if self.finished is None:
            self.finished = (
                summaries.new_zeros(summaries.shape[0], places, *summaries.shape[1:]),
                key_sums.new_zeros(key_sums.shape[0], places, *key_sums.shape[1:]),
            )
        sums, keys = self.finished
        sums, keys = self.finished = _shifted(sums, summaries), _shifted(keys, key_sums)
        weights = self.weights.to(summaries)[..., min(1, num_distances - 1) :, :, :]
        axes = {3: "dij", 4: "hdij"}[weights.ndim]
        self.past = (
            torch.einsum(f"{axes},bdjhkv->bihkv", weights, sums),
            torch.einsum(f"{axes},bdjhk->bihk", weights, keys),
        )
        self.ended = frames < self.chunk_frames


def _shifted(finished: Tensor, new: Tensor) -> Tensor:
    new = new.unsqueeze(1)
    if finished.shape[1] == 1:
        return finished + new
    return torch.cat((new, finished[:, :-2], finished[:, -2:].sum(dim=1, keepdim=True)), dim=1)


Summarised = tuple[Tensor, Tensor, Callable[[Tensor, Tensor], Tensor]]
"""Summaries and key sums of a chunk, and a function from mixed ones to the chunk's output."""


def _blockwise(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: tuple[int, ...],
    layout: tuple[int, ...],
    feature_map: str,
    rotary: tuple[Tensor, Tensor] | None,
    normalize: bool,
    eps: float,
) -> Summarised:
    dtype, phi = torch.promote_types(query.dtype, torch.float32), FEATURE_MAPS[feature_map]
    phi_q, phi_k, v = phi(query.to(dtype)), phi(key.to(dtype)), value.to(dtype)
    slots = block_slots(grid, layout, query.device)
    k = to_blocks(rotate(phi_k, rotary), slots, empty=True)
    summaries = torch.einsum("bmshk,bmshv->bmhkv", k, to_blocks(v, slots))

    def applied(q: Tensor, mixed: Tensor) -> Tensor:
        return to_tokens(torch.einsum("bmshk,bmhkv->bmshv", to_blocks(q, slots), mixed), slots)

    def apply(mixed: Tensor, mixed_keys: Tensor) -> Tensor:
        out = applied(rotate(phi_q, rotary), mixed)
        return out / (applied(phi_q, mixed_keys.unsqueeze(-1)) + eps) if normalize else out

    return summaries, to_blocks(phi_k, slots, empty=True).sum(dim=2), apply


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: tuple[int, ...],
    layout: tuple[int, ...],
    feature_map: str,
    rotary: tuple[Tensor, Tensor] | None,
    normalize: bool,
    eps: float,
) -> Summarised:
    # Imported on first use: Triton is neither needed nor installed everywhere.
    from mhla_gen.ops.kernels import linear_form
    from mhla_gen.ops.kernels.launch import Call, merge_axes

    cos, sin = (None, None) if rotary is None else (table.contiguous() for table in rotary)
    # Summaries are float32, because those of many chunks are added.
    options = (feature_map, normalize, eps, torch.float32)
    call = Call(query, value, cos, sin, *merge_axes(list(grid), list(layout)), *options)
    with torch.cuda.device_of(query):
        parts = linear_form.summarise(key, value, call)
    summaries, key_sums = (
        torch.unflatten(x, 1, (call.num_blocks, call.num_parts)).sum(dim=2)
        for x in (parts.matrices, parts.key_sums)
    )

    def apply(mixed: Tensor, mixed_keys: Tensor) -> Tensor:
        both = linear_form.Summaries(mixed.contiguous(), parts.scales, mixed_keys.contiguous())
        with torch.cuda.device_of(query):
            return linear_form.apply(query, value, both, call)

    return summaries, key_sums, apply
