"""Settings of what a model learns to predict."""

from dataclasses import dataclass
from typing import Literal

from mhla_gen.config.checks import check_choice


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What the model learns to predict, and at which noise levels.

    Raises:
        ValueError: If a value is out of its range.
    """

    name: Literal["flow_matching"] = "flow_matching"
    """flow_matching: the velocity on the straight path from sample to noise."""
    logit_mean: float = 0.0
    """Mean of the logit of the noise level σ; above 0 means more noise."""
    logit_std: float = 1.0
    """Standard deviation of the logit of σ."""
    shift: float = 1.0
    """Moves σ to s σ / (1 + (s − 1) σ), as diffusers' flow-matching schedulers do in sampling:
    larger pictures need more noise to lose the same detail."""

    def __post_init__(self):
        check_choice("objective.name", self.name, ("flow_matching",))
        for name in ("logit_std", "shift"):
            if getattr(self, name) <= 0:
                raise ValueError(f"objective.{name} must be above 0, found {getattr(self, name)}")
