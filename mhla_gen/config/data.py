"""Settings of data sets and of caches of latents."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mhla_gen.config.fields import Count, FilePath, Positive, Settings
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
    """The file or the folder. webdataset takes a pattern too: shards/train-*.tar."""
    image_size: Count | None = None
    """Side of the square images in pixels. Image files are cropped and resized to it; the other
    sources have a size, and a number given here must equal it."""
    failed_reads: Literal["stop", "quarantine"] = "stop"
    """What becomes of an image whose file cannot be read after several attempts (a damaged one is
    always left out, and listed). stop ends the command, and the same command goes on exactly when
    the file can be read. quarantine lists it, and another one of its class takes its place from
    then on: such a run cannot be repeated."""
    horizontal_flip: bool = False
    """Mirror every image with probability one half. A cache must hold both sides for it: say it
    there, too."""
    image_column: str = "image"
    """Column of images (huggingface)."""
    label_column: str = "label"
    """Column of labels (list, huggingface), if there is one: class numbers, or names."""
    caption_column: str = "caption"
    """Column of captions (list, huggingface, clips), if there is one."""
    num_classes: Count | None = None
    """Number of classes where labels are numbers; None: the largest label plus one."""
    split: str = "train"
    """Split of a folder that holds several (huggingface)."""

    def __post_init__(self):
        super().__post_init__()
        if self.source != "digits" and self.path is None:
            raise UserError(f"data.source={self.source} needs data.path")
        if self.source == "digits" and self.path is not None:
            others = ", ".join(source for source in SOURCES if source != "digits")
            raise UserError(
                f"data.path={self.path} is given, but data.source=digits reads no files; write "
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
    """Frames, height and width in pixels of the clips that a model learns from, a list. A video
    goes to the bucket of the nearest aspect ratio among those that its length and size allow."""
    fps: Positive | None = 16.0
    """Frames per second of a clip, each the source frame nearest in time; None keeps the source's
    own frames."""
    max_windows: Count = 1
    """Up to how many clips are cut out of one video: evenly spread and apart; one is its middle."""
    upscale: bool = False
    """Also take videos that are smaller than a bucket, enlarged."""
    condition: bool = False
    """Also encode what image-to-video models with further channels are given: the first frame, and
    grey after it; and the first frame by image_encoder, for models of Wan 2.1."""
    hdr: Literal["leave_out", "tone_map"] = "leave_out"
    """What to do with HDR video. tone_map: diffuse white becomes white, brighter light is cut."""
    missing_caption: Literal["error", "empty"] = "error"
    """What to do about a video without a caption."""
    timeout: Positive = 60.0
    """Seconds that decoding one clip may take; a clip that takes longer is left out and listed."""

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "buckets", _normalize_buckets(self.buckets))


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig(Settings, prefix="vae."):
    """The autoencoder that makes latents."""

    path: FilePath | None = None
    """Folder or hub name of an AutoencoderKL, AutoencoderDC, AutoencoderTiny, AutoencoderKLWan or
    AutoencoderKLLTXVideo, or of a pipeline with one."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Arithmetic of encoding."""
    tiling: bool = False
    """Encode large frames tile by tile: less memory, slightly other latents."""


@dataclass(frozen=True, kw_only=True)
class TextEncoderConfig(Settings, prefix="text."):
    """The encoder of captions."""

    path: FilePath | None = None
    """Folder or hub name of a pipeline with the text encoders: of a family that docs/models.md says
    to train, or with a T5 or UMT5 `text_encoder` and a `tokenizer`. None: captions are not
    embedded."""
    max_sequence_length: Count | None = None
    """Tokens of a caption; longer ones are cut. None takes the pipeline's own, 512 for Wan."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Arithmetic of the encoder, and of its embeddings on disk."""
    batch_size: Count = 16
    """Captions per forward pass."""


@dataclass(frozen=True, kw_only=True)
class ImageEncoderConfig(Settings, prefix="image_encoder."):
    """The encoder of first frames, which image-to-video models of Wan 2.1 read."""

    path: FilePath | None = None
    """Folder or hub name of a pipeline with a CLIP `image_encoder` and an `image_processor`. None:
    those of the pipeline in vae.path, if it has them and clips.condition=true."""
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
    """What is encoded; data.horizontal_flip adds mirrored images."""
    clips: ClipsConfig = field(default_factory=ClipsConfig)
    """How clips are cut out of videos."""
    vae: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    """What makes latents."""
    text: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    """What embeds captions."""
    image_encoder: ImageEncoderConfig = field(default_factory=ImageEncoderConfig)
    """What embeds first frames, where clips.condition=true."""
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Latents on disk."""
    batch_size: Count = 16
    """Images per forward pass of the autoencoder; clips go one by one."""
    chunk_size: Count | None = None
    """Samples per file; an interruption costs each process one file. None: 512 images, 8 clips."""
    num_workers: Count = 8
    """Images or clips that are decoded at a time, in each process."""
    retry_quarantined: bool = False
    """Try again what could not be read in an earlier run."""
    verify: bool = False
    """Write nothing: read a finished cache and compare every file with its digest."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU if there is one."""

    def __post_init__(self):
        super().__post_init__()
        if self.clips.condition and self.data.horizontal_flip:
            raise UserError(
                "clips.condition is not encoded for mirrored clips; leave data.horizontal_flip out"
            )
        if self.image_encoder.path is not None and not self.clips.condition:
            raise UserError("image_encoder.path is given; it needs clips.condition=true, too")
        if self.data.source == "cache":
            raise UserError("data.source=cache is a cache already; name what it is to be made of")


def _normalize_buckets(buckets: Any) -> tuple[tuple[int, int, int], ...]:
    message = f"clips.buckets must be a list of [frames, height, width], found {buckets!r}"
    if not isinstance(buckets, Sequence) or isinstance(buckets, str) or not buckets:
        raise UserError(message)
    for bucket in buckets:
        if not isinstance(bucket, Sequence) or isinstance(bucket, str) or len(bucket) != 3:
            raise UserError(message)
        if any(not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in bucket):
            raise UserError(message)
    found = tuple((frames, height, width) for frames, height, width in buckets)
    if len(set(found)) < len(found):
        raise UserError(f"clips.buckets names a bucket twice: {buckets!r}")
    return found
