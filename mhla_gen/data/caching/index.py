"""The content of a finished cache: index.json, written last."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mhla_gen.errors import MissingError, UserError
from mhla_gen.files import write_json
from mhla_gen.files.saved import read_json

INDEX_NAME = "index.json"
CAPTIONS_NAME = "captions.json"
QUARANTINE_NAME = "quarantine.jsonl"
SETTINGS_NAME = "settings.json"
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
    """Everything about a cache except its samples."""

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
    empty_classes: tuple[str, ...] = ()
    """Classes whose images were all left out."""

    @property
    def warning(self) -> str | None:
        """A warning about classes that a model will not learn; None if there are none."""
        if not self.empty_classes:
            return None
        names, count = self.empty_classes, len(self.empty_classes)
        shown = ", ".join(names[:8]) + (f" and {count - 8} more" if count > 8 else "")
        return (
            f"no image is left of {count} of {len(self.class_names or ())} classes ({shown}): all "
            f"were left out, see {QUARANTINE_NAME} of the cache"
        )

    @classmethod
    def read(cls, folder: Path) -> "Index":
        """The index of a cache.

        Raises:
            FileNotFoundError: If there is no finished cache, with what is there in its place.
            ValueError: If it has another format.
        """
        path = folder / INDEX_NAME
        if not folder.exists():
            raise MissingError(
                f"{folder} does not exist; data.source=cache needs a folder written by `mhla-gen "
                "cache`"
            )
        if not path.is_file() and not (folder / SETTINGS_NAME).is_file():
            raise MissingError(
                f"{folder} is not a cache, as written by `mhla-gen cache`; images need another "
                "data.source: npz for such a file, folder for a folder of class folders"
            )
        if not path.is_file():
            raise MissingError(
                f"{folder} is an unfinished cache: {INDEX_NAME} is missing; run "
                "`mhla-gen cache` with its config, which resumes it"
            )
        values = read_json(path, "remove it and run `mhla-gen cache` with its config again")
        if values.pop("format", None) != FORMAT:
            raise UserError(f"{path} has another format; build the cache again")
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
        values["empty_classes"] = tuple(values.get("empty_classes", ()))
        return cls(**values)

    def write(self, folder: Path) -> None:
        """Write index.json, whole or not at all."""
        write_json(folder / INDEX_NAME, {"format": FORMAT, **asdict(self)}, indent=1)
