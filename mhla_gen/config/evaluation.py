"""Settings of evaluation and of reference statistics."""

from dataclasses import dataclass, field
from typing import Any, Literal

from mhla_gen.config.checks import check_at_least, check_choice, normalize_paths


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig:
    """The network whose features are compared, and how it is run."""

    extractor: Literal["inception", "dinov2", "efficientnet-lite0", "torchscript", "i3d"] = (
        "inception"
    )
    """inception is that of FID. i3d measures videos."""
    weights: str | None = None
    """File with the weights, or DINOv2's folder or hub name. None: inception's released weights
    (fetched once), DINOv2 large, EfficientNet's package; the other two need a TorchScript file."""
    dtype: Literal["float32", "float64"] = "float32"
    """Arithmetic inside inception; float64 makes it independent of batch size and device."""
    batch_size: int = 64
    """Images per forward pass."""
    num_workers: int | None = None
    """Processes that decode images; None: 8 beside a GPU, none on a CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU if there is one."""
    video_frames: int = 16
    """Frames of a clip, from a video's first frame on (i3d)."""
    video_stride: int = 1
    """Every how many frames one is taken (i3d)."""
    cache_dir: str = "~/.cache/mhla_gen/evaluation"
    """Folder of extracted features; they are found again by content, never by name."""
    cache_limit_gb: float = 20.0
    """Largest size of that folder: the sets that nobody has asked for longest leave it, but none
    of the last day."""

    def __post_init__(self):
        check_choice(
            "features.extractor",
            self.extractor,
            ("inception", "dinov2", "efficientnet-lite0", "torchscript", "i3d"),
        )
        check_choice("features.dtype", self.dtype, ("float32", "float64"))
        check_choice("features.device", self.device, ("auto", "cpu", "cuda"))
        for name in ("batch_size", "video_frames", "video_stride"):
            check_at_least(f"features.{name}", getattr(self, name), 1)
        check_at_least("features.cache_limit_gb", self.cache_limit_gb, 0)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Distances and scores of samples against a reference.

    Raises:
        ValueError: If something is missing or does not go together.
    """

    samples: Any = None
    """Folder of images, npz with `arr_0`, sample set, or a list of these."""
    reference: Any = None
    """The same, or an npz of statistics (`mu`, `sigma`, `mu_s`, `sigma_s`, optional `arr_0`)."""
    metrics: tuple[str, ...] = ("fid", "sfid", "is", "precision", "recall", "kid")
    """Of fid, sfid, is, precision, recall, kid; fd (Fréchet distance) with other extractors than
    inception, fvd with i3d."""
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    """The network whose features are compared."""
    size: int | None = None
    """Side in pixels to which both sets are brought by ADM's centre crop; None compares as is."""
    out: str = "metrics.json"
    """File for the numbers."""
    skip_corrupt: bool = False
    """Leave out images that cannot be read, and say so, instead of stopping."""
    neighbours: int = 3
    """k of precision and recall."""
    kid_subsets: int = 100
    """Random subsets that KID averages over."""
    kid_subset_size: int = 1000
    """Images per subset."""
    jackknife_groups: int = 10
    """Groups of samples left out in turn for the 95 % interval of a distance."""
    seed: int = 2020
    """Fixes the groups and KID's subsets; 2020 draws those of torch-fidelity."""

    def __post_init__(self):
        for name in ("samples", "reference"):
            object.__setattr__(self, name, normalize_paths(name, getattr(self, name)))
        known = ("fid", "sfid", "is", "precision", "recall", "kid", "fd", "fvd")
        for metric in self.metrics:
            check_choice("metrics", metric, known)
        if not self.metrics:
            raise ValueError(f"metrics must name at least one of {', '.join(known)}")
        for name in ("neighbours", "kid_subsets"):
            check_at_least(name, getattr(self, name), 1)
        for name in ("kid_subset_size", "jackknife_groups"):
            check_at_least(name, getattr(self, name), 2)
        if self.size is not None:
            check_at_least("size", self.size, 1)


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """Statistics of the user's own images, in a file that evaluation takes as its reference.

    Raises:
        ValueError: If something is missing or out of its range.
    """

    data: Any = None
    """Folder of images, npz with `arr_0`, sample set, or a list of these."""
    out: str = "reference.npz"
    """File for the statistics."""
    size: int | None = None
    """Side in pixels of ADM's centre crop; None keeps the images' own size."""
    keep_images: int = 10_000
    """How many images, chosen at random, go into the file for precision, recall and KID."""
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    """The network whose statistics are taken."""
    skip_corrupt: bool = False
    """Leave out images that cannot be read, and say so, instead of stopping."""
    seed: int = 0
    """Fixes which images are kept."""

    def __post_init__(self):
        object.__setattr__(self, "data", normalize_paths("data", self.data))
        check_at_least("keep_images", self.keep_images, 0)
        if self.size is not None:
            check_at_least("size", self.size, 1)
