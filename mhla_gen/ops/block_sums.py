"""Sums over the blocks of causal sequences, kept by distance from the block that is open."""

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from mhla_gen.ops.sequence_state import SequenceState


class BlockSums(SequenceState):
    r"""Summaries $S_b$ and key sums $z_b$ of the open block and of finished blocks.

    Blocks at the last distance or farther are one sum, because they are read with one weight.

    Args:
        weights: One per distance between blocks, `[num_distances]` or `[num_key_heads,
            num_distances]`.
        block_size: Tokens per block.
    """

    tensors = ("open", "open_keys", "finished", "finished_keys")

    def __init__(self, weights: Tensor, block_size: int):
        self.weights = weights
        self.block_size = block_size
        self.lengths: Tensor | None = None
        # [batch, heads, head_dim, value_dim] and, by distance from 1 on, [batch, blocks, heads, …].
        self.open: Tensor | None = None
        self.open_keys: Tensor | None = None
        self.finished: Tensor | None = None
        self.finished_keys: Tensor | None = None
        self._mixed: tuple[Tensor, Tensor] | None = None

    @property
    def num_summaries(self) -> int:
        """Number of summaries kept per sequence, including that of the open block."""
        return 0 if self.finished is None else 1 + self.finished.shape[1]

    def reorder(self, index: Tensor) -> None:
        """See `SequenceState`."""
        super().reorder(index)
        self._mixed = None

    def to(self, device: torch.device | str) -> Self:
        """See `SequenceState`; the weights move, too."""
        self._mixed = None
        super().to(device)
        self.weights = self.weights.to(device)
        return self

    def begin(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Make room for sequences of these tokens, unless there are some."""
        if self.open is not None:
            return
        batch, _, heads, head_dim = key.shape
        dtype = torch.promote_types(query.dtype, torch.float32)
        self.lengths = torch.zeros(batch, dtype=torch.int64)
        self.open = key.new_zeros(batch, heads, head_dim, value.shape[3], dtype=dtype)
        self.open_keys = key.new_zeros(batch, heads, head_dim, dtype=dtype)
        self.finished = self.open.new_zeros(batch, 0, *self.open.shape[1:])
        self.finished_keys = self.open_keys.new_zeros(batch, 0, *self.open_keys.shape[1:])

    def past(self) -> tuple[Tensor, Tensor]:
        """Summaries and key sums of the open and the finished blocks, by distance from 0 on."""
        assert self.open is not None and self.finished is not None
        assert self.open_keys is not None and self.finished_keys is not None
        summaries = torch.cat((self.open.unsqueeze(1), self.finished), dim=1)
        return summaries, torch.cat((self.open_keys.unsqueeze(1), self.finished_keys), dim=1)

    def mixed_finished(self) -> tuple[Tensor, Tensor]:
        """Σ_{b<i} m_ib S_b and Σ_{b<i} m_ib z_b, which do not change until a block ends."""
        if self._mixed is None:
            assert self.finished is not None and self.finished_keys is not None
            weights = self.weights.to(self.finished.dtype)[..., 1 : 1 + self.finished.shape[1]]
            weights = weights.expand(self.finished.shape[2], -1)
            self._mixed = (
                torch.einsum("hm,bmhkv->bhkv", weights, self.finished),
                torch.einsum("hm,bmhk->bhk", weights, self.finished_keys),
            )
        return self._mixed

    def remember(
        self, summaries: Tensor, key_sums: Tensor, reached: Tensor, counts: Tensor
    ) -> None:
        """Sum old and new blocks by their distance from the block that is now open."""
        assert self.lengths is not None
        past, past_keys = self.past()
        self.lengths = self.lengths + counts
        num_finished = int((self.lengths // self.block_size).max())
        kept = min(self.weights.shape[-1], 1 + num_finished)
        # The block that was open is block 0 of the new ones, those before it are -1, -2, …
        number = torch.cat((torch.arange(summaries.shape[1]), -torch.arange(past.shape[1])))
        distance = (reached // self.block_size).unsqueeze(1) - number
        # Places after the open block hold no token.
        slot = distance.clamp(min=0, max=self.weights.shape[-1] - 1)
        onto = F.one_hot(slot, self.weights.shape[-1])[..., :kept].to(past)
        summaries = torch.einsum("bmd,bmhkv->bdhkv", onto, torch.cat((summaries, past), dim=1))
        key_sums = torch.einsum("bmd,bmhk->bdhk", onto, torch.cat((key_sums, past_keys), dim=1))
        self.open, self.finished = summaries[:, 0], summaries[:, 1:]
        self.open_keys, self.finished_keys = key_sums[:, 0], key_sums[:, 1:]
        self._mixed = None

    def close(self, ended: Tensor) -> None:
        """Mark the open block as finished for the sequences that `ended` it."""
        assert self.open is not None and self.open_keys is not None
        assert self.finished is not None and self.finished_keys is not None
        assert self.lengths is not None
        limit = self.weights.shape[-1] - 1
        if not ended.any() or limit == 0:
            return
        num_finished = int((self.lengths // self.block_size).max())
        new_slots = min(limit, num_finished) - self.finished.shape[1]
        ended = ended.to(self.open.device)
        self.finished, self.open = _shifted(self.finished, self.open, new_slots, ended)
        self.finished_keys, self.open_keys = _shifted(
            self.finished_keys, self.open_keys, new_slots, ended
        )
        self._mixed = None


def _shifted(
    finished: Tensor, opened: Tensor, new_slots: int, ended: Tensor
) -> tuple[Tensor, Tensor]:
    """Move finished blocks one distance away, merging the last two, and open an empty block."""
    if new_slots > 0:
        empty = finished.new_zeros(finished.shape[0], new_slots, *finished.shape[2:])
        finished = torch.cat((finished, empty), dim=1)
    last = finished[:, -1:]
    moved = torch.cat((opened.unsqueeze(1), finished[:, :-1]), dim=1)
    moved = torch.cat((moved[:, :-1], moved[:, -1:] + last), dim=1)
    ended = ended.view(-1, *(1,) * (finished.ndim - 1))
    return torch.where(ended, moved, finished), opened.masked_fill(ended.squeeze(1), 0)
