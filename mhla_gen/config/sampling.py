"""Settings of sample sets."""

from dataclasses import dataclass
from typing import Any, Literal

from mhla_gen.config.checks import check_at_least, check_choice, normalize_classes


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
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA where there is one."""

    def __post_init__(self):
        object.__setattr__(self, "classes", normalize_classes(self.classes))
        for name in ("samples_per_class", "num_inference_steps", "batch_size"):
            check_at_least(name, getattr(self, name), 1)
        check_at_least("seed", self.seed, 0)
        check_at_least("guidance_scale", self.guidance_scale, 1)
        check_choice("dtype", self.dtype, ("float32", "bfloat16"))
