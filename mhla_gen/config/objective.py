"""Settings of what a model learns to predict."""

from dataclasses import dataclass
from typing import Literal

from mhla_gen.config.fields import Finite, Positive, Settings


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig(Settings, prefix="objective."):
    """What the model learns to predict, and at which noise levels.

    Raises:
        ValueError: If a value is out of its range.
    """

    name: Literal["flow_matching", "ddpm"] = "flow_matching"
    """flow_matching: the velocity on the straight path from sample to noise. ddpm: the noise, as
    DiT was trained, with 1000 timesteps and linear betas."""
    logit_mean: Finite = 0.0
    """flow_matching: mean of the logit of the noise level σ; above 0 means more noise."""
    logit_std: Positive = 1.0
    """flow_matching: standard deviation of the logit of σ."""
    shift: Positive = 1.0
    """flow_matching: moves σ to s σ / (1 + (s − 1) σ), as diffusers' schedulers do in sampling:
    larger images need more noise to lose the same detail."""
    prediction: Literal["epsilon", "v_prediction"] = "epsilon"
    """ddpm: what the model predicts."""
    learned_variance: bool = True
    """ddpm: learn the variance too, by the variational bound; doubles the output channels."""
    min_snr_gamma: Positive | None = None
    """Weigh losses by min(SNR, γ), measured on the predicted sample; 5 is usual. None applies no
    weights to the loss of the prediction."""
