"""Causal MHLA token by token: the state keeps one summary per block instead of its tokens."""

import torch
from torch import Tensor

from mhla_gen.errors import UserError
from mhla_gen.ops.block_sums import BlockSums
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
from mhla_gen.ops.partition import check_whole


class CausalState(BlockSums):
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
        check_whole(memory_blocks=memory_blocks)
        if memory_blocks is not None and memory_blocks < 1:
            raise UserError(f"memory_blocks must be at least 1, found {memory_blocks}")
        super().__init__(weights[..., :memory_blocks], block_size)
        self.feature_map = feature_map
        self.normalize = normalize
        self.eps = eps

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
            self.begin(query, key, value)
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
            self.remember(*placed.summaries(self.block_size), offsets + counts, counts)
            return taken(numerator, positions, mask).to(query.dtype)

    def _read_first(
        self, query: Tensor, key: Tensor, value: Tensor, rotary: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """Read a prompt; nothing precedes it, so the output is that of `causal_mhla`."""
        self.begin(query, key, value)
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
            self.remember(*sums, counts, counts)
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
        self.begin(query, key, value)
        assert self.lengths is not None
        with torch.autocast(query.device.type, enabled=False):
            step = self._fused_step if self._has_kernel(query, key, value) else self._step
            out = step(query, key, value, rotary)
            self.lengths = self.lengths + 1
            self.close(self.lengths % self.block_size == 0)
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
        mixed, mixed_keys = self.mixed_finished()
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
            (self.open, self.open_keys, *self.mixed_finished()),
            feature_map=self.feature_map,
            rotary=rotary,
            normalize=self.normalize,
            eps=self.eps,
        )
        return out.unsqueeze(1)

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
        held, summed = tuple(self.open.shape), torch.promote_types(query.dtype, torch.float32)
        if found != held or summed != self.open.dtype:
            raise ValueError(
                f"the state holds (batch, key_heads, head_dim, value_dim) {held} in "
                f"{self.open.dtype}, found tokens of {found}, whose sums are {summed}"
            )

    def _with_past(
        self, placed: Placed, numerator: Tensor, denominator: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Add what the tokens of new blocks read from the blocks before them."""
        summaries, key_sums = self.past()
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
