"""What a finished cache holds: index.json, written last."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mhla_gen.files import written_whole

INDEX_NAME = "index.json"
CAPTIONS_NAME = "captions.json"
FORMAT = 1


@dataclass(frozen=True)
class BucketIndex:
    """Samples of one shape."""

    pixels: tuple[int, ...]
    """`(channels, (frames,) height, width)` that were encoded."""
    latents: tuple[int, ...]
    """`(channels, (frames,) height, width)` of a sample."""
    chunks: tuple[tuple[str, int], ...]
    """File and number of samples of each chunk, in order."""

    @property
    def count(self) -> int:
        """Samples."""
        return sum(count for _, count in self.chunks)


@dataclass(frozen=True)
class Index:
    """Everything about a cache but its samples."""

    settings: dict[str, Any]
    """What decided its content: see `build.content_settings`."""
    normalisation: dict[str, list[float]]
    """`mean` and `std` of each channel: `(latents - mean) / std` is what the cache holds."""
    sources: dict[str, Any]
    """Where the models and the data were: `vae`, `text`, `image_encoder`, `data`."""
    class_names: tuple[str, ...] | None
    buckets: tuple[BucketIndex, ...]
    prompts: tuple[tuple[str, int], ...]
    """File and number of captions of each chunk of embeddings; captions.json lists them. The first
    is empty."""
    files: dict[str, dict[str, Any]]
    """Bytes and SHA-256 of every chunk, by name."""
    quarantined: int
    """Images or clips that could not be read; quarantine.jsonl lists them."""

    @classmethod
    def read(cls, folder: Path) -> "Index":
        """The index of a cache.

        Raises:
            FileNotFoundError: If there is no finished cache.
            ValueError: If it has another format.
        """
        path = folder / INDEX_NAME
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} is no finished cache: {INDEX_NAME} is missing; run `mhla-gen cache` "
                "with its config, which goes on where it stopped"
            )
        values = json.loads(path.read_text())
        if values.pop("format", None) != FORMAT:
            raise ValueError(f"{path} has another format; build the cache again")
        values["buckets"] = tuple(
            BucketIndex(
                tuple(bucket["pixels"]),
                tuple(bucket["latents"]),
                tuple((name, count) for name, count in bucket["chunks"]),
            )
            for bucket in values["buckets"]
        )
        values["prompts"] = tuple((name, count) for name, count in values["prompts"])
        if values["class_names"] is not None:
            values["class_names"] = tuple(values["class_names"])
        return cls(**values)

    def write(self, folder: Path) -> None:
        """Write index.json, whole or not at all."""
        with written_whole(folder / INDEX_NAME) as partial:
            partial.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1))
