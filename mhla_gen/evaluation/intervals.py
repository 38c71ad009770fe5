"""95 % intervals: how far a distance would move with other samples of the same kind."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import stats  # pyright: ignore[reportMissingTypeStubs]
from torch import Tensor

from mhla_gen.evaluation.errors import EvaluationError
from mhla_gen.evaluation.frechet import (
    FeatureStatistics,
    FeatureSums,
    FewSamplesWarning,
    warn_of_few_samples,
)
from mhla_gen.evaluation.scores import KernelDistanceEstimate

# SciPy states no types.
_student: Any = stats.t


@dataclass(frozen=True)
class Interval:
    """Ends of a 95 % interval, and how it was made."""

    low: float
    high: float
    method: str


def jackknife_interval(
    features: Tensor,
    distance: Callable[[FeatureStatistics], float],
    groups: int = 10,
    seed: int = 0,
) -> tuple[float, Interval]:
    r"""A distance of these features, and its interval by the delete-a-group jackknife.

    The features are dealt at random into $g$ groups; $d_j$ is the distance without group $j$. The
    variance is $\frac{g-1}{g} \sum_j (d_j - \bar d)^2$ and the interval Student's, with $g - 1$
    degrees of freedom. The other side of the distance is held fixed, and the bias of a small set is
    not removed: the interval is about the distance *at this number of samples*.

    Args:
        features: [count, dim].
        distance: From statistics to a number.
        groups: How many groups; more take longer, one distance each.
        seed: Fixes the groups.

    Returns:
        The distance of all features, and the interval.

    Raises:
        EvaluationError: If there are fewer than two features a group.

    Warns:
        FewSamplesWarning: If there are fewer features than dimensions, or would be without a group.

    Source:
        Wolter 2007, "Introduction to Variance Estimation", Section 4.2.
    """
    if len(features) < 2 * groups:
        raise EvaluationError(
            f"a jackknife over {groups} groups needs at least {2 * groups} images, found "
            f"{len(features)}; evaluate more images or lower jackknife_groups"
        )
    order = np.random.default_rng(seed).permutation(len(features))
    shift = features.double().mean(dim=0)
    count, dim = features.shape
    whole = FeatureSums(dim, shift).add(features)
    value = distance(whole.statistics())
    without: list[float] = []
    with warnings.catch_warnings():
        # The user has as many samples as the whole set has.
        warnings.simplefilter("ignore", FewSamplesWarning)
        for index in torch.as_tensor(order, device="cpu").tensor_split(groups):
            part = FeatureSums(dim, shift).add(features[index])
            without.append(distance(whole.without(part).statistics()))
    if count - -(-count // groups) <= dim < count:
        warn_of_few_samples(count, dim)
    error = float(np.sqrt((groups - 1) * np.var(without)))
    reach = float(_student.ppf(0.975, groups - 1)) * error
    return value, Interval(value - reach, value + reach, f"jackknife-{groups}")


def subsampling_interval(distance: KernelDistanceEstimate, count: int) -> Interval | None:
    r"""Interval of a kernel distance from the spread of its subsets.

    Subsets are drawn of both sides, so the interval is that of other samples and another reference
    of the same numbers: wider than one for which the reference is held fixed.

    A subset of $m$ out of $N$, drawn without replacement, varies $N/m - 1$ times as much as the
    whole set does.

    Args:
        distance: The subsets' mean and spread.
        count: Images of the smaller side, N.

    Returns:
        The interval, or None if the subsets are the whole set and so do not vary.

    Source:
        Politis, Romano and Wolf 1999, "Subsampling", Section 2; the finite-population factor is
        Cochran's.
    """
    size = distance.subset_size
    if count <= size:
        return None
    reach = 1.96 * distance.std * (size / (count - size)) ** 0.5
    return Interval(distance.mean - reach, distance.mean + reach, f"subsampling-{size}")
