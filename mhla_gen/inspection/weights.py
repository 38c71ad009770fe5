"""The attention weights that a model's self-attention layers induce, for chosen queries.

A linear or MHLA layer never forms its weights, but its output is `weights @ value` for some matrix;
row n of that matrix says how much token n reads of every token. Rows are computed on demand from
the queries and keys of a real forward pass, so memory is `rows × seq_len` and never `seq_len²`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mhla_gen.ops import FEATURE_MAPS, TileLayout
from mhla_gen.ops.feature_maps import rotate
from mhla_gen.ops.partition import block_of_tokens
from mhla_gen.ops.tiles import Tiling, group_slots, tile_lists, tiling, token_places


@dataclass(frozen=True, eq=False)
class LayerAttention(ABC):
    """One layer on one input, from which rows of its weights can be computed."""

    query: Tensor
    """`[seq_len, num_heads, head_dim]`, as the layer's attention function got it."""
    key: Tensor
    """Like `query`."""

    @property
    def seq_len(self) -> int:
        """Tokens."""
        return self.query.shape[0]

    @property
    def num_heads(self) -> int:
        """Heads."""
        return self.query.shape[1]

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.query.shape[2]

    @property
    def device(self) -> torch.device:
        """Where rows must be."""
        return self.query.device

    @property
    @abstractmethod
    def kind(self) -> str:
        """softmax, mhla, or linear for MHLA with a single block."""

    @property
    def rank_bound(self) -> int:
        """The largest rank that the form of the layer allows; softmax's exponential allows any."""
        return self.seq_len

    @abstractmethod
    def weights(self, rows: Tensor, head: int) -> Tensor:
        """Rows of a head's attention weights, float64 `[len(rows), seq_len]`."""


@dataclass(frozen=True, eq=False)
class MHLAAttention(LayerAttention):
    """An MHLA layer: `((φ(Q) φ(K)ᵀ) ∘ m[block, block])`, divided by its denominator.

    Convolution, gate and output norm of the layer come after these weights.

    Source:
        Zhang et al. 2026, arXiv:2601.07832, Eq. (4), written as attention.
    """

    mixing: Tensor
    """`[num_blocks, num_blocks]` or `[num_heads, num_blocks, num_blocks]`."""
    grid: tuple[int, ...]
    layout: tuple[int, ...]
    feature_map: str
    normalize: bool
    eps: float
    rotary: tuple[Tensor, Tensor] | None = None
    """`(cos, sin)`, each `[seq_len, head_dim / 2]`, or `[1, seq_len, num_heads, head_dim / 2]`
    where heads differ. Rotated weights can be negative."""

    @property
    def kind(self) -> str:
        """`mhla`, or linear where there is one block only."""
        return "linear" if self.mixing.shape[-1] == 1 else "mhla"

    @property
    def rank_bound(self) -> int:
        """Sum over blocks of the smaller of block size and `head_dim`.

        Source:
            Zhang et al. 2026, arXiv:2601.07832, Sec. 4.
        """
        sizes = torch.bincount(block_of_tokens(self.grid, self.layout))
        return int(sizes.clamp(max=self.head_dim).sum())

    def weights(self, rows: Tensor, head: int) -> Tensor:
        """See `LayerAttention.weights`; rows sum to 1 if the layer normalises without rotation."""
        phi = FEATURE_MAPS[self.feature_map]
        phi_q = phi(self.query[rows, head].double())  # [rows, head_dim]
        phi_k = phi(self.key[:, head].double())
        mixing = (self.mixing if self.mixing.ndim == 2 else self.mixing[head]).double()
        block = block_of_tokens(self.grid, self.layout, device=rows.device)
        mixed = mixing[block[rows]][:, block]  # [rows, seq_len]
        plain = (phi_q @ phi_k.T) * mixed
        weights = plain
        if self.rotary is not None:
            cos, sin = (
                (table[0, :, head] if table.ndim == 4 else table).double() for table in self.rotary
            )
            rotated_q = rotate(phi_q.unsqueeze(1), (cos[rows], sin[rows])).squeeze(1)
            rotated_k = rotate(phi_k.unsqueeze(1), (cos, sin)).squeeze(1)
            weights = (rotated_q @ rotated_k.T) * mixed
        if self.normalize:
            # The rotation is left out of the denominator, as the operator does.
            weights = weights / (plain.sum(dim=1, keepdim=True) + self.eps)
        return weights


@dataclass(frozen=True, eq=False)
class SoftmaxAttention(LayerAttention):
    """A softmax layer: `softmax(scale Q Kᵀ)`."""

    scale: float

    @property
    def kind(self) -> str:
        """`softmax`."""
        return "softmax"

    def weights(self, rows: Tensor, head: int) -> Tensor:
        """See `LayerAttention.weights`; rows sum to 1."""
        scores = self.query[rows, head].double() @ self.key[:, head].double().T
        return (scores * self.scale).softmax(dim=1)


@dataclass(frozen=True, eq=False)
class ExactAttention(LayerAttention):
    """Softmax on part of the pairs; query and key are rotated already."""

    grid: tuple[int, ...]
    layout: TileLayout
    """Which tiles are read."""

    @property
    def kind(self) -> str:
        """`exact`."""
        return "exact"

    @cached_property
    def _placed(self) -> Tiling:
        tile, group, window, top = self.layout
        return tiling(self.grid, tile, window, top, group)

    @cached_property
    def _tile_of_tokens(self) -> Tensor:
        return block_of_tokens(self.grid, self._placed.tiles, device=self.device)

    @cached_property
    def _group_of_tokens(self) -> Tensor:
        slots = group_slots(self._placed, self.device)[0].shape[1]
        return token_places(self._placed, self.device) // slots

    @cached_property
    def _lists(self) -> Tensor:
        """Tiles that every head and group reads, `[num_heads, num_groups, list_size]`."""
        query = _means(self.query, self._group_of_tokens, self._placed.num_groups)
        key = _means(self.key, self._tile_of_tokens, self._placed.num_tiles)
        return tile_lists(query[None], key[None], self._placed)[0]

    def weights(self, rows: Tensor, head: int) -> Tensor:
        """See `LayerAttention.weights`; rows sum to 1 and are zero outside their tiles."""
        lists = self._lists[head, self._group_of_tokens[rows]]
        size = (len(rows), self._placed.num_tiles)
        read = torch.zeros(size, dtype=torch.bool, device=self.device).scatter(1, lists, True)
        scores = self.query[rows, head].double() @ self.key[:, head].double().T
        scores = scores * self.head_dim**-0.5
        return scores.masked_fill(~read[:, self._tile_of_tokens], float("-inf")).softmax(dim=1)


def _means(x: Tensor, box: Tensor, num_boxes: int) -> Tensor:
    """Mean of the tokens `[seq_len, num_heads, head_dim]` of every box, heads first."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    sums = x.new_zeros(num_boxes, *x.shape[1:]).index_add(0, box, x)
    return (sums / torch.bincount(box, minlength=num_boxes).view(-1, 1, 1)).transpose(0, 1)


@dataclass(frozen=True, eq=False)
class BothHalves(LayerAttention):
    """A layer with an exact half and MHLA."""

    exact: ExactAttention
    linear: MHLAAttention
    share: Tensor
    """Weight of the exact half, `[seq_len, num_heads]`."""

    @property
    def kind(self) -> str:
        """`exact + mhla` or `exact + linear`."""
        return f"{self.exact.kind} + {self.linear.kind}"

    def weights(self, rows: Tensor, head: int) -> Tensor:
        """See `LayerAttention.weights`: the mean of both halves, weighed for every row."""
        exact = self.exact.weights(rows, head)
        share = self.share[rows, head].double().unsqueeze(1)
        return share * exact + (1 - share) * self.linear.weights(rows, head)
