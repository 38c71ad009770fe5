"""Captions to chunks of embeddings."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mhla_gen.data.caching.chunks import Chunk, Computed, batched
from mhla_gen.data.captions import CaptionEncoder
from mhla_gen.data.text import TextEncoder

LENGTHS = ".lengths"


def distinct_captions(captions: Sequence[str]) -> list[str]:
    """All different captions, sorted, and the empty one, which comes first: guidance needs it."""
    return sorted({"", *captions})


@dataclass(frozen=True, eq=False)
class PromptChunks:
    """Computes chunks of embedded captions."""

    captions: list[str]
    encoder: TextEncoder | CaptionEncoder
    batch_size: int
    """Captions per forward pass."""

    def compute(self, chunks: Sequence[Chunk], done: Callable[[int], Any]) -> Iterator[Computed]:
        """The tensors of each chunk, and its empty record; see `write_missing`.

        Yields:
            Each tensor of the captions by its name. One with an axis of tokens is without padding,
            one caption after the other `[tokens, …]`, and its name with `.lengths` has the tokens
            of each, int64; one without is `[captions, …]`.
        """
        for chunk in chunks:
            rows: list[dict[str, Tensor]] = []
            for items in batched(chunk.items, self.batch_size):
                rows += self.encoder.embed([self.captions[item] for item in items])
                done(len(items))
            yield _joined(rows), {}


def caption_of(chunk: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """The tensors of one caption of a chunk."""
    found = {}
    for name, values in chunk.items():
        if name in ("embeds", "lengths"):
            # As earlier versions wrote `prompt_embeds`.
            continue
        if name.endswith(LENGTHS):
            continue
        lengths = chunk.get(f"{name}{LENGTHS}")
        found[name] = values[row] if lengths is None else _part(values, lengths, row)
    if "embeds" in chunk:
        found["prompt_embeds"] = _part(chunk["embeds"], chunk["lengths"], row)
    return found


def _part(values: Tensor, lengths: Tensor, row: int) -> Tensor:
    start = int(lengths[:row].sum())
    return values[start : start + int(lengths[row])]


def _joined(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    found = {}
    for name, first in rows[0].items():
        parts = [row[name] for row in rows]
        if first.ndim == 1 and first.is_floating_point():
            found[name] = torch.stack(parts)
        else:
            found[name] = torch.cat(parts)
            found[f"{name}{LENGTHS}"] = torch.tensor([len(part) for part in parts])
    return found
