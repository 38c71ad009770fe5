"""Captions to chunks of embeddings."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mhla_gen.data.caching.chunks import Chunk, Computed, batched
from mhla_gen.data.text import TextEncoder


def distinct_captions(captions: Sequence[str]) -> list[str]:
    """All different captions, sorted, and the empty one, which comes first: guidance needs it."""
    return sorted({"", *captions})


@dataclass(frozen=True, eq=False)
class PromptChunks:
    """Computes chunks of embedded captions."""

    captions: list[str]
    encoder: TextEncoder
    batch_size: int
    """Captions per forward pass."""

    def compute(self, chunks: Sequence[Chunk], done: Callable[[int], Any]) -> Iterator[Computed]:
        """The tensors of each chunk, and its empty record; see `write_missing`.

        Yields:
            `embeds`, without padding, one caption after the other `[tokens, text_dim]`, and
            `lengths`, the tokens of each, int64.
        """
        for chunk in chunks:
            parts: list[Tensor] = []
            for items in batched(chunk.items, self.batch_size):
                parts += self.encoder.embed([self.captions[item] for item in items])
                done(len(items))
            lengths = torch.tensor([len(part) for part in parts])
            yield {"embeds": torch.cat(parts), "lengths": lengths}, {}
