"""Causal MHLA token by token: the state keeps one summary per block instead of its tokens."""

from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from mhla_gen.errors import UserError
from mhla_gen.ops.causal import (
    Features,
    Placed,
    absent_last,
    block_summaries,
    by_distance,
    causal_mhla,
    taken,
)
from mhla_gen.ops.causal_checks import check_causal, check_weights
from mhla_gen.ops.dispatch import resolve_implementation


class SequenceState:
    """What states of causal attention share: their sequences are reordered, moved and saved."""

    own: ClassVar[tuple[str, ...]]
    """Names of the arguments that a state is built with, the positional one first."""
    tensors: ClassVar[tuple[str, ...]]
    """Names of its tensors, `[batch, ...]`, each None until it is needed."""
    lengths: Tensor | None

    def reorder(self, index: Tensor) -> None:
        """Replace sequence i by sequence `index[i]`: for beam search, repeats, a smaller batch."""
        if self.lengths is None:
            return
        self.lengths = self.lengths[index.cpu()]
        for name, tensor in self.held():
            setattr(self, name, tensor.index_select(0, index.to(tensor.device)))

    def to(self, device: torch.device | str) -> Self:
        """Move everything but `lengths` to a device; returns the state itself."""
        for name, tensor in self.held():
            setattr(self, name, tensor.to(device))
        return self

    def held(self) -> list[tuple[str, Tensor]]:
        """Its tensors by name, without those that are None."""
        held = ((name, getattr(self, name)) for name in self.tensors)
        return [(name, tensor) for name, tensor in held if tensor is not None]

    def state_dict(self) -> dict[str, Any]:
        """The whole state as tensors, numbers and text, for `torch.save` and `from_state_dict`."""
        return {name: getattr(self, name) for name in (*self.own, "lengths", *self.tensors)}

    @classmethod
    def from_state_dict(cls, saved: dict[str, Any]) -> Self:
        """Create a state from the result of `state_dict`.

        Raises:
            ValueError: If an entry is missing or unknown.
        """
        expected = {*cls.own, "lengths", *cls.tensors}
        if set(saved) != expected:
            raise UserError(
                f"a saved {cls.__name__} holds {sorted(expected)}, found {sorted(saved)}; "
                "give what state_dict returned"
            )
        first, *others = cls.own
        build: Any = cls
        state = build(saved[first], **{name: saved[name] for name in others})
        for name in ("lengths", *cls.tensors):
            setattr(state, name, saved[name])
        return state


class CausalState(SequenceState):
    r"""The state of causal MHLA for a batch of sequences: the recurrent form of `causal_mhla`.

    However sequences are split into calls of `prefill` and `step`, the outputs are those of one
    call of `causal_mhla`.

    Memory: summaries $S_b$ and key sums $z_b$ of the open block and of at most
    `num_distances - 1` finished blocks, whatever the length. This is exact: all blocks from the
    last distance on are read with the same weight (`distance_mixing`), so they are kept as one sum.
    Until then the state grows by one summary per block. `memory_blocks` makes the state smaller but
    changes the function: only that many weights are used, so older blocks are merged earlier.

    Args:
        weights: One per distance between blocks, as in `causal_mhla`.
        block_size: Tokens per block.
        memory_blocks: Maximum number of summaries, including the open one; None for one per weight.
        feature_map: Name of φ in `FEATURE_MAPS`.
        normalize: Divide by the denominator.
        eps: Added to the denominator.

    Attributes:
        lengths: Tokens read of each sequence, int64 `[batch]`, always on the CPU; None before the
            first.

    Raises:
        ValueError: If an argument does not fit.

    Source:
        Zhang et al. 2026, arXiv:2601.07832, App. C.
    """

    own = ("weights", "block_size", "feature_map", "normalize", "eps")
    tensors = ("open", "open_keys", "finished", "finished_keys")

    def __init__(
        self,
        weights: Tensor,
        *,
        block_size: int,
        memory_blocks: int | None = None,
        feature_map: str = "relu",
        normalize: bool = True,
        eps: float = 1e-6,
    ):
        check_weights(weights, None, block_size, feature_map)
        if memory_blocks is not None and memory_blocks < 1:
            raise UserError(f"memory_blocks must be at least 1, found {memory_blocks}")
        self.weights = weights[..., :memory_blocks]
        self.block_size = block_size
        self.feature_map = feature_map
        self.normalize = normalize
        self.eps = eps
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

    def prefill(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        mask: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Read any number of next tokens in the parallel form.

        Args:
            query: As in `causal_mhla`, like all other arguments.
            key: Keys.
            value: Values.
            mask: False at padding, which is ignored and not counted.
            rotary: Tables for these tokens, by their positions in the whole sequence.

        Returns:
            The output of `causal_mhla` for these tokens.

        Raises:
            ValueError: If arguments do not fit each other or the sequences read so far.
        """
        self._check(query, key, value, mask, rotary)
        if self.open is None and mask is None and (rotary is None or rotary[0].ndim == 2):
            return self._read_first(query, key, value, rotary)
        with torch.autocast(query.device.type, enabled=False):
            self._begin(query, key, value)
            assert self.lengths is not None
            tokens = Features(query, key, value, mask, self.feature_map, rotary)
            offsets = self.lengths % self.block_size
            counts = torch.full_like(offsets, query.shape[1])
            if mask is not None:
                counts = mask.sum(dim=1).cpu()
            furthest = int((offsets + counts).max())
            length = max(furthest + -furthest % self.block_size, self.block_size)
            positions = tokens.ranks + offsets.to(query.device).unsqueeze(1)
            positions = absent_last(positions, mask, length)
            placed = tokens.placed(positions, length)
            numerator, denominator = placed.attend(self.weights, self.block_size, self.normalize)
            numerator, denominator = self._with_past(placed, numerator, denominator)
            if denominator is not None:
                numerator = numerator / (denominator + self.eps)
            self._remember(*placed.summaries(self.block_size), offsets + counts, counts)
            return taken(numerator, positions, mask).to(query.dtype)

    def _read_first(
        self, query: Tensor, key: Tensor, value: Tensor, rotary: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """Read a prompt; nothing precedes it, so the output is that of `causal_mhla`."""
        self._begin(query, key, value)
        assert self.lengths is not None
        out = causal_mhla(
            query,
            key,
            value,
            self.weights,
            block_size=self.block_size,
            feature_map=self.feature_map,
            rotary=rotary,
            normalize=self.normalize,
            eps=self.eps,
        )
        with torch.autocast(query.device.type, enabled=False):
            sums = block_summaries(key, value, self.block_size, self.feature_map, rotary)
            counts = torch.full_like(self.lengths, query.shape[1])
            self._remember(*sums, counts, counts)
        return out

    def step(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        rotary: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Read one more token of every sequence, at a cost independent of the sequence's length.

        Args:
            query: `[batch, 1, num_heads, head_dim]`.
            key: `[batch, 1, num_key_heads, head_dim]`.
            value: `[batch, 1, num_key_heads, value_dim]`.
            rotary: Tables for this token.

        Returns:
            `[batch, 1, num_heads, value_dim]`.

        Raises:
            ValueError: As in `prefill`, and if there is more than one token.
        """
        self._check(query, key, value, None, rotary)
        if query.shape[1] != 1:
            raise ValueError(f"step reads one token, found {query.shape[1]}; use prefill for more")
        self._begin(query, key, value)
        assert self.lengths is not None
        with torch.autocast(query.device.type, enabled=False):
            step = self._fused_step if self._has_kernel(query, key, value) else self._step
            out = step(query, key, value, rotary)
            self.lengths = self.lengths + 1
            self._close(self.lengths % self.block_size == 0)
        return out

    def _step(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        assert self.open is not None and self.open_keys is not None
        t = Features(query, key, value, None, self.feature_map, rotary)
        self.open = self.open + t.k[:, 0].unsqueeze(-1) * t.v[:, 0].unsqueeze(-2)
        self.open_keys = self.open_keys + t.phi_k[:, 0]
        mixed, mixed_keys = self._mixed_finished()
        own = self.weights.to(self.open.dtype)[..., 0, None]  # [1] or [heads, 1]
        heads = key.shape[2]
        out = torch.einsum(
            "bhgk,bhkv->bhgv",
            torch.unflatten(t.q[:, 0], 1, (heads, -1)),
            mixed + own.unsqueeze(-1) * self.open,
        )
        if self.normalize:
            phi_q = torch.unflatten(t.phi_q[:, 0], 1, (heads, -1))
            keys = mixed_keys + own * self.open_keys
            out = out / (torch.einsum("bhgk,bhk->bhg", phi_q, keys).unsqueeze(-1) + self.eps)
        return out.flatten(1, 2).unsqueeze(1).to(query.dtype)

    def _has_kernel(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Whether a step is one kernel launch: where kernels run and no gradient is needed."""
        assert self.open is not None
        tensors = (query, key, value, self.open, self.weights)
        trains = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        chosen = resolve_implementation(
            "auto",
            device=query.device,
            dtype=query.dtype,
            head_dim=query.shape[3],
            value_dim=value.shape[3],
        )
        return chosen == "fused" and not trains and not torch.compiler.is_compiling()

    def _fused_step(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        # Imported on first use: Triton is not installed everywhere.
        from mhla_gen.ops.kernels.causal_step import causal_step

        assert self.open is not None and self.open_keys is not None
        if rotary is not None:
            cos, sin = rotary
            rotary = cos.flatten(0, -2), sin.flatten(0, -2)
        out, self.open, self.open_keys = causal_step(
            query[:, 0],
            key[:, 0],
            value[:, 0],
            self.weights,
            (self.open, self.open_keys, *self._mixed_finished()),
            feature_map=self.feature_map,
            rotary=rotary,
            normalize=self.normalize,
            eps=self.eps,
        )
        return out.unsqueeze(1)

    def reorder(self, index: Tensor) -> None:
        """See `SequenceState`."""
        super().reorder(index)
        self._mixed = None

    def to(self, device: torch.device | str) -> Self:
        """See `SequenceState`; the weights move, too."""
        self.weights = self.weights.to(device)
        self._mixed = None
        return super().to(device)

    def _check(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        rotary: tuple[Tensor, Tensor] | None,
    ) -> None:
        options = (self.block_size, mask, self.feature_map, rotary)
        check_causal(query, key, value, self.weights, *options)
        if self.open is None:
            return
        found = (key.shape[0], *key.shape[2:], value.shape[3])
        if tuple(self.open.shape) != found:
            raise ValueError(
                "the state holds (batch, key_heads, head_dim, value_dim) "
                f"{tuple(self.open.shape)}, found tokens of {found}"
            )

    def _begin(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        if self.open is not None:
            return
        batch, _, heads, head_dim = key.shape
        dtype = torch.promote_types(query.dtype, torch.float32)
        self.lengths = torch.zeros(batch, dtype=torch.int64)
        self.open = key.new_zeros(batch, heads, head_dim, value.shape[3], dtype=dtype)
        self.open_keys = key.new_zeros(batch, heads, head_dim, dtype=dtype)
        self.finished = self.open.new_zeros(batch, 0, *self.open.shape[1:])
        self.finished_keys = self.open_keys.new_zeros(batch, 0, *self.open_keys.shape[1:])

    def _past(self) -> tuple[Tensor, Tensor]:
        """Summaries and key sums of the open and the finished blocks, by distance from 0 on."""
        assert self.open is not None and self.finished is not None
        assert self.open_keys is not None and self.finished_keys is not None
        summaries = torch.cat((self.open.unsqueeze(1), self.finished), dim=1)
        return summaries, torch.cat((self.open_keys.unsqueeze(1), self.finished_keys), dim=1)

    def _mixed_finished(self) -> tuple[Tensor, Tensor]:
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

    def _with_past(
        self, placed: Placed, numerator: Tensor, denominator: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Add what the tokens of new blocks read from the blocks before them."""
        summaries, key_sums = self._past()
        heads, num_blocks = summaries.shape[2], placed.q.shape[1] // self.block_size
        block = torch.arange(num_blocks, device=summaries.device)
        distance = block.unsqueeze(1) + torch.arange(summaries.shape[1], device=summaries.device)
        weights = by_distance(self.weights.to(summaries.dtype), distance)
        weights = weights.expand(heads, *distance.shape)

        def read(q: Tensor, past: Tensor) -> Tensor:
            mixed = torch.einsum("hjm,bmhkv->bjhkv", weights, past)
            q = torch.unflatten(q, 1, (-1, self.block_size))
            q = torch.unflatten(q, 3, (heads, -1))
            return torch.einsum("bjshgk,bjhkv->bjshgv", q, mixed).flatten(3, 4).flatten(1, 2)

        numerator = numerator + read(placed.q, summaries)
        if denominator is not None:
            denominator = denominator + read(placed.phi_q, key_sums.unsqueeze(-1))
        return numerator, denominator

    def _remember(
        self, summaries: Tensor, key_sums: Tensor, reached: Tensor, counts: Tensor
    ) -> None:
        """Sum old and new blocks by their distance from the block that is now open."""
        assert self.lengths is not None
        past, past_keys = self._past()
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

    def _close(self, ended: Tensor) -> None:
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
