"""Settings of previews and evaluations during training."""

from dataclasses import dataclass, field
from typing import Any

from mhla_gen.config.checks import check_choice, normalize_paths
from mhla_gen.config.evaluation import EvaluateConfig, FeaturesConfig
from mhla_gen.config.fields import Count, FilePaths, Guidance, Seed, Settings


@dataclass(frozen=True, kw_only=True)
class PreviewConfig(Settings, prefix="samples."):
    """A few samples, always from the same noise.

    Raises:
        ValueError: If a value is out of its range.
    """

    num_images: Count = 16
    """Number of samples, class after class."""
    num_inference_steps: Count = 40
    """Denoising steps."""
    guidance_scale: Guidance | None = None
    """Classifier-free guidance; 1 disables it. None takes the pipeline's own: 1.5 for classes, 5
    for Wan."""
    seed: Seed = 0
    """Every sample has its own seed, derived from this one."""
    batch_size: Count = 64
    """Images denoised together."""

    @property
    def of_pipeline(self) -> dict[str, Any]:
        """What a pipeline is called with; what is left out is its own."""
        given = {name: getattr(self, name) for name in ("num_inference_steps", "guidance_scale")}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class RunEvaluationConfig(Settings, prefix="evaluation."):
    """Metrics of samples during training, to follow its progress, not to publish.

    Raises:
        ValueError: If a value is out of its range.
    """

    reference: FilePaths = None
    """Images or statistics, as for `mhla-gen evaluate`."""
    metrics: tuple[str, ...] = ("fid",)
    """As for `mhla-gen evaluate`."""
    samples: PreviewConfig = field(
        default_factory=lambda: PreviewConfig(num_images=5000, guidance_scale=1.0)
    )
    """Samples to evaluate, equally many of each class."""
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    """The network whose features are compared."""

    def __post_init__(self):
        super().__post_init__()
        self._settle(reference=normalize_paths(self.key("reference"), self.reference))
        for metric in self.metrics:
            check_choice(self.key("metrics"), metric, ("fid", "sfid", "is", "fd", "kid"))

    @property
    def settings(self) -> EvaluateConfig:
        """Those of `mhla-gen evaluate` for the samples of a run."""
        return EvaluateConfig(
            reference=self.reference, metrics=self.metrics, features=self.features
        )
