"""Fréchet distance between two feature distributions: features → statistics → number."""

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mhla_gen.evaluation.errors import EvaluationError

# PyTorch states no types for its functions.
_linalg: Any = torch.linalg


class FewSamplesWarning(UserWarning):
    """No more samples than dimensions, or hardly more: the distance is mostly bias of the size."""


@dataclass(frozen=True)
class FeatureStatistics:
    """Mean and unbiased covariance of a set of features, in float64.

    Raises:
        EvaluationError: If the shapes do not belong together or a value is not finite.
    """

    mean: np.ndarray
    """[dim]."""
    covariance: np.ndarray
    """[dim, dim]; divided by count - 1."""
    count: int | None
    """Samples behind the two; None if a file does not say."""

    def __post_init__(self):
        # Copies: arrays from a file may be read-only maps, which PyTorch does not take.
        object.__setattr__(self, "mean", np.array(self.mean, dtype=np.float64))
        object.__setattr__(self, "covariance", np.array(self.covariance, dtype=np.float64))
        dim = self.mean.size
        if self.mean.shape != (dim,) or self.covariance.shape != (dim, dim):
            raise EvaluationError(
                "statistics need a mean [dim] and a covariance [dim, dim], found "
                f"{list(self.mean.shape)} and {list(self.covariance.shape)}"
            )
        if not (np.isfinite(self.mean).all() and np.isfinite(self.covariance).all()):
            raise EvaluationError("statistics contain NaN or infinite values; rebuild them")

    @property
    def dim(self) -> int:
        """Number of feature dimensions."""
        return self.mean.size

    @cached_property
    def factor(self) -> Tensor:
        """L [dim, rank], float64, with L Lᵀ = covariance; kept, for it is most of the work."""
        covariance = torch.as_tensor(self.covariance, device="cpu")
        if self.count is None or self.count > self.dim:
            lower, failed = _linalg.cholesky_ex(covariance)
            if not failed:
                return lower
        # Singular. Eigenvalues of directions that no sample spans are rounding noise: n samples
        # span n - 1 of them; without a count, the usual threshold of a numerical rank decides.
        values, vectors = _linalg.eigh(covariance)
        noise = values[-1].clamp_min(0) * self.dim * torch.finfo(torch.float64).eps
        keep = values > noise
        if self.count is not None:
            keep[: max(self.dim - self.count + 1, 0)] = False
        return vectors[:, keep] * values[keep].sqrt()

    @classmethod
    def from_features(cls, features: Tensor | np.ndarray) -> "FeatureStatistics":
        """Statistics of features [count, dim] that fit in memory."""
        features = as_features(features)
        return FeatureSums(features.shape[1]).add(features).statistics()


class FeatureSums:
    """Float64 sums over features: streams, and gives `FeatureStatistics`.

    Args:
        dim: Feature dimensions.
        shift: Point [dim] that sums are taken relative to, so that a large mean costs no digits; by
            default the first sample seen.
    """

    def __init__(self, dim: int, shift: Tensor | None = None):
        self.dim = dim
        self.shift = shift
        self.count = 0
        self.sum = torch.zeros(dim, dtype=torch.float64)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64)

    def add(self, features: Tensor | np.ndarray) -> "FeatureSums":
        """Add features [count, dim]; returns itself."""
        features = as_features(features).detach().to("cpu", torch.float64)
        if features.shape[1] != self.dim:
            raise EvaluationError(
                f"expected features of {self.dim} dimensions, found {features.shape[1]}"
            )
        if not len(features):
            return self
        if self.shift is None:
            self.shift = features[0].clone()
        centred = features - self.shift
        self.count += len(features)
        self.sum += centred.sum(dim=0)
        self.outer.addmm_(centred.T, centred)
        return self

    def without(self, part: "FeatureSums") -> "FeatureSums":
        """These sums less those of a part of the features, taken relative to the same point."""
        assert self.shift is part.shift
        rest = FeatureSums(self.dim, self.shift)
        rest.count = self.count - part.count
        rest.sum, rest.outer = self.sum - part.sum, self.outer - part.outer
        return rest

    def statistics(self) -> FeatureStatistics:
        """The statistics so far.

        Raises:
            EvaluationError: With fewer than two samples, which have no covariance.
        """
        return statistics_from_sums(self.count, self.sum, self.outer, self.shift)


def statistics_from_sums(
    count: int, total: Tensor, outer: Tensor, shift: Tensor | None = None
) -> FeatureStatistics:
    """Statistics from sums over features relative to `shift`.

    Args:
        count: Samples.
        total: Sum, float64 [dim].
        outer: Sum of outer products, float64 [dim, dim].
        shift: [dim]; None is the origin.

    Raises:
        EvaluationError: With fewer than two samples, which have no covariance.
    """
    if count < 2:
        raise EvaluationError(
            f"a covariance needs at least 2 samples, found {count}; evaluate more images"
        )
    mean = total / count
    covariance = (outer - count * torch.outer(mean, mean)) / (count - 1)
    mean = mean if shift is None else mean + shift
    return FeatureStatistics(mean.cpu().numpy(), covariance.cpu().numpy(), count)


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    r"""Squared 2-Wasserstein distance of the Gaussians with these statistics.

    $$d = |\mu_a - \mu_b|^2 + \mathrm{tr}\,A + \mathrm{tr}\,B - 2\,\|L_a^\top L_b\|_*,$$
    where $A = L_a L_a^\top$, $B = L_b L_b^\top$ and $\|\cdot\|_*$ sums singular values: the
    eigenvalues of $AB$ are the squared singular values of $L_a^\top L_b$. No matrix square root is
    taken, and singular values keep the digits that square roots of eigenvalues lose, so the number
    is exact with fewer samples than dimensions too.

    Args:
        a: Statistics of one set.
        b: Statistics of the other.

    Returns:
        The distance, at least 0; that of equal sets is 0.

    Raises:
        EvaluationError: If dimensions differ.

    Warns:
        FewSamplesWarning: If a set has fewer samples than dimensions.

    Source:
        Dowson and Landau 1982, "The Fréchet distance between multivariate normal distributions";
        Heusel et al. 2017, arXiv:1706.08500, for its use on Inception features.
    """
    if a.dim != b.dim:
        raise EvaluationError(
            f"expected statistics of the same dimensions, found {a.dim} and {b.dim}; "
            "use one extractor for both"
        )
    for statistics in (a, b):
        if statistics.count is not None and statistics.count <= statistics.dim:
            warn_of_few_samples(statistics.count, statistics.dim)
    cross = a.factor.T @ b.factor
    mean_term = float(((a.mean - b.mean) ** 2).sum())
    traces = float(np.trace(a.covariance) + np.trace(b.covariance))
    distance = mean_term + traces - 2 * float(_linalg.svdvals(cross).sum())
    # Less than the rounding of the sums that are subtracted, also of either sign, is nothing.
    return distance if distance > traces * a.dim * torch.finfo(torch.float64).eps else 0.0


def warn_of_few_samples(count: int, dim: int) -> None:
    """Warn that a distance is mostly bias, for its caller's caller."""
    warnings.warn(
        f"{count} samples for {dim} dimensions: the distance is exact for these samples but far "
        "above that of a large set; use more samples",
        FewSamplesWarning,
        stacklevel=3,
    )


def as_features(features: Tensor | np.ndarray) -> Tensor:
    """Check features [count, dim] and return them as a tensor.

    Raises:
        EvaluationError: If there are not two axes, or a value is NaN or infinite.
    """
    tensor = torch.as_tensor(features)
    if tensor.ndim != 2:
        raise EvaluationError(f"features must be [count, dim], found shape {list(tensor.shape)}")
    finite = torch.isfinite(tensor).all(dim=1)
    if not finite.all():
        bad = torch.nonzero(~finite).flatten()
        raise EvaluationError(
            f"{len(bad)} of {len(tensor)} features are NaN or infinite (first: sample "
            f"{int(bad[0])}); check the images and the extractor's weights"
        )
    return tensor
