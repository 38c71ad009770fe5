"""Settings of evaluation and of reference statistics."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from mhla_gen.config.checks import check_choice, normalize_paths
from mhla_gen.config.fields import (
    MOST_WORKERS,
    AtLeastTwo,
    Count,
    FilePath,
    FilePaths,
    NotNegative,
    Positive,
    Range,
    Seed,
    Settings,
    Side,
    Whole,
    in_group,
)
from mhla_gen.errors import UserError


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig(Settings, prefix="features."):
    """The network that computes the features to compare."""

    extractor: Literal[
        "inception", "dinov2", "efficientnet-lite0", "pixels", "torchscript", "i3d"
    ] = "inception"
    """inception is for FID; pixels are the images themselves; i3d measures videos."""
    weights: FilePath | None = None
    """File with the weights, or DINOv2's folder or hub name. None: inception's released weights
    (fetched once), DINOv2 large, EfficientNet's package; torchscript and i3d need a file."""
    trust: bool = False
    """Run a TorchScript file, which is a program that can do anything that you can, such as write
    files: set true if you know where it comes from."""
    dtype: Literal["float32", "float64"] = "float32"
    """Dtype inside inception; float64 makes it independent of batch size and device."""
    batch_size: Count = 64
    """Images per forward pass."""
    num_workers: Annotated[int, Range(0, MOST_WORKERS)] | None = None
    """Processes that decode images; None: 8 beside a GPU for files, none for an npz or on a CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU if there is one."""
    video_frames: Count = 16
    """Frames of a clip, from a video's first frame on (i3d)."""
    video_stride: Count = 1
    """Take every n-th frame (i3d)."""
    video_timeout: Positive = 60.0
    """Seconds that decoding a video may take (i3d)."""
    cache_dir: FilePath = "~/.cache/mhla_gen/evaluation"
    """Cache of extracted features, identified by the content of the images, never by name."""
    cache_limit_gb: NotNegative = 20.0
    """Largest size of that folder. Beyond it the least recently used sets are removed, except those
    of the last day."""

    def check_network(self) -> None:
        """Raise unless the extractor has the settings that it needs, and no others.

        Raises:
            UserError: Naming what to change.
        """
        if self.extractor != "inception" and self.dtype != "float32":
            raise UserError(
                f"{self.key('dtype')}={self.dtype} is for inception; {self.extractor} runs in "
                "float32"
            )
        if self.extractor == "pixels" and self.weights is not None:
            raise UserError(f"{self.key('extractor')}=pixels has no weights; leave them out")
        if self.extractor not in ("torchscript", "i3d"):
            return
        if self.weights is None:
            raise UserError(
                f"{self.key('extractor')}={self.extractor} needs {self.key('weights')}=FILE, a "
                f"TorchScript file, and {self.key('trust')}=true"
            )
        if not self.trust:
            raise UserError(
                f"{self.weights} is TorchScript, a program that can do anything that you can: if "
                f"you know where it comes from, set {self.key('trust')}=true"
            )


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Settings):
    """Distances and scores of samples against a reference.

    Raises:
        ValueError: If something is missing or does not fit together.
    """

    samples: FilePaths = None
    """Folder of images, npz with `arr_0`, sample set, or a list of these."""
    reference: FilePaths = None
    """The same, or an npz of statistics (`mu`, `sigma`, `mu_s`, `sigma_s`, optional `arr_0`)."""
    metrics: tuple[str, ...] = ("fid", "sfid", "is", "precision", "recall", "kid")
    """Of fid, sfid, is, precision, recall, kid; fd (Fréchet distance) with other extractors than
    inception, fvd with i3d; accuracy and copies where samples and reference have labels."""
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    """The network whose features are compared."""
    size: Side | None = None
    """Center-crop and resize both sets to this side in pixels, as ADM does; None compares as is."""
    out: FilePath = "metrics.json"
    """File for the numbers."""
    skip_corrupt: bool = False
    """Leave out images that cannot be read, and say so, instead of stopping."""
    neighbours: Count = 3
    """k of precision and recall."""
    kid_subsets: Count = 100
    """Random subsets that KID averages over."""
    kid_subset_size: AtLeastTwo = 1000
    """Images per subset."""
    jackknife_groups: AtLeastTwo = 10
    """Groups of samples, each left out once, for the 95 % interval of a distance."""
    seed: Seed = 2020
    """Fixes the groups and KID's subsets; 2020 gives those of torch-fidelity."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("samples", "reference"):
            self._settle(**{name: normalize_paths(self.key(name), getattr(self, name))})
        known = (
            "fid",
            "sfid",
            "is",
            "precision",
            "recall",
            "kid",
            "fd",
            "fvd",
            "accuracy",
            "copies",
        )
        for metric in self.metrics:
            check_choice(self.key("metrics"), metric, known)
        if not self.metrics:
            raise UserError(f"{self.key('metrics')} must name at least one of {', '.join(known)}")

    def check_comparison(self) -> None:
        """Raise unless samples and reference are given, and the network that the metrics need.

        Raises:
            UserError: Naming what to change.
        """
        if self.samples is None:
            raise UserError(f"{self.key('samples')}=PATH is required: the images to measure")
        if self.reference is None and set(self.metrics) != {"is"}:
            raise UserError(f"{self.key('reference')}=PATH is required for every metric but is")
        extractor = self.features.extractor
        wrong = [name for name in self.metrics if not _fits(name, extractor)]
        if wrong:
            raise UserError(
                f"{', '.join(wrong)} cannot be measured with "
                f"{self.key('features.extractor')}={extractor}: fid, sfid and is mean inception, "
                "fvd means i3d, fd is the same distance on any other network; give "
                f"{self._fitting()}, for example"
            )
        with in_group(self.key("features.")):
            self.features.check_network()

    def _fitting(self) -> str:
        """A setting that makes metrics and extractor fit; the one that was chosen is kept."""
        chosen = self.metrics != EvaluateConfig().metrics
        for extractor in ("inception", "i3d", "dinov2"):
            if chosen and all(_fits(name, extractor) for name in self.metrics):
                return f"{self.key('features.extractor')}={extractor}"
        fitting = {"inception": "fid", "i3d": "fvd"}
        names = fitting.get(self.features.extractor, "fd,precision,recall,kid")
        return f"{self.key('metrics')}=[{names}]"


def _fits(metric: str, extractor: str) -> bool:
    if metric in ("fid", "sfid", "is"):
        return extractor == "inception"
    if metric == "fvd":
        return extractor == "i3d"
    return metric != "fd" or extractor not in ("inception", "i3d")


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig(Settings):
    """Statistics of the user's own images, in a file that `mhla-gen evaluate` takes as reference.

    Raises:
        ValueError: If something is missing or out of its range.
    """

    data: FilePaths = None
    """Folder of images, npz with `arr_0`, sample set, or a list of these."""
    out: FilePath = "reference.npz"
    """File for the statistics."""
    size: Side | None = None
    """Center-crop and resize to this side in pixels, as ADM does; None keeps the images' size."""
    keep_images: Whole = 10_000
    """Images to store in the file, chosen at random, for precision, recall and KID."""
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    """The network that computes the features."""
    skip_corrupt: bool = False
    """Leave out images that cannot be read, and say so, instead of stopping."""
    seed: Seed = 0
    """Fixes which images are kept."""

    def __post_init__(self):
        super().__post_init__()
        self._settle(data=normalize_paths("data", self.data))

    def check_files(self) -> None:
        """Raise unless images are given, and a file that can hold their statistics.

        Raises:
            UserError: Naming the setting.
        """
        if self.data is None:
            raise UserError("data=FOLDER is required: the images to take statistics of")
        if not self.out.endswith(".npz"):
            raise UserError(f"out must be an npz file, found {self.out}")
        self.features.check_network()
