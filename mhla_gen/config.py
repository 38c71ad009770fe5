"""Every setting of the toolkit: frozen dataclasses, and `load_config` to read them.

A config file is YAML whose first key, `job`, names the command it belongs to. Values come from the
dataclass, then the file, then `key=value` overrides; a key that no dataclass has is an error.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException


class ConfigError(ValueError):
    """A config file or an override that does not fit; the message is one sentence for the user."""


@dataclass(frozen=True, kw_only=True)
class MHLAConfig:
    """How a transformer's self-attention is replaced.

    Raises:
        ValueError: If a value is out of its range.
    """

    layout: Any = "auto"
    """Blocks along each axis of the token grid, such as (4, 4), or "auto" (see `auto_layout`)."""
    layers: Any = "all"
    """Which layers: "all", a list of indices, or a fraction such as "2/3": every third stays
    softmax."""
    feature_map: str = "relu"
    """φ: relu, squared_relu, elu+1, softplus or identity."""
    normalize: bool = True
    """Divide by the denominator."""
    conv: bool = True
    """Add a depthwise convolution of V on the token grid; it starts at zero."""
    conv_kernel_size: int = 3
    """Odd width of that convolution along every axis, in tokens."""
    gate: bool = True
    """Multiply the output by SiLU of a projection of the layer's input; it starts at one."""
    output_norm: bool = False
    """RMS-normalise the output of every head."""
    mixing_per_head: bool = False
    """One mixing matrix per head instead of one per layer."""
    mixing_init: Literal["locality", "uniform"] = "locality"
    """Initial mixing matrix."""
    mixing_learnable: bool = True
    """Train the mixing matrix; frozen otherwise."""
    eps: float = 1e-6
    """Added to the denominator."""
    implementation: str = "auto"
    """Which code runs, see `mhla_gen.ops.mhla`."""

    def __post_init__(self):
        object.__setattr__(self, "layout", _normalize_layout(self.layout))
        object.__setattr__(self, "layers", _normalize_layers(self.layers))
        if self.conv_kernel_size < 1 or self.conv_kernel_size % 2 == 0:
            raise ValueError(
                f"conv_kernel_size must be odd and positive, found {self.conv_kernel_size}"
            )
        _check_choice("mixing_init", self.mixing_init, ("locality", "uniform"))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a JSON config; `MHLAConfig(**d)` reads them back."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The images to learn from, with one class label each.

    Raises:
        ValueError: If the source needs a path or a size that is not given.
    """

    source: Literal["digits", "npz", "folder"] = "digits"
    """digits: scikit-learn's 1,797 handwritten digits, 8 × 8, grey. npz: a file with `arr_0` (uint8
    `[images, height, width, channels]`) and `labels`. folder: one sub-folder of images a class."""
    path: str | None = None
    """The npz file or the folder of class folders."""
    image_size: int | None = None
    """Side of the square images in pixels. A folder's images are cropped and resized to it; the
    other sources have a size, and a number given here must equal it."""
    horizontal_flip: bool = False
    """Mirror every image with probability one half."""

    def __post_init__(self):
        _check_choice("data.source", self.source, ("digits", "npz", "folder"))
        if self.source != "digits" and self.path is None:
            raise ValueError(f"data.source={self.source} needs data.path")
        if self.source == "folder" and self.image_size is None:
            raise ValueError("data.source=folder needs data.image_size, in pixels")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A class-conditional diffusion transformer (DiT) and the kind of its self-attention."""

    attention: Literal["softmax", "linear", "mhla"] = "mhla"
    """linear is MHLA with one block: the control that has the same convolution and gate."""
    mhla: MHLAConfig = field(default_factory=MHLAConfig)
    """Settings of linear and mhla; linear replaces the layout by one block."""
    patch_size: int = 2
    """Side of a token in pixels."""
    num_layers: int = 12
    """Transformer blocks."""
    num_attention_heads: int = 6
    """Heads per block; the hidden size is heads × attention_head_dim."""
    attention_head_dim: int = 64
    """Channels per head."""

    def __post_init__(self):
        _check_choice("model.attention", self.attention, ("softmax", "linear", "mhla"))
        for name in ("patch_size", "num_layers", "num_attention_heads", "attention_head_dim"):
            _check_at_least(f"model.{name}", getattr(self, name), 1)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Training of a class-conditional model from scratch by flow matching.

    Raises:
        ValueError: If a value is out of its range.
    """

    output_dir: str = "runs/train"
    """New folder for the log, the checkpoints and the trained pipeline."""
    data: DataConfig = field(default_factory=DataConfig)
    """What to learn from."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """What to train."""
    seed: int = 0
    """Fixes the initial weights, the order of the images and all noise."""
    max_steps: int = 10_000
    """Optimizer steps."""
    batch_size: int = 256
    """Images per optimizer step, over all processes and accumulated micro-batches."""
    gradient_accumulation_steps: int = 1
    """Micro-batches per optimizer step."""
    learning_rate: float = 3e-4
    """Peak learning rate of AdamW."""
    lr_scheduler: Literal["constant_with_warmup", "cosine", "linear"] = "constant_with_warmup"
    """Course of the learning rate, by its diffusers name."""
    warmup_steps: int = 100
    """Steps until the peak learning rate."""
    weight_decay: float = 0.0
    """Decay of weight matrices; biases, embeddings, norms and mixing matrices have none."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    mixed_precision: Literal["no", "bf16"] = "bf16"
    """Arithmetic of the forward pass; weights stay float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    ema_decay: float = 0.9999
    """Decay of the averaged weights that the pipeline is saved with."""
    label_dropout: float = 0.1
    """Share of labels replaced by "no class", which classifier-free guidance needs."""
    logit_mean: float = 0.0
    """Mean of the logit of the noise level σ."""
    logit_std: float = 1.0
    """Standard deviation of the logit of σ."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; 0 writes none."""
    keep_checkpoints: int = 2
    """How many checkpoints stay on disk."""
    log_every: int = 50
    """Steps per line of log.jsonl."""
    resume: Literal["never", "latest"] = "never"
    """latest goes on from the newest checkpoint in output_dir, or starts where there is none."""

    def __post_init__(self):
        _check_choice(
            "lr_scheduler", self.lr_scheduler, ("constant_with_warmup", "cosine", "linear")
        )
        _check_choice("mixed_precision", self.mixed_precision, ("no", "bf16"))
        _check_choice("resume", self.resume, ("never", "latest"))
        for name in (
            "max_steps",
            "batch_size",
            "gradient_accumulation_steps",
            "keep_checkpoints",
            "log_every",
        ):
            _check_at_least(name, getattr(self, name), 1)
        _check_at_least("warmup_steps", self.warmup_steps, 0)
        _check_at_least("checkpoint_every", self.checkpoint_every, 0)
        for name in ("ema_decay", "label_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), found {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Samples from a saved class-conditional pipeline.

    Raises:
        ValueError: If a value is out of its range.
    """

    pipeline: str = "runs/train/pipeline"
    """Folder that `save_pretrained` wrote."""
    output_dir: str = "runs/samples"
    """New folder for samples.npz, samples.png and manifest.json."""
    classes: Any = "all"
    """"all" or a list of class numbers."""
    samples_per_class: int = 10
    """Images of each class."""
    num_inference_steps: int = 40
    """Denoising steps."""
    guidance_scale: float = 1.5
    """Classifier-free guidance; 1 is none."""
    scheduler: str | None = None
    """Name of a diffusers scheduler to use in place of the saved one."""
    seed: int = 0
    """Sample i starts from noise of seed + i, whatever the batch size."""
    batch_size: int = 64
    """Images denoised together."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the model."""
    device: str = "auto"
    """auto takes CUDA where there is one."""

    def __post_init__(self):
        object.__setattr__(self, "classes", _normalize_classes(self.classes))
        for name in ("samples_per_class", "num_inference_steps", "batch_size"):
            _check_at_least(name, getattr(self, name), 1)
        _check_at_least("seed", self.seed, 0)
        _check_at_least("guidance_scale", self.guidance_scale, 1)
        _check_choice("dtype", self.dtype, ("float32", "bfloat16"))


@dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    """The whole job in minutes: train on digits, sample, score, beside plain linear attention.

    Raises:
        ValueError: If a value is out of its range.
    """

    output_dir: str = "runs/quickstart"
    """New folder for everything that the quickstart leaves."""
    seed: int = 0
    """Fixes training and samples."""
    max_steps: int = 600
    """Optimizer steps of each of the two models."""
    batch_size: int = 128
    """Images per step."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    model: ModelConfig = field(
        default_factory=lambda: ModelConfig(
            mhla=MHLAConfig(layout=(2, 2)),
            patch_size=2,
            num_layers=4,
            num_attention_heads=4,
            attention_head_dim=32,
        )
    )
    """The MHLA model; the control differs in the layout only: one block."""
    samples_per_class: int = 20
    """Samples of each digit, for both models."""
    num_inference_steps: int = 40
    """Denoising steps."""
    guidance_scale: float = 1.5
    """Classifier-free guidance."""

    def __post_init__(self):
        if self.model.attention != "mhla":
            raise ValueError(
                f"the quickstart trains model.attention=mhla, found {self.model.attention}; "
                "`mhla-gen train` has the other kinds"
            )
        for name in ("max_steps", "batch_size", "samples_per_class", "num_inference_steps"):
            _check_at_least(name, getattr(self, name), 1)


def _normalize_classes(classes: Any) -> Any:
    if isinstance(classes, str) and classes == "all":
        return classes
    message = f'classes must be "all" or a list of class numbers, found {classes!r}'
    if not isinstance(classes, Sequence) or isinstance(classes, str) or not classes:
        raise ValueError(message)
    if any(not isinstance(c, int) or isinstance(c, bool) or c < 0 for c in classes):
        raise ValueError(message)
    return tuple(classes)


def _check_at_least(name: str, value: float, least: float) -> None:
    if value < least:
        raise ValueError(f"{name} must be at least {least}, found {value}")


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

    def __post_init__(self):
        _check_choice(
            "features.extractor",
            self.extractor,
            ("inception", "dinov2", "efficientnet-lite0", "torchscript", "i3d"),
        )
        _check_choice("features.dtype", self.dtype, ("float32", "float64"))
        _check_choice("features.device", self.device, ("auto", "cpu", "cuda"))
        for name in ("batch_size", "video_frames", "video_stride"):
            _check_at_least(f"features.{name}", getattr(self, name), 1)


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
            object.__setattr__(self, name, _normalize_paths(name, getattr(self, name)))
        known = ("fid", "sfid", "is", "precision", "recall", "kid", "fd", "fvd")
        for metric in self.metrics:
            _check_choice("metrics", metric, known)
        if not self.metrics:
            raise ValueError(f"metrics must name at least one of {', '.join(known)}")
        for name in ("neighbours", "kid_subsets"):
            _check_at_least(name, getattr(self, name), 1)
        for name in ("kid_subset_size", "jackknife_groups"):
            _check_at_least(name, getattr(self, name), 2)
        if self.size is not None:
            _check_at_least("size", self.size, 1)


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
        object.__setattr__(self, "data", _normalize_paths("data", self.data))
        _check_at_least("keep_images", self.keep_images, 0)
        if self.size is not None:
            _check_at_least("size", self.size, 1)


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Pictures and numbers of what a model's self-attention does.

    Raises:
        ValueError: If a value is out of its range.
    """

    model: str | None = None
    """Folder that `save_pretrained` wrote (model or pipeline), or a run of train or quickstart."""
    teacher: str | None = None
    """Folder of the softmax model to compare with, on the same inputs."""
    output_dir: str = "runs/inspect"
    """New folder for index.html, its pictures and statistics.json."""
    component: str = "transformer"
    """Which transformer of a pipeline; the second expert of Wan 2.2 is transformer_2."""
    data: DataConfig | None = None
    """Images to add noise to, as in `train`; None inspects the model on noise alone."""
    num_inputs: int = 4
    """Inputs that rank and entropy are averaged over; maps are those of the first."""
    classes: Any = "all"
    """Class numbers of the inputs, in turn; "all" starts with 0. Data come with their own."""
    timesteps: tuple[int, ...] = ()
    """Noise levels in [0, 1000). Empty: 999 for noise alone, where sampling starts; 500 for
    data."""
    grid: Any = None
    """Tokens along each axis, for Wan latent frames, height and width after patching. None: the
    model's own resolution."""
    queries: Any = "auto"
    """Tokens whose maps are drawn, a list of positions on the grid; "auto" takes four."""
    head: int | None = None
    """Head whose maps are drawn; None is the mean over heads."""
    max_rows: int = 512
    """Queries that rank and entropy are computed from, drawn at random where there are more."""
    seed: int = 0
    """Fixes noise, text embeddings, and which data and queries are taken."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the model; attention weights are computed in float64 from what it made."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU if there is one."""

    def __post_init__(self):
        object.__setattr__(self, "classes", _normalize_classes(self.classes))
        object.__setattr__(self, "timesteps", tuple(self.timesteps))
        if self.grid is not None:
            object.__setattr__(self, "grid", _normalize_integers("grid", self.grid, 1))
        if self.queries != "auto":
            listed = isinstance(self.queries, Sequence) and not isinstance(self.queries, str)
            if not listed or not self.queries:
                raise ValueError(
                    f'queries must be "auto" or a list of positions such as [[0, 3], [2, 2]], '
                    f"found {self.queries!r}"
                )
            positions = tuple(_normalize_integers("queries", q, 0) for q in self.queries)
            object.__setattr__(self, "queries", positions)
        _check_choice("dtype", self.dtype, ("float32", "bfloat16"))
        _check_choice("device", self.device, ("auto", "cpu", "cuda"))
        _check_at_least("num_inputs", self.num_inputs, 1)
        _check_at_least("max_rows", self.max_rows, 2)
        _check_at_least("seed", self.seed, 0)
        if self.head is not None:
            _check_at_least("head", self.head, 0)
        if any(not 0 <= t < 1000 for t in self.timesteps):
            raise ValueError(f"timesteps must be in [0, 1000), found {list(self.timesteps)}")
        if self.data is not None and self.classes != "all":
            raise ValueError("data come with their classes; leave classes out, or data")


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Checkpoints of other code into ours, or ours into theirs.

    Raises:
        ValueError: If a value is out of its range.
    """

    source: str | None = None
    """Import: a .safetensors file, a folder of them, or a file of torch.save. Export: the folder
    of a transformer that `save_pretrained` wrote."""
    output_dir: str = "runs/convert"
    """New folder. Import: a transformer for `from_pretrained`. Export: model.pt, a state dict."""
    format: Literal["dit", "mhla_dit", "mhla_wan"] = "dit"
    """The other side's: facebookresearch/DiT, or the DiT or the Wan of the MHLA authors."""
    direction: Literal["import", "export"] = "import"
    """import reads the format, export writes it."""
    weights: Literal["auto", "ema", "model", "state_dict"] = "auto"
    """Entry of a training checkpoint; auto takes the first that is there, in this order."""
    num_attention_heads: int | None = None
    """Heads of a DiT that has not one of the published widths; the weights do not tell."""
    layout: Any = None
    """mhla_wan: blocks along frames, height and width, such as (3, 5, 10); the weights tell their
    product only."""
    normalizer: Literal["released", "paper"] = "released"
    """mhla_dit: what the other code divides by; the released one departs from the paper's Eq. 4."""
    allow_differences: bool = False
    """mhla_dit: convert although the model will compute something else, as a start for training."""

    def __post_init__(self):
        _check_choice("format", self.format, ("dit", "mhla_dit", "mhla_wan"))
        _check_choice("direction", self.direction, ("import", "export"))
        _check_choice("weights", self.weights, ("auto", "ema", "model", "state_dict"))
        _check_choice("normalizer", self.normalizer, ("released", "paper"))
        if self.layout is not None:
            object.__setattr__(self, "layout", _normalize_integers("layout", self.layout, 1))
        if self.num_attention_heads is not None:
            _check_at_least("num_attention_heads", self.num_attention_heads, 1)


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Latency and memory of attention operators or of whole models, side by side.

    Raises:
        ValueError: If a value is out of its range.
    """

    subject: Literal["ops", "model"] = "ops"
    """What is measured: the operators alone, or one denoising step of a transformer."""
    output_dir: str = "runs/bench"
    """Folder for bench.json and bench.png."""
    methods: tuple[str, ...] = ("softmax", "linear", "blockwise")
    """Rows for every size: softmax (torch's choice), softmax_cudnn, softmax_flash, linear, and MHLA
    as blockwise, fused or auto."""
    grids: Any = "squares"
    """Token grids, one size each: a list such as [[16, 16], [32, 32]], "squares" (8×8 to 64×64),
    or "models", those of DiT and Wan models with their heads."""
    layout: Any = "auto"
    """Blocks along each axis of the grids, or "auto"."""
    batch_size: int = 1
    """Sequences at once."""
    num_heads: int = 4
    """Heads of the operators."""
    head_dim: int = 64
    """Channels of a head of the operators."""
    rotary: bool = False
    """Rotate queries and keys inside the linear operators."""
    backward: bool = True
    """Time forward and backward together too; operators only."""
    model: Literal["dit", "wan"] = "dit"
    """DiT-XL/2 or Wan2.1-1.3B, random weights."""
    num_layers: int | None = None
    """Layers of the model; None takes all."""
    compile: bool = False
    """Compile the model's layers with torch.compile."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Arithmetic of inputs and models."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU if there is one."""

    def __post_init__(self):
        known = (
            *("softmax", "softmax_cudnn", "softmax_flash", "linear"),
            *("naive", "blockwise", "fused", "auto"),
        )
        object.__setattr__(self, "methods", tuple(self.methods))
        for method in self.methods:
            _check_choice("methods", method, known)
        object.__setattr__(self, "layout", _normalize_layout(self.layout))
        if self.grids == "squares":
            object.__setattr__(self, "grids", tuple((side, side) for side in (8, 16, 32, 64)))
        if self.grids != "models":
            listed = isinstance(self.grids, Sequence) and not isinstance(self.grids, str)
            if not listed or not self.grids:
                raise ValueError(
                    'grids must be "squares", "models" or a list such as [[16, 16]], '
                    f"found {self.grids!r}"
                )
            grids = tuple(_normalize_integers("grids", grid, 1) for grid in self.grids)
            object.__setattr__(self, "grids", grids)
        _check_choice("subject", self.subject, ("ops", "model"))
        _check_choice("model", self.model, ("dit", "wan"))
        _check_choice("dtype", self.dtype, ("float32", "float16", "bfloat16"))
        _check_choice("device", self.device, ("auto", "cpu", "cuda"))
        for name in ("batch_size", "num_heads", "head_dim"):
            _check_at_least(name, getattr(self, name), 1)


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Which parts of the installation to try."""

    checks: tuple[str, ...] = ()
    """Names of checks; none means all. `mhla-gen doctor --dry-run` lists them."""


def _normalize_integers(name: str, values: Any, least: int) -> tuple[int, ...]:
    integers = isinstance(values, Sequence) and not isinstance(values, str) and 0 < len(values) < 4
    if not integers or any(
        not isinstance(n, int) or isinstance(n, bool) or n < least for n in values
    ):
        raise ValueError(f"{name} needs 1 to 3 whole numbers from {least} on, found {values!r}")
    return tuple(values)


def _normalize_paths(name: str, paths: Any) -> tuple[str, ...] | None:
    if paths is None:
        return None
    if isinstance(paths, str | Path):
        return (str(paths),)
    if not isinstance(paths, Sequence) or not paths:
        raise ValueError(f"{name} must be a path or a list of paths, found {paths!r}")
    return tuple(str(path) for path in paths)


def _normalize_layout(layout: Any) -> Any:
    if isinstance(layout, str) and layout == "auto":
        return layout
    message = f'layout must be "auto" or 1 to 3 positive block counts, found {layout!r}'
    if not isinstance(layout, Sequence) or isinstance(layout, str) or not 1 <= len(layout) <= 3:
        raise ValueError(message)
    if any(not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in layout):
        raise ValueError(message)
    return tuple(layout)


def _normalize_layers(layers: Any) -> Any:
    message = f'layers must be "all", a list of indices or a fraction like "2/3", found {layers!r}'
    if isinstance(layers, str):
        if layers == "all":
            return layers
        part, slash, whole = layers.partition("/")
        if not (slash and part.isdecimal() and whole.isdecimal() and 0 < int(part) <= int(whole)):
            raise ValueError(message)
        return layers
    if not isinstance(layers, Sequence):
        raise ValueError(message)
    if any(not isinstance(i, int) or isinstance(i, bool) or i < 0 for i in layers):
        raise ValueError(message)
    if not layers or len(set(layers)) != len(layers):
        raise ValueError(message + " (empty or with duplicates)")
    return tuple(sorted(layers))


def _check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, found {value!r}")


def load_config(
    path: str | Path | None = None, overrides: Sequence[str] = (), schema: type | None = None
) -> Any:
    """Read a config: defaults, then the file, then the overrides.

    Args:
        path: YAML file, or None for the defaults of `schema`.
        overrides: `key=value` strings; nested keys with dots, lists as `[1, 2]`.
        schema: Dataclass to read. By default the one that the file's `job` names.

    Returns:
        A frozen dataclass, `schema`.

    Raises:
        ConfigError: If the file is missing or is no YAML mapping, its job is another one, a key is
            unknown, or a value does not fit.
    """
    values = {} if path is None else _read_yaml(Path(path))
    job = values.pop("job", None)
    if schema is None:
        if job not in SCHEMAS:
            raise ConfigError(
                f"{path or 'a config'} must start with job: {' | '.join(SCHEMAS)}; found {job!r}"
            )
        schema = SCHEMAS[job]
    elif job is not None and SCHEMAS.get(job) is not schema:
        raise ConfigError(f"{path} is a config for `mhla-gen {job}`, not for {_job_of(schema)}")
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"overrides are written key=value, found {override!r}")
    try:
        # Overrides go into the file's values: a frozen dataclass is read-only once structured.
        given = OmegaConf.create(values)
        given.merge_with_dotlist(list(overrides))
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), given))
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        where = "the overrides" if path is None else str(path)
        raise ConfigError(f"{where}: {_first_line(error)}") from error


def save_config(config: Any, path: str | Path) -> None:
    """Write a config as YAML that `load_config` reads back, `job` first."""
    Path(path).write_text(to_yaml(config))


def to_yaml(config: Any) -> str:
    """The resolved config as YAML, `job` first."""
    return f"job: {_job_of(type(config))}\n" + OmegaConf.to_yaml(OmegaConf.structured(config))


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"config file {path} does not exist")
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {_first_line(error)}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping of keys to values")
    return values


def _first_line(error: Exception) -> str:
    # OmegaConf appends lines such as full_key and object_type; the key helps, the rest does not.
    lines = str(error).splitlines() or [type(error).__name__]
    key = next((line.split(":", 1)[1].strip() for line in lines if "full_key:" in line), "")
    return f"{lines[0]} (key {key})" if key and key not in lines[0] else lines[0]


def _job_of(schema: type) -> str:
    return next((job for job, known in SCHEMAS.items() if known is schema), schema.__name__)


# Command name → its settings. A config file's `job` is one of these names.
SCHEMAS: dict[str, type] = {
    "quickstart": QuickstartConfig,
    "train": TrainConfig,
    "sample": SampleConfig,
    "evaluate": EvaluateConfig,
    "reference": ReferenceConfig,
    "inspect": InspectConfig,
    "convert": ConvertConfig,
    "bench": BenchConfig,
    "doctor": DoctorConfig,
}
