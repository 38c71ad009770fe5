"""Settings of what a run shows of its model while it trains."""

from dataclasses import dataclass, field
from typing import Any

from mhla_gen.config.checks import check_choice, normalize_paths
from mhla_gen.config.evaluation import FeaturesConfig
from mhla_gen.config.fields import Count, FilePaths, Guidance, Seed, Settings


@dataclass(frozen=True, kw_only=True)
class PreviewConfig(Settings, prefix="samples."):
    """A few samples, always from the same noise.

    Raises:
        ValueError: If a value is out of its range.
    """

    num_images: Count = 16
    """How many, class after class."""
    num_inference_steps: Count = 40
    """Denoising steps."""
    guidance_scale: Guidance | None = None
    """Classifier-free guidance; 1 is none. None takes the pipeline's own: 1.5 for classes, 5 for
    Wan."""
    seed: Seed = 0
    """Each sample has a seed of its own, derived from this one."""
    batch_size: Count = 64
    """Images denoised together."""

    @property
    def of_pipeline(self) -> dict[str, Any]:
        """What a pipeline is called with; what is left out is its own."""
        given = {name: getattr(self, name) for name in ("num_inference_steps", "guidance_scale")}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class RunEvaluationConfig(Settings, prefix="evaluation."):
    """Metrics of samples while a run goes on: its course, not a number to publish.

    Raises:
        ValueError: If a value is out of its range.
    """

    reference: FilePaths = None
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
        super().__post_init__()
        object.__setattr__(
            self, "reference", normalize_paths("evaluation.reference", self.reference)
        )
        for metric in self.metrics:
            check_choice("evaluation.metrics", metric, ("fid", "sfid", "is", "fd", "kid"))
