"""Attention that is causal over chunks of frames; `clip_state.py` runs it chunk by chunk."""

import math
import operator
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from torch import Tensor

from mhla_gen.config import MHLAConfig
from mhla_gen.models.additions import DepthwiseConv, Inputs
from mhla_gen.models.attention import MHLA, evenly_spaced
from mhla_gen.models.exact import softmax
from mhla_gen.models.rotary import rotated
from mhla_gen.ops import FrameState, frame_causal_mhla, frame_mixing
from mhla_gen.ops.depthwise import Blend, times_silu
from mhla_gen.ops.frame_causal import check_next


class ClipLayerState:
    """A frame-causal layer's memory of finished chunks.

    Attributes:
        appends: Whether the next chunk to be read is a finished one.
        added: Whether that chunk has been added.
        values: Values of the last frames, `[batch, tokens, channels]`, for the convolution.
    """

    def __init__(self, chunk_frames: int):
        self.chunk_frames = chunk_frames
        self.appends = self.added = False
        self.values: Tensor | None = None
        # Sums that the operator's state begins with, when it is created.
        self._sums: tuple[Any, Any, bool] | None = None
        self._mhla: FrameState | None = None
        self._cache: list[Tensor] = []
        self._tokens = 0
        self._ended = False

    def mhla(self, weights: Tensor, options: dict[str, Any]) -> FrameState:
        """The state of the operator, created by the first chunk."""
        if self._mhla is None:
            self._mhla = new = FrameState(weights, **options)
            if self._sums is not None:
                new.finished, new.past, new.ended = self._sums
                self._sums = None
        return self._mhla

    def to(self, device: torch.device) -> None:
        """Move everything to a device."""
        self._cache = [kept.to(device) for kept in self._cache]
        self.values = None if self.values is None else self.values.to(device)
        if self._mhla is not None:
            self._mhla.to(device)
        if self._sums is not None:
            *pairs, ended = self._sums
            finished, past = (pair and tuple(x.to(device) for x in pair) for pair in pairs)
            self._sums = finished, past, ended

    def state_dict(self) -> dict[str, Any]:
        """All that later chunks read, for `from_state_dict`."""
        return {
            "values": self.values,
            "cache": [kept[:, : self._tokens] for kept in self._cache],
            "ended": self._ended,
            "sums": self._all_sums(),
        }

    def _all_sums(self) -> tuple[Any, Any, bool] | None:
        held = self._mhla
        return self._sums if held is None else (held.finished, held.past, held.ended)

    @classmethod
    def from_state_dict(cls, chunk_frames: int, saved: dict[str, Any]) -> Self:
        """Create a state from the result of `state_dict`."""
        state = cls(chunk_frames)
        state.values, state._sums, state._ended = saved["values"], saved["sums"], saved["ended"]
        state._cache = list(saved["cache"])
        state._tokens = state._cache[0].shape[1] if state._cache else 0
        return state

    def softmax(self, query: Tensor, key: Tensor, value: Tensor, *, frames: int) -> Tensor:
        """Attend to the chunk itself and to all keys and values of finished chunks."""
        check_next(frames, self.chunk_frames, self._ended)
        joined = [self._joined(index, new) for index, new in enumerate((key, value))]
        if self.appends:
            self.added = True
            self._tokens += query.shape[1]
            self._ended = frames < self.chunk_frames
        return softmax(query, *joined)

    def _joined(self, index: int, new: Tensor) -> Tensor:
        """Finished and new tokens in one tensor, which has room for more."""
        if len(self._cache) == index:
            self._cache.append(new[:, :0])
        kept, end = self._cache[index], self._tokens + new.shape[1]
        if new.requires_grad or kept.requires_grad:
            joined = torch.cat((kept[:, : self._tokens], new), dim=1)
            if self.appends:
                self._cache[index] = joined
            return joined
        if kept.shape[1] < end:
            length = max(end, kept.shape[1] * 5 // 4)
            room = new.new_empty(new.shape[0], length, *new.shape[2:])
            room[:, : self._tokens] = kept[:, : self._tokens]
            self._cache[index] = kept = room
        kept[:, self._tokens : end] = new
        return kept[:, :end]

    @property
    def tensors(self) -> Iterator[Tensor]:
        """All tensors of the state."""
        yield from self._cache
        if self.values is not None:
            yield self.values
        for pair in (self._all_sums() or ())[:2]:
            yield from pair or ()


class PastConv(DepthwiseConv):
    """`DepthwiseConv` that is causal in time, the first axis of the grid."""

    state: ClipLayerState | None = None

    def forward(
        self,
        tokens: Tensor,
        grid: tuple[int, ...],
        group: Any = None,
        halo: Callable[[], Tensor] | None = None,
        after: tuple[Tensor | Blend, Tensor | None, int] | None = None,
    ) -> Tensor:
        """See `DepthwiseConv`."""
        assert group is None and halo is None
        frame, before = math.prod(grid[1:]), self.weight.shape[2] - 1
        past = None if self.state is None else self.state.values
        if past is None:
            past = tokens.new_zeros(tokens.shape[0], before * frame, tokens.shape[2])
        joined = torch.cat((past, tokens), dim=1)
        if self.state is not None and self.state.appends:
            # A view would keep all frames of the chunk.
            self.state.values = joined[:, joined.shape[1] - before * frame :].clone()
        out = super().forward(joined, (grid[0] + before, *grid[1:]))
        # Taken half a filter width earlier, results of a centred filter depend on past frames only.
        out = out[:, before // 2 * frame :][:, : tokens.shape[1]]
        if after is None:
            return out
        added, logits, heads = after
        # A layer that is causal over frames has one half.
        assert isinstance(added, Tensor)
        return added + out if logits is None else times_silu(added + out, logits, heads)


class FrameCausalMHLA(MHLA):
    """MHLA, or softmax of all pairs (`exact=1`), that never reads a later chunk of frames.

    Without a `state` it takes a whole clip at once; with a state, the clip's next chunk.
    """

    state: ClipLayerState | None = None
    conv_class = PastConv

    def hand(self, state: ClipLayerState | None) -> None:
        """Give the layer its state of a clip, or remove it."""
        self.state = state
        if isinstance(self.conv, PastConv):
            self.conv.state = state

    def occupied_weights(self, grid: tuple[int, ...]) -> tuple[tuple[int, ...], Tensor]:
        """The blocks of a chunk that hold tokens, and their weights; see `occupied_blocks`."""
        assert self.mixing is not None
        layout = self.config.layout[1:]
        kept = tuple(map(min, layout, grid[1:]))
        if kept == layout:
            return layout, self.mixing
        blocks = evenly_spaced(layout, kept, self.mixing.device)
        return kept, self.mixing.index_select(-1, blocks).index_select(-2, blocks)

    @property
    def chunk_frames(self) -> int:
        """Number of frames of a chunk, in tokens."""
        assert self.config.causal_frames is not None
        return self.config.causal_frames

    @property
    def kind(self) -> str:
        """That of `MHLA`, prefixed with causal."""
        return f"causal {super().kind}"

    def matrix(self, mixing: Tensor) -> Tensor:
        """See `MHLA.matrix`: the matrix of a clip with one chunk per distance."""
        return frame_mixing(mixing, mixing.shape[-3])

    def _begin(self, given: Inputs) -> Callable[[], Tensor]:
        """See `AddedAttention`."""
        assert given.group is None and given.extra is None
        out = self._attend(given)
        return lambda: out if self.norm is None else self.norm(out).type_as(out)

    def _attend(self, inputs: Inputs) -> Tensor:
        query, key, value, _, grid, rotary, *_ = inputs
        config, state = self.config, self.state
        # A compiled layer is specialized to its number of frames.
        grid = (operator.index(grid[0]), *grid[1:])
        if self.features is None:
            tensors = rotated(query, rotary), rotated(key, rotary), value
            if state is not None:
                return state.softmax(*tensors, frames=grid[0])
            return chunked_softmax(*tensors, chunk=self.chunk_frames * math.prod(grid[1:]))
        query, key = self.features(query, key)
        layout, weights = self.occupied_weights(grid)
        given = {"grid": grid, "rotary": rotary}
        options = {
            "chunk_frames": self.chunk_frames,
            "layout": layout,
            "feature_map": self.features.operator_map,
            "normalize": config.normalize,
            "eps": config.eps,
            "implementation": config.implementation,
        }
        if state is not None:
            out = state.mhla(weights, options).read(
                query, key, value, **given, append=state.appends
            )
            state.added = state.appends
            return out
        return frame_causal_mhla(query, key, value, weights, **given, **options)


def chunked_softmax(query: Tensor, key: Tensor, value: Tensor, *, chunk: int) -> Tensor:
    """Softmax of all pairs except those with later chunks; `[batch, seq_len, num_heads, head_dim]`.

    Args:
        query: Rotated, like keys.
        key: Like `query`.
        value: Like `query`.
        chunk: Tokens of a chunk.
    """
    parts = [
        softmax(rows, key[:, : first + chunk], value[:, : first + chunk])
        for first, rows in zip(
            range(0, query.shape[1], chunk), query.split(chunk, dim=1), strict=True
        )
    ]
    return torch.cat(parts, dim=1)


def causal_frames(model: Any) -> int | None:
    """Latent frames per chunk of a frame-causal model; None for any other."""
    config = getattr(model, "mhla_config", None)
    return config.causal_frames if isinstance(config, MHLAConfig) else None
