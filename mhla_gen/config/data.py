"""Settings of data sets and of caches of latents."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from mhla_gen.config.checks import elements, is_whole
from mhla_gen.config.fields import (
    MOST_WORKERS,
    Count,
    FilePath,
    Positive,
    Range,
    Settings,
    Side,
)
from mhla_gen.errors import UserError

SOURCES = ("digits", "npz", "folder", "list", "huggingface", "webdataset", "clips", "cache")
_ENCODED = ("folder", "list", "huggingface", "webdataset")


@dataclass(frozen=True, kw_only=True)
class DataConfig(Settings, prefix="data."):
    """The images or clips to learn from, and what they are conditioned on.

    Raises:
        ValueError: If the source needs a path or a size that is not given, or has no path.
    """

    source: Literal[
        "digits", "npz", "folder", "list", "huggingface", "webdataset", "clips", "cache"
    ] = "digits"
    """digits: scikit-learn's 1,797 handwritten digits, 8 × 8, grey. npz: a file with `arr_0` (uint8
    `[images, height, width, channels]`) and `labels`. folder: one sub-folder of images a class.
    list: a CSV or JSONL file that names images, with a label or a caption each. huggingface: a
    folder that `datasets` saved. webdataset: tar shards. clips: videos. cache: what `mhla-gen
    cache` wrote, of images or clips."""
    path: FilePath | None = None
    """The file or folder. webdataset also takes a pattern: shards/train-*.tar."""
    image_size: Side | None = None
    """Side of the square images in pixels. Image files are cropped and resized to it; other sources
    have a fixed size, which this must equal if given."""
    failed_reads: Literal["stop", "quarantine"] = "stop"
    """What to do if a file cannot be read after several attempts (a damaged image is always left
    out and listed). stop ends the command; the same command resumes exactly when the file can be
    read. quarantine lists it and uses another image of its class from then on: such a run cannot be
    repeated."""
    horizontal_flip: bool = False
    """Mirror every image with probability one half. A cache must contain the mirrored images: set
    it there, too."""
    image_column: str = "image"
    """Column of images (huggingface)."""
    label_column: str = "label"
    """Column of labels (list, huggingface), if there is one: class numbers, or names."""
    caption_column: str = "caption"
    """Column of captions (list, huggingface, clips), if there is one."""
    num_classes: Count | None = None
    """Number of classes if labels are numbers; None: the largest label plus one."""
    split: str = "train"
    """Split, if the folder has several (huggingface)."""

    def __post_init__(self):
        super().__post_init__()
        if self.source != "digits" and self.path is None:
            raise UserError(f"data.source={self.source} needs data.path")
        if self.source == "digits" and self.path is not None:
            others = ", ".join(source for source in SOURCES if source != "digits")
            raise UserError(
                f"data.path={self.path} is given, but data.source=digits reads no files; set "
                f"data.source=folder for a folder of class folders, or another of {others}"
            )
        if self.source in _ENCODED and self.image_size is None:
            raise UserError(f"data.source={self.source} needs data.image_size, in pixels")


@dataclass(frozen=True, kw_only=True)
class ClipsConfig(Settings, prefix="clips."):
    """How clips are cut out of videos (data.source=clips).

    Raises:
        ValueError: If a value is out of its range.
    """

    buckets: Any = ((81, 480, 832), (81, 832, 480))
    """Sizes of clips, a list of [frames, height, width] in pixels. A video goes to the bucket with
    the closest aspect ratio among those that its length and size allow."""
    fps: Positive | None = 16.0
    """Frames per second of a clip, each the source frame nearest in time; None keeps the source's
    own frames."""
    max_windows: Count = 1
    """Most clips to cut out of one video, evenly spaced without overlap; 1 takes its middle."""
    upscale: bool = False
    """Also use videos that are smaller than a bucket, enlarged."""
    condition: bool = False
    """Also encode the conditions of image-to-video models: the first frame followed by grey, for
    models with additional channels; and the first frame by image_encoder, for Wan 2.1."""
    hdr: Literal["leave_out", "tone_map"] = "leave_out"
    """What to do with HDR video. tone_map: diffuse white becomes white, brighter light is
    clipped."""
    missing_caption: Literal["error", "empty"] = "error"
    """What to do about a video without a caption."""
    timeout: Positive = 60.0
    """Time limit in seconds for decoding a clip; one that takes longer is left out and listed."""

    def __post_init__(self):
        super().__post_init__()
        self._settle(buckets=_normalize_buckets(self.buckets))


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig(Settings, prefix="vae."):
    """The autoencoder that encodes latents."""

    path: FilePath | None = None
    """Folder or hub name of a pipeline of a family that docs/models.md says to train, or of its
    autoencoder; an AutoencoderTiny, too."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of encoding."""
    tiling: bool = False
    """Encode large frames tile by tile: less memory, slightly different latents."""


@dataclass(frozen=True, kw_only=True)
class TextEncoderConfig(Settings, prefix="text."):
    """The encoder of captions."""

    path: FilePath | None = None
    """Folder or hub name of a pipeline with the text encoders: of a family that can be trained
    (docs/models.md), or with a T5 or UMT5 `text_encoder` and a `tokenizer`. None does not embed
    captions."""
    max_sequence_length: Count | None = None
    """Most tokens of a caption; longer ones are truncated. None takes the pipeline's own, 512 for
    Wan."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Dtype of the encoder, and of its embeddings on disk."""
    batch_size: Count = 16
    """Captions per forward pass."""


@dataclass(frozen=True, kw_only=True)
class ImageEncoderConfig(Settings, prefix="image_encoder."):
    """The encoder of first frames, for image-to-video models of Wan 2.1."""

    path: FilePath | None = None
    """Folder or hub name of a pipeline with a CLIP `image_encoder` and an `image_processor`. None
    takes those of the pipeline in vae.path, if it has them and clips.condition=true."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Arithmetic of the encoder, and of its embeddings on disk."""


@dataclass(frozen=True, kw_only=True)
class CacheConfig(Settings):
    """Latents, labels and embedded captions of a data set, computed once.

    Raises:
        ValueError: If something is missing or out of its range.
    """

    output_dir: FilePath = "runs/cache"
    """New folder for the cache; `data.path` of a training run."""
    data: DataConfig = field(default_factory=DataConfig)
    """What to encode; data.horizontal_flip adds mirrored images."""
    clips: ClipsConfig = field(default_factory=ClipsConfig)
    """How clips are cut out of videos."""
    vae: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    """What encodes latents."""
    text: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    """What embeds captions."""
    image_encoder: ImageEncoderConfig = field(default_factory=ImageEncoderConfig)
    """What embeds first frames, with clips.condition=true."""
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Dtype of latents on disk."""
    batch_size: Count = 16
    """Images per forward pass of the autoencoder; clips go one by one."""
    chunk_size: Count | None = None
    """Samples per file; an interruption costs each process one file. None: 512 images, 8 clips."""
    num_workers: Annotated[int, Range(1, MOST_WORKERS)] = 8
    """Images or clips to decode at the same time, in each process."""
    retry_quarantined: bool = False
    """Try again what an earlier run could not read."""
    verify: bool = False
    """Write nothing, but compare every file of a finished cache with its digest."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU if there is one."""

    def __post_init__(self):
        super().__post_init__()
        if self.clips.condition and self.data.horizontal_flip:
            raise UserError(
                "clips.condition does not support mirrored clips; leave data.horizontal_flip out"
            )
        if self.image_encoder.path is not None and not self.clips.condition:
            raise UserError("image_encoder.path needs clips.condition=true")
        if self.data.source == "cache":
            raise UserError("data.source=cache is a cache already; name the source to make it from")

    def require_autoencoder(self) -> None:
        """Raise unless there is something to encode with.

        Raises:
            UserError: Naming the setting.
        """
        if self.vae.path is None:
            raise UserError("a cache needs vae.path, the folder or hub name of an autoencoder")


def _normalize_buckets(buckets: Any) -> tuple[tuple[int, int, int], ...]:
    message = f"clips.buckets must be a list of [frames, height, width], found {buckets!r}"
    found: list[tuple[int, int, int]] = []
    for bucket in elements(buckets) or ():
        sizes = elements(bucket)
        if sizes is None or len(sizes) != 3 or not all(is_whole(n, 1) for n in sizes):
            raise UserError(message)
        found.append((sizes[0], sizes[1], sizes[2]))
    if not found:
        raise UserError(message)
    if len(set(found)) < len(found):
        raise UserError(f"clips.buckets names a bucket twice: {buckets!r}")
    return tuple(found)
