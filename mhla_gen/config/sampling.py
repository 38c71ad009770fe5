"""Settings of sample sets."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mhla_gen.config.checks import check_choice, normalize_classes
from mhla_gen.config.evaluation import EvaluateConfig
from mhla_gen.config.fields import Count, FilePath, Guidance, Positive, Range, Seed, Settings, Texts
from mhla_gen.errors import UserError

FORMATS = ("npz", "png", "mp4")


@dataclass(frozen=True, kw_only=True)
class SampleConfig(Settings):
    """Images of classes, or images and videos of prompts, from a saved pipeline.

    Raises:
        ValueError: If a value is out of its range.
    """

    pipeline: FilePath = "runs/train/pipeline"
    """Run of `mhla-gen train` or one of its checkpoints, folder that `save_pretrained` wrote, or
    name on the Hugging Face hub."""
    adapter: FilePath | None = None
    """Adapter to load into it: a folder that `mhla_gen.save_adapter` wrote, a run that trained no
    other weights, or a name on the hub."""
    output_dir: FilePath = "runs/samples"
    """Folder for the samples and manifest.json. A start that was interrupted is gone on with."""

    classes: Any = "all"
    """"all", or class numbers and names: one or a list of them."""
    samples_per_class: Count | None = None
    """Images of each class, class after class; 10 unless num_samples is given."""
    num_samples: Count | None = None
    """Images over all classes, in place of samples_per_class."""
    order: Literal["balanced", "random"] = "balanced"
    """Classes of num_samples: one after the other in turn, or drawn at random."""

    prompts: Texts = None
    """Text-conditional pipelines: a prompt, a list of them, a .txt file with one a line, or a
    .jsonl file with the keys prompt, negative_prompt, seed, image."""
    negative_prompt: str | None = None
    """For prompts that have none of their own."""
    prompt_embeds: FilePath | None = None
    """Safetensors file with `prompt_embeds` [prompts, tokens, text_dim] and
    `negative_prompt_embeds` [1 or prompts, tokens, text_dim], in place of a text encoder."""
    image: FilePath | None = None
    """First frame for image-to-video pipelines, for prompts that have none of their own."""
    samples_per_prompt: Count = 1
    """Samples of each prompt, with a seed each."""

    num_inference_steps: Count | None = None
    """Denoising steps; None, here and below, takes what the run that saved the pipeline says
    (sampling.json in its folder), or else the pipeline's own default: 40 for classes, 50 for Wan.
    """
    guidance_scale: Guidance | None = None
    """Classifier-free guidance; 1 is none. The pipeline's own: 1.5 for classes, 5 for Wan."""
    guidance_scale_2: Guidance | None = None
    """That of the second expert of Wan 2.2; None takes guidance_scale."""
    guidance_interval: Any = (0.0, 1.0)
    """Noise levels in [0, 1] between which guidance is applied; 1 is pure noise. Classes only."""
    guidance_channels: Count | None = None
    """Guide this many of the first channels; None guides all, DiT guides 3. Classes only."""
    scheduler: str | None = None
    """Name of a diffusers scheduler to use in place of the saved one."""
    scheduler_options: dict[str, Any] = field(default_factory=dict)
    """Its settings, such as {flow_shift: 3.0}; others are those of the saved scheduler."""
    height: Count | None = None
    """Pixels. Images of classes are square."""
    width: Count | None = None
    """Pixels."""
    num_frames: Count | None = None
    """Frames of a video."""
    seed: Seed = 0
    """Each sample has a seed of its own, derived from this one and its number, whatever the batch
    size; sets of different seeds share no noise."""

    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Arithmetic of the models; None takes the run's, or else that of the saved weights. Wan's VAE
    and image encoder stay float32."""
    compile: bool = False
    """Compile the layers of the transformer with torch.compile. For images of classes on a GPU, a
    step is also recorded as a CUDA graph, which takes the memory of one more call."""
    reproducible: bool = True
    """Call the models with model_batch_size samples whatever batch_size is: a sample's pixels are
    the same bit for bit. False calls them with the batch: pixels may differ by rounding."""
    model_batch_size: Count | None = None
    """Samples of one call, and of one file of unfinished work. None takes 64 for classes, 1 for
    prompts."""
    batch_size: Any = "auto"
    """Samples in work at a time in a process. auto: the largest that fits where reproducible is
    false and there is a GPU (tried out), 32 on a CPU; model_batch_size where it is true."""
    offload: Literal["none", "model", "sequential"] = "none"
    """Keep models, or their single layers, on the CPU while a GPU does not need them."""
    vae_tiling: bool = False
    """Decode in tiles: less memory for large images and videos, and other pixels at the seams."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA where there is one."""

    formats: Any = "auto"
    """Of npz (all samples in one file), png and mp4 (a file each); auto: npz for classes, png for
    images of prompts, mp4 for videos."""
    fps: Positive | None = None
    """Frames per second of mp4 files; None takes the run's, or else 16."""
    keep_samples: bool = True
    """False keeps no sample but those on the contact sheet; evaluate measures them first."""
    evaluate: EvaluateConfig | None = None
    """Settings of `mhla-gen evaluate` but `samples`: score the set while it is made."""
    card: bool = False
    """Write README.md, a model card with settings and a picture, into the pipeline's folder."""

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "classes", normalize_classes(self.classes, names=True))
        if self.samples_per_class is not None and self.num_samples is not None:
            raise UserError("samples_per_class and num_samples exclude each other; give one")
        object.__setattr__(self, "guidance_interval", _interval(self.guidance_interval))
        if self.batch_size != "auto":
            Range(1).check('batch_size, where it is not "auto",', self.batch_size, whole=True)
        object.__setattr__(self, "formats", _formats(self.formats))
        if self.evaluate is not None and self.evaluate.samples is not None:
            raise UserError("evaluate.samples is the set that is made; leave it out")
        if not self.keep_samples and self.evaluate is None:
            raise UserError("keep_samples=false leaves nothing behind without evaluate")
        if isinstance(self.prompts, Sequence) and not isinstance(self.prompts, str):
            object.__setattr__(self, "prompts", tuple(self.prompts))


def _interval(values: Any) -> tuple[float, float]:
    listed = isinstance(values, Sequence) and not isinstance(values, str) and len(values) == 2
    if not listed or not all(type(v) in (int, float) for v in values):
        raise UserError(f"guidance_interval must be two noise levels in [0, 1], found {values!r}")
    low, high = map(float, values)
    if not 0 <= low <= high <= 1:
        raise UserError(
            "guidance_interval must be two noise levels in [0, 1], the lower one first, found "
            f"[{low:g}, {high:g}]"
        )
    return low, high


def _formats(values: Any) -> Any:
    if isinstance(values, str):
        if values == "auto":
            return values
        values = [values]
    if not values:
        raise UserError(f"formats must be auto or some of {', '.join(FORMATS)}, found {values!r}")
    for value in values:
        check_choice("formats", value, FORMATS)
    return tuple(values)
