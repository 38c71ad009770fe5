"""The state of softmax within a window, for reading sequences token by token."""

import torch
from torch import Tensor

from mhla_gen.ops.causal_checks import check_causal_tokens, check_window
from mhla_gen.ops.feature_maps import rotate
from mhla_gen.ops.sequence_state import SequenceState
from mhla_gen.ops.window import Late, Rotary, attend, window_attention


class WindowState(SequenceState):
    """The state of `window_attention` for a batch of sequences: the last `window` keys and values.

    However sequences are split into calls of `read`, the outputs are those of one call of
    `window_attention`.

    Args:
        window: Number of tokens that a query reads, including its own.

    Attributes:
        lengths: Tokens read of each sequence, int64 `[batch]`, always on the CPU; None before the
            first.

    Raises:
        ValueError: If the window holds no token.
    """

    own = ("window",)
    tensors = ("key", "rotated", "value", "cos", "sin")

    def __init__(self, window: int):
        check_window(window)
        self.window = window
        self.lengths: Tensor | None = None
        # [batch, up to `window` tokens, ...], oldest first; shorter sequences are padded last.
        self.key: Tensor | None = None
        self.rotated: Tensor | None = None
        self.value: Tensor | None = None
        self.cos: Tensor | None = None
        self.sin: Tensor | None = None

    def read(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        mask: Tensor | None = None,
        rotary: Rotary = None,
    ) -> tuple[Tensor, Late | None]:
        """Read the next tokens, one or many.

        Args:
            query: As in `window_attention`, like all other arguments.
            key: Keys.
            value: Values.
            mask: False at padding, which is ignored and not counted.
            rotary: Tables for these tokens, by their positions in the whole sequence.

        Returns:
            The output of `window_attention` for these tokens.

        Raises:
            ValueError: If arguments do not fit each other or the sequences read so far.
        """
        check_causal_tokens(query, key, value, mask, rotary)
        self._begin(key, value, rotary)
        assert self.lengths is not None and self.key is not None
        kept = self.key.shape[1]
        filled = self.lengths.clamp(max=self.window)
        even = mask is None and bool((filled == kept).all())
        if even and query.shape[1] == 1:
            return self._step(query, key, value, rotary)
        if even:
            present = None
        else:
            if mask is None:
                mask = torch.ones(query.shape[:2], dtype=torch.bool, device=query.device)
            place = torch.arange(kept, device=query.device)
            present = torch.cat((place < filled.to(query.device).unsqueeze(1), mask), dim=1)
        tokens = self._with(key, value, rotary)
        queries = torch.cat((query.new_zeros(query.shape[0], kept, *query.shape[2:]), query), dim=1)
        # For a prompt, use the tables that all its sequences share.
        tables = rotary if kept == 0 else _tables(tokens)
        out, late = window_attention(
            queries, tokens["key"], tokens["value"], window=self.window, mask=present, rotary=tables
        )
        self._keep(tokens, present)
        counts = query.shape[1] if mask is None else mask.sum(dim=1).cpu()
        self.lengths = self.lengths + counts
        return out[:, kept:], None if late is None else _without(late, kept)

    def _begin(self, key: Tensor, value: Tensor, rotary: Rotary) -> None:
        if self.key is None:
            self.lengths = torch.zeros(key.shape[0], dtype=torch.int64)
            self.key, self.rotated, self.value = key[:, :0], key[:, :0], value[:, :0]
            if rotary is not None:
                self.cos, self.sin = (x.expand(key.shape[0], -1, -1)[:, :0] for x in rotary)
            return
        assert self.value is not None
        # So far there may have been nothing but padding, of which no token is held.
        held = (len(self.key), *self.key.shape[2:], self.value.shape[3], self.cos is not None)
        found = (len(key), *key.shape[2:], value.shape[3], rotary is not None)
        kept, new = ((x.dtype, x.device) for x in (self.key, key))
        if found != held or kept != new:
            raise ValueError(
                f"the window holds (batch, key_heads, head_dim, value_dim, rotary) {held}, "
                f"{kept[0]} on {kept[1]}, found tokens of {found}, {new[0]} on {new[1]}"
            )

    def _with(self, key: Tensor, value: Tensor, rotary: Rotary) -> dict[str, Tensor]:
        """All kept tokens, followed by these."""
        new = {"key": key, "rotated": rotate(key, rotary), "value": value}
        if rotary is not None:
            cos, sin = (x.expand(key.shape[0], -1, -1) for x in rotary)
            new |= {"cos": cos, "sin": sin}
        return {name: torch.cat((old, new[name]), dim=1) for name, old in self.held()}

    def _step(
        self, query: Tensor, key: Tensor, value: Tensor, rotary: Rotary
    ) -> tuple[Tensor, Late | None]:
        """One more token of sequences that all fill the window."""
        assert self.lengths is not None
        tokens = self._with(key, value, rotary)
        leaves = tokens["key"].shape[1] > self.window
        late = None
        if leaves:
            first = {name: x[:, :1] for name, x in tokens.items()}
            late = Late(query, first["key"], first["value"], _tables(first), None, 0)
        self._keep(tokens, None)
        self.lengths = self.lengths + 1
        assert self.rotated is not None and self.value is not None
        return attend(rotate(query, rotary), self.rotated, self.value), late

    def _keep(self, tokens: dict[str, Tensor], present: Tensor | None) -> None:
        """Keep the last tokens of each sequence."""
        if present is None:
            for name, x in tokens.items():
                last = x[:, -self.window :]
                # A slice would keep the whole prompt in memory.
                setattr(self, name, last.clone() if x.shape[1] > 2 * self.window else last)
            return
        counts = present.sum(dim=1)
        width = torch.arange(min(self.window, int(counts.max())), device=counts.device)
        in_order = present.logical_not().sort(dim=1, stable=True).indices
        first = (counts - self.window).clamp(min=0).unsqueeze(1)
        columns = in_order.gather(1, first + width)
        for name, x in tokens.items():
            index = columns.view(*columns.shape, *(1,) * (x.ndim - 2))
            setattr(self, name, x.gather(1, index.expand(-1, -1, *x.shape[2:])))


def _tables(tokens: dict[str, Tensor]) -> Rotary:
    return (tokens["cos"], tokens["sin"]) if "cos" in tokens else None


def _without(late: Late, kept: int) -> Late | None:
    """`late` without the first `kept` queries."""
    drop = max(kept - late.skipped, 0)
    rotary = late.rotary
    if rotary is not None:
        rotary = rotary[0][:, drop:], rotary[1][:, drop:]
    mask = None if late.mask is None else late.mask[:, drop:]
    query, key, value = (x[:, drop:] for x in late[:3])
    return Late(query, key, value, rotary, mask, max(late.skipped - kept, 0))
