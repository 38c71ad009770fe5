"""Settings of sample sets."""

from dataclasses import dataclass, field
from typing import Any, Literal

from mhla_gen.config.checks import LARGEST, check_choice, elements, normalize_classes
from mhla_gen.config.evaluation import EvaluateConfig
from mhla_gen.config.fields import (
    Count,
    FilePath,
    Guidance,
    Positive,
    Range,
    Seed,
    Settings,
    Side,
    Texts,
)
from mhla_gen.errors import UserError

FORMATS = ("npz", "png", "mp4")


@dataclass(frozen=True, kw_only=True)
class SampleConfig(Settings):
    """Images of classes, or images and videos of prompts, from a saved pipeline.

    Raises:
        ValueError: If a value is out of its range.
    """

    pipeline: FilePath = "runs/train/pipeline"
    """A run of `mhla-gen train` or one of its checkpoints, a folder written by `save_pretrained`,
    or a name on the Hugging Face hub."""
    adapter: FilePath | None = None
    """Adapter to load into it: a folder written by `mhla_gen.save_adapter`, a run that trained no
    other weights, or a name on the hub."""
    output_dir: FilePath = "runs/samples"
    """Folder for the samples and manifest.json. An interrupted command is resumed."""

    classes: Any = "all"
    """"all", or class numbers and names: one or a list of them."""
    samples_per_class: Count | None = None
    """Images per class, class after class; 10 unless num_samples is given."""
    num_samples: Count | None = None
    """Images over all classes, instead of samples_per_class."""
    order: Literal["balanced", "random"] = "balanced"
    """Classes of num_samples: balanced cycles through them, random picks them at random."""

    prompts: Texts = None
    """Text-conditional pipelines: a prompt, a list of them, a .txt file with one per line, or a
    .jsonl file with the keys prompt, negative_prompt, seed, image."""
    negative_prompt: str | None = None
    """Negative prompt for prompts without one."""
    prompt_embeds: FilePath | None = None
    """Safetensors file with `prompt_embeds` [prompts, tokens, text_dim] and
    `negative_prompt_embeds` [1 or prompts, tokens, text_dim], instead of a text encoder."""
    image: FilePath | None = None
    """First frame for image-to-video pipelines, for prompts without one."""
    samples_per_prompt: Count = 1
    """Samples per prompt, each with its own seed."""

    num_inference_steps: Count | None = None
    """Denoising steps. None, here and below, takes the value of the run that saved the pipeline
    (sampling.json in its folder), or else the pipeline's own default: 40 for classes, 50 for Wan.
    """
    guidance_scale: Guidance | None = None
    """Classifier-free guidance; 1 disables it. The defaults are 1.5 for classes, 5 for Wan."""
    guidance_scale_2: Guidance | None = None
    """Guidance of the second expert of Wan 2.2; None takes guidance_scale."""
    guidance_interval: Any = (0.0, 1.0)
    """Noise levels in [0, 1] between which guidance is applied; 1 is pure noise. Classes only."""
    guidance_channels: Count | None = None
    """Guide this many of the first channels; None guides all, DiT guides 3. Classes only."""
    scheduler: str | None = None
    """Name of a diffusers scheduler to use instead of the saved one."""
    scheduler_options: dict[str, Any] = field(default_factory=dict[str, Any])
    """Its settings, such as {flow_shift: 3.0}; others are kept from the saved scheduler."""
    height: Side | None = None
    """Pixels. Images of classes are square."""
    width: Side | None = None
    """Pixels."""
    num_frames: Count | None = None
    """Frames of a video."""
    seed: Seed = 0
    """Every sample has its own seed, derived from this one and the sample's number, whatever the
    batch size; sets with different seeds share no noise."""

    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Dtype of the models; None takes the run's, or else that of the saved weights. Wan's VAE and
    image encoder stay float32."""
    compile: bool = False
    """Compile the layers of the transformer with torch.compile. For class-conditional images on a
    GPU, a step is also recorded as a CUDA graph, which takes the memory of one more call."""
    reproducible: bool = True
    """Always call the models with model_batch_size samples, so that the pixels of a sample are
    bit-identical for any batch_size. False calls them with batch_size samples: pixels may differ by
    rounding."""
    model_batch_size: Count | None = None
    """Samples per call of the models, and per file of unfinished work. None takes 64 for classes, 1
    for prompts."""
    batch_size: Any = "auto"
    """Samples that a process works on at a time. auto is model_batch_size; with reproducible=false
    it is the largest that fits on the GPU (found by trying), 32 on a CPU."""
    offload: Literal["none", "model", "sequential"] = "none"
    """Keep models (model) or single layers (sequential) on the CPU until the GPU needs them."""
    vae_tiling: bool = False
    """Decode in tiles: less memory for large images and videos, slightly different at the seams."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU if there is one."""

    formats: Any = "auto"
    """One or more of npz (all samples in one file), png and mp4 (a file each). auto: npz for
    classes, png for images from prompts, mp4 for videos."""
    fps: Positive | None = None
    """Frames per second of mp4 files; None takes the run's, or else 16."""
    keep_samples: bool = True
    """False keeps only the contact sheet; evaluate measures the samples first."""
    evaluate: EvaluateConfig | None = None
    """Settings of `mhla-gen evaluate` except `samples`: evaluate the set while it is made."""
    card: bool = False
    """Write README.md, a model card with settings and a picture, into the pipeline's folder."""

    def __post_init__(self):
        super().__post_init__()
        self._settle(classes=normalize_classes(self.classes, names=True))
        if self.samples_per_class is not None and self.num_samples is not None:
            raise UserError("samples_per_class and num_samples exclude each other; give only one")
        self._settle(guidance_interval=_interval(self.guidance_interval))
        if self.batch_size != "auto":
            Range(1, LARGEST).check(
                'batch_size, where it is not "auto",', self.batch_size, whole=True
            )
        self._settle(formats=_formats(self.formats))
        if self.evaluate is not None and self.evaluate.samples is not None:
            raise UserError("evaluate.samples is always the set that is made; leave it out")
        if not self.keep_samples and self.evaluate is None:
            raise UserError("keep_samples=false needs evaluate, or nothing would be left")
        if (prompts := elements(self.prompts)) is not None:
            self._settle(prompts=prompts)


def _interval(values: Any) -> tuple[float, float]:
    levels = elements(values)
    if levels is None or len(levels) != 2 or not all(type(v) in (int, float) for v in levels):
        raise UserError(f"guidance_interval must be two noise levels in [0, 1], found {values!r}")
    low, high = map(float, levels)
    if not 0 <= low <= high <= 1:
        raise UserError(
            "guidance_interval must be two noise levels in [0, 1], the lower one first, found "
            f"[{low:g}, {high:g}]"
        )
    return low, high


def _formats(values: Any) -> Any:
    if values == "auto":
        return values
    listed = (values,) if isinstance(values, str) else elements(values)
    if not listed:
        raise UserError(
            f"formats must be auto or one or more of {', '.join(FORMATS)}, found {values!r}"
        )
    for value in listed:
        check_choice("formats", value, FORMATS)
    return listed
