"""Settings of what a run shows of its model while it trains."""

from dataclasses import dataclass, field
from typing import Any

from mhla_gen.config.checks import check_at_least, check_choice, normalize_paths
from mhla_gen.config.evaluation import FeaturesConfig


@dataclass(frozen=True, kw_only=True)
class PreviewConfig:
    """A few samples, always from the same noise.

    Raises:
        ValueError: If a value is out of its range.
    """

    num_images: int = 16
    """How many, class after class."""
    num_inference_steps: int = 40
    """Denoising steps."""
    guidance_scale: float = 1.5
    """Classifier-free guidance; 1 is none."""
    seed: int = 0
    """Each sample has a seed of its own, derived from this one."""
    batch_size: int = 64
    """Images denoised together."""

    def __post_init__(self):
        for name in ("num_images", "num_inference_steps", "batch_size"):
            check_at_least(f"samples.{name}", getattr(self, name), 1)
        check_at_least("samples.seed", self.seed, 0)
        check_at_least("samples.guidance_scale", self.guidance_scale, 1)


@dataclass(frozen=True, kw_only=True)
class RunEvaluationConfig:
    """Metrics of samples while a run goes on: its course, not a number to publish.

    Raises:
        ValueError: If a value is out of its range.
    """

    reference: Any = None
    """Images or statistics, as in evaluation."""
    metrics: tuple[str, ...] = ("fid",)
    """As in evaluation."""
    samples: PreviewConfig = field(
        default_factory=lambda: PreviewConfig(num_images=5000, guidance_scale=1.0)
    )
    """Samples that are evaluated, of all classes alike."""
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    """The network whose features are compared."""

    def __post_init__(self):
        object.__setattr__(
            self, "reference", normalize_paths("evaluation.reference", self.reference)
        )
        for metric in self.metrics:
            check_choice("evaluation.metrics", metric, ("fid", "sfid", "is", "fd", "kid"))
