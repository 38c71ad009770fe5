"""A finished cache as a data set."""

import itertools
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mhla_gen.config import AutoencoderConfig, DataConfig, ImageEncoderConfig
from mhla_gen.data import image_encoder
from mhla_gen.data.autoencoder import identity, load_autoencoder
from mhla_gen.data.buckets import consecutive
from mhla_gen.data.caching.chunks import read_record, read_tensors
from mhla_gen.data.caching.index import CAPTIONS_NAME, Index
from mhla_gen.data.caching.prompts import caption_of
from mhla_gen.data.image_encoder import ImageEncoder, load_image_encoder
from mhla_gen.data.protocol import Batch
from mhla_gen.errors import UserError
from mhla_gen.files.saved import read_json


@dataclass(frozen=True, eq=False)
class CachedLatents:
    """Normalised latents with labels or embedded captions; see `TrainingData`.

    Files are mapped, so that only samples that are used are read. What sample i is depends on the
    cache alone.
    """

    folder: Path
    index: Index
    _tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def open(cls, folder: str | Path) -> "CachedLatents":
        """Open a cache that `mhla-gen cache` finished.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If a file of it is missing or has another size.
        """
        folder = Path(folder)
        index = Index.read(folder)
        for name, facts in index.files.items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != facts["bytes"]:
                raise UserError(
                    f"{path} is missing or does not have {facts['bytes']} bytes; run `mhla-gen "
                    "cache` again with its config, or copy it again"
                )
        return cls(folder, index)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """See `TrainingData`."""
        return self.index.class_names

    @property
    def buckets(self) -> tuple[range, ...]:
        """See `TrainingData`."""
        return consecutive([bucket.count for bucket in self.index.buckets])

    @property
    def sample_shapes(self) -> tuple[tuple[int, ...], ...]:
        """`(channels, (frames,) height, width)` of the latents of each bucket."""
        return tuple(bucket.latents for bucket in self.index.buckets)

    @property
    def has_flips(self) -> bool:
        """Whether it has mirrored images."""
        return self.index.settings["flips"]

    @property
    def fps(self) -> float | None:
        """Frames per second of its clips; None for images, and where files keep their rates."""
        return self.index.settings["clips"].get("fps")

    @property
    def has_condition(self) -> bool:
        """Whether it has the conditions of image-to-video models."""
        return bool(self.index.settings["clips"].get("condition"))

    @property
    def has_image_embeds(self) -> bool:
        """Whether it has embedded first frames."""
        return self.index.settings.get("image_encoder") is not None

    @property
    def has_prompts(self) -> bool:
        """Whether it has embedded captions."""
        return bool(self.index.prompts)

    def __len__(self) -> int:
        return sum(bucket.count for bucket in self.index.buckets)

    def read(self, indices: Sequence[int]) -> Batch:
        """Latents of one bucket, float32.

        Returns:
            `mean` and `std`, both `_flipped` and `condition`, if the cache has them, `[batch,
            channels, …]`; `labels`, int64 `[batch]`, `prompt_embeds`, `[batch, text_len,
            text_dim]`, zeros after the last token, and `image_embeds`, `[batch, tokens,
            image_dim]`, where it has them; what else the family's pipeline embeds captions to, by
            its names there.
        """
        places = [self._locate(index) for index in indices]
        batch: Batch = {}
        for suffix in ("", "_flipped") if self.has_flips else ("",):
            mean = self._rows(f"mean{suffix}", places).float()
            exact = f"std{suffix}" not in self._chunk(places[0][0])
            batch[f"mean{suffix}"] = mean
            batch[f"std{suffix}"] = (
                torch.zeros_like(mean) if exact else self._rows(f"std{suffix}", places).float()
            )
        if self.has_condition:
            batch["condition"] = self._rows("condition", places).float()
        if self.has_image_embeds:
            batch["image_embeds"] = self._rows("image_embeds", places).float()
        if self.class_names is not None:
            batch["labels"] = self._rows("label", places)
        if self.has_prompts:
            captions = self._rows("caption", places).tolist()
            rows = [self._prompt(caption) for caption in captions]
            batch |= {name: _stacked([row[name] for row in rows]) for name in rows[0]}
        return batch

    def describe(self, index: int) -> str:
        """See `TrainingData`."""
        name, row = self._locate(index)
        return read_record(self.folder / name)["names"][row]

    def caption(self, index: int) -> str | None:
        """The caption of a sample, if captions were embedded."""
        if not self.has_prompts:
            return None
        return self._captions[int(self._rows("caption", [self._locate(index)]))]

    @property
    def empty_prompt_embeds(self) -> Tensor:
        """The embedded empty caption, `[text_len, text_dim]`, as `read` gives embeddings.

        Raises:
            ValueError: If the cache holds no embeddings.
        """
        return self.empty_prompt["prompt_embeds"]

    @property
    def empty_prompt(self) -> dict[str, Tensor]:
        """All tensors of the empty caption, without a batch axis.

        Raises:
            ValueError: If the cache holds no embeddings.
        """
        if not self.has_prompts:
            raise UserError(f"{self.folder} has no embedded captions; build it with text.path")
        return self._prompt(0)

    def require(self, config: DataConfig) -> None:
        """Raise unless the cache is what a config describes.

        Raises:
            ValueError: Naming what differs.
        """
        sizes = {bucket.pixels[-1] for bucket in self.index.buckets}
        if config.image_size is not None and sizes != {config.image_size}:
            raise UserError(
                f"data.image_size is {config.image_size}, but the cache {self.folder} was made of "
                f"images {', '.join(map(str, sorted(sizes)))} pixels wide"
            )
        count = len(self.class_names or ())
        if config.num_classes is not None and config.num_classes != count:
            raise UserError(
                f"data.num_classes is {config.num_classes}, but the cache {self.folder} has {count}"
            )
        if config.horizontal_flip and not self.has_flips:
            raise UserError(
                f"data.horizontal_flip=true, but the cache {self.folder} has no mirrored images; "
                "build it with data.horizontal_flip=true"
            )

    def require_autoencoder(self, vae: Any) -> None:
        """Raise unless an autoencoder is the one that made the latents.

        Raises:
            ValueError: If it has other weights or another class.
        """
        known = self.index.settings["vae"]
        config = AutoencoderConfig(dtype=known["dtype"], tiling=known["tiling"])
        found = identity(vae, config)
        found = {key: found[key] for key in ("class", "weights")}
        self._require_maker("latents", "autoencoder", found, known)

    def autoencoder(self) -> Any:
        """The autoencoder that made the latents, loaded from its recorded path.

        Raises:
            ValueError: If it is not there any more, or is another one now.
        """
        known = self.index.settings["vae"]
        config = AutoencoderConfig(path=self.index.sources["vae"], dtype=known["dtype"])
        vae = load_autoencoder(config)
        self.require_autoencoder(vae)
        return vae

    def image_encoder(self) -> ImageEncoder:
        """The encoder of first frames, loaded from its recorded path.

        Raises:
            ValueError: If it is not there any more, or is another one now.
        """
        dtype = self.index.settings["image_encoder"]["dtype"]
        encoder = load_image_encoder(
            ImageEncoderConfig(path=self.index.sources["image_encoder"], dtype=dtype)
        )
        self.require_image_encoder(encoder)
        return encoder

    def require_image_encoder(self, encoder: ImageEncoder) -> None:
        """Raise unless an encoder is the one that embedded first frames.

        Raises:
            ValueError: If it has other weights or another class, or prepares images otherwise.
        """
        known = self.index.settings["image_encoder"]
        found = image_encoder.identity(encoder, ImageEncoderConfig(dtype=known["dtype"]))
        self._require_maker("embedded first frames", "image encoder", found, known)

    def _require_maker(
        self, what: str, maker: str, found: dict[str, Any], known: dict[str, Any]
    ) -> None:
        for key, value in found.items():
            if value != known[key]:
                raise UserError(
                    f"the {what} of {self.folder} were made by a different {maker} ({key}: "
                    f"{known[key]}, found {value})"
                )

    @cached_property
    def _files(self) -> tuple[list[str], list[int]]:
        """Chunks in order, and the number of samples up to the end of each."""
        chunks = [chunk for bucket in self.index.buckets for chunk in bucket.chunks if chunk[1]]
        return [n for n, _ in chunks], list(itertools.accumulate(count for _, count in chunks))

    @cached_property
    def _captions(self) -> list[str]:
        remedy = "run `mhla-gen cache` with its config again"
        return read_json(self.folder / CAPTIONS_NAME, remedy, list)

    def _locate(self, index: int) -> tuple[str, int]:
        """File and row of a sample."""
        names, ends = self._files
        number = bisect_right(ends, index)
        return names[number], index - (ends[number - 1] if number else 0)

    def _chunk(self, name: str) -> dict[str, Tensor]:
        if name not in self._tensors:
            self._tensors[name] = read_tensors(self.folder / name)
        return self._tensors[name]

    def _rows(self, tensor: str, places: Sequence[tuple[str, int]]) -> Tensor:
        return torch.stack([self._chunk(name)[tensor][row] for name, row in places])

    def _prompt(self, caption: int) -> dict[str, Tensor]:
        """An embedded caption, float32 but for masks; Wan's padded with zeros."""
        ends = list(itertools.accumulate(count for _, count in self.index.prompts))
        number = bisect_right(ends, caption)
        chunk = self._chunk(self.index.prompts[number][0])
        found = caption_of(chunk, caption - (ends[number - 1] if number else 0))
        found = {n: x.float() if x.is_floating_point() else x for n, x in found.items()}
        settings = self.index.settings["text"]
        if "pipeline" not in settings:
            embeds = found["prompt_embeds"]
            padding = settings["max_sequence_length"] - len(embeds)
            found["prompt_embeds"] = torch.nn.functional.pad(embeds, (0, 0, 0, padding))
        return found


def _stacked(rows: list[Tensor]) -> Tensor:
    """`[batch, …]`, padded with zeros where lengths differ."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
