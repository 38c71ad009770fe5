"""Images and clips to chunks of latents."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mhla_gen.data.arrays import to_model_range
from mhla_gen.data.autoencoder import Normalisation, encode, is_video
from mhla_gen.data.caching.chunks import Chunk, Computed, batched
from mhla_gen.data.image_encoder import ImageEncoder
from mhla_gen.data.protocol import Examples
from mhla_gen.media.pictures import UnreadableImageError


@dataclass(frozen=True, eq=False)
class LatentChunks:
    """Computes chunks of normalised posteriors."""

    examples: Examples
    caption_rows: Sequence[int] | None
    """Where each example's caption is among the embedded ones."""
    vae: Any
    normalisation: Normalisation
    dtype: torch.dtype
    """Of latents on disk."""
    flips: bool
    """Also encode mirrored images."""
    condition: bool
    """Also encode the first frame of each clip, followed by grey."""
    image_encoder: ImageEncoder | None
    """Also embeds the first frame of each clip."""
    batch_size: int
    """Images per forward pass; clips go one by one."""
    readers: ThreadPoolExecutor
    """Decode ahead of the autoencoder."""
    ahead: int
    """How many images or clips."""

    def compute(self, chunks: Sequence[Chunk], done: Callable[[int], Any]) -> Iterator[Computed]:
        """The tensors of each chunk, and its record; see `write_missing`.

        Yields:
            `mean`, `std` where encoding is not deterministic, both `_flipped`, `condition` and
            `image_embeds`; `item`, the example's number, `label` and `caption`, where there are
            any, int64; all of them `[rows, …]`.
            The record has `names`, one a row, and `quarantined`: `name` and `reason` of the rest.
        """
        # While a chunk is encoded, the next one is read already.
        pictures = self._read_ahead([item for chunk in chunks for item in chunk.items])
        for chunk in chunks:
            yield self._encoded(chunk, pictures, done)

    def _encoded(
        self,
        chunk: Chunk,
        pictures: Iterator[np.ndarray | UnreadableImageError],
        done: Callable[[int], Any],
    ) -> Computed:
        clips = len(self.examples.sample_shapes[chunk.bucket]) == 4
        rows: list[int] = []
        parts: list[dict[str, Tensor]] = []
        quarantined: list[dict[str, str]] = []
        for items in batched(chunk.items, 1 if clips else self.batch_size):
            good: dict[int, np.ndarray] = {}
            for item in items:
                picture = next(pictures)
                if isinstance(picture, UnreadableImageError):
                    quarantined.append(self._left_out(item, str(picture)))
                else:
                    good[item] = picture
            if good:
                latents = self._latents(np.stack(list(good.values())))
                finite = finite_rows(latents)
                reason = f"has latents that are not finite in {self.dtype}".replace("torch.", "")
                quarantined += [
                    self._left_out(item, reason)
                    for item, kept in zip(good, finite.tolist(), strict=True)
                    if not kept
                ]
                rows += [item for item, kept in zip(good, finite.tolist(), strict=True) if kept]
                parts.append({name: tensor[finite] for name, tensor in latents.items()})
            done(len(items))
        names = parts[0] if parts else ()
        tensors = {name: torch.cat([part[name] for part in parts]) for name in names}
        record = {"names": [self.examples.describe(i) for i in rows], "quarantined": quarantined}
        return tensors | self._known(rows), record

    def _left_out(self, item: int, reason: str) -> dict[str, str]:
        return {"name": self.examples.describe(item), "reason": reason}

    def _read_ahead(self, items: Sequence[int]) -> Iterator[np.ndarray | UnreadableImageError]:
        waiting: deque[Future[np.ndarray | UnreadableImageError]] = deque()
        for item in items:
            waiting.append(self.readers.submit(self._read, item))
            if len(waiting) > self.ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _read(self, item: int) -> np.ndarray | UnreadableImageError:
        try:
            return self.examples.pixels(item)
        except UnreadableImageError as error:
            return error

    def _latents(self, pixels: np.ndarray) -> dict[str, Tensor]:
        samples = to_model_range(pixels)
        if samples.shape[1] == 1:
            # Grey becomes three equal channels, as it does when a file is read.
            samples = samples.repeat_interleave(3, dim=1)
        # An image is a clip of one frame, and the other way round.
        if is_video(self.vae) and samples.ndim == 4:
            samples = samples.unsqueeze(2)
        if not is_video(self.vae) and samples.ndim == 5:
            samples = samples.squeeze(2)
        samples = samples.to(self.vae.device)
        tensors = self._posterior(samples, "")
        if self.flips:
            tensors |= self._posterior(samples.flip(-1), "_flipped")
        if self.condition:
            grey = torch.zeros_like(samples[:, :, 1:])
            given = self._posterior(torch.cat((samples[:, :, :1], grey), dim=2), "")
            tensors["condition"] = given["mean"]
        if self.image_encoder is not None:
            frames = [clip[0] for clip in pixels]
            tensors["image_embeds"] = torch.cat([self.image_encoder.embed(f) for f in frames])
        return tensors

    def _posterior(self, samples: Tensor, suffix: str) -> dict[str, Tensor]:
        mean, std = self.normalisation.apply(*encode(self.vae, samples))
        tensors = {f"mean{suffix}": mean}
        if std is not None:
            tensors[f"std{suffix}"] = std
        return {name: tensor.to(self.dtype).cpu() for name, tensor in tensors.items()}

    def _known(self, rows: Sequence[int]) -> dict[str, Tensor]:
        known = {"item": torch.tensor(rows, dtype=torch.int64)}
        if self.examples.labels is not None:
            known["label"] = torch.tensor([int(self.examples.labels[i]) for i in rows])
        if self.caption_rows is not None:
            known["caption"] = torch.tensor([self.caption_rows[i] for i in rows])
        return {name: tensor.to(torch.int64) for name, tensor in known.items()}


def finite_rows(tensors: Mapping[str, Tensor]) -> Tensor:
    """Which rows have no NaN and no infinity in any of the tensors `[rows, …]`; bool `[rows]`."""
    rows = [tensor.isfinite().flatten(1).all(dim=1) for tensor in tensors.values()]
    return torch.stack(rows).all(dim=0)
