"""Inception score, kernel distance, precision and recall: features → number."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mhla_gen.evaluation.errors import EvaluationError
from mhla_gen.evaluation.frechet import as_features

# Rows of a distance matrix held at once: 1,024 × 50,000 float64 take 0.4 GB.
_TILE = 1024


@dataclass(frozen=True)
class KernelDistanceEstimate:
    """KID: mean over random subsets, and their standard deviation."""

    mean: float
    std: float
    """Of one subset's value, not of the mean: the spread that other tools print."""
    subsets: int
    subset_size: int


def inception_score(logits: Tensor, split_size: int = 5000) -> tuple[float, float]:
    r"""Inception score as in ADM: consecutive splits in order, without shuffling.

    $\exp \frac1N \sum_i \mathrm{KL}(p(y|x_i) \,\|\, p(y))$ for each split, then the mean. A last,
    shorter split counts as much as the others.

    Args:
        logits: [count, classes], without the bias of the classifier.
        split_size: Images per split.

    Returns:
        Mean and standard deviation over the splits.

    Source:
        Salimans et al. 2016, arXiv:1606.03498, Section 4; order and splits of the evaluator of
        Dhariwal and Nichol 2021, arXiv:2105.05233.
    """
    scores: list[float] = []
    for split in torch.split(as_features(logits).double(), split_size):
        log_p = split.log_softmax(dim=1)
        log_marginal = log_p.logsumexp(dim=0) - np.log(len(split))
        divergence = (log_p.exp() * (log_p - log_marginal)).sum(dim=1)
        scores.append(divergence.mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


def kernel_distance(
    samples: Tensor,
    reference: Tensor,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 2020,
) -> KernelDistanceEstimate:
    r"""Squared maximum mean discrepancy with the kernel $(x \cdot y / \mathrm{dim} + 1)^3$.

    The unbiased estimate on random subsets drawn without replacement; it can be negative.

    Args:
        samples: Features [count, dim].
        reference: Features [count, dim].
        subsets: How many subsets.
        subset_size: Features per subset and side.
        seed: Fixes the subsets; with torch-fidelity's 2020 they are the ones it draws.

    Raises:
        EvaluationError: If a side has fewer features than a subset needs, or dimensions differ.

    Source:
        Bińkowski et al. 2018, arXiv:1801.01401, Eq. (4) and Section 4.
    """
    samples, reference = _same_dims(samples, reference)
    for name, features in (("samples", samples), ("reference", reference)):
        if len(features) < subset_size:
            raise EvaluationError(
                f"KID draws subsets of {subset_size} but the {name} hold {len(features)} images; "
                "lower kid_subset_size"
            )
    draw = np.random.RandomState(seed)

    def subset(features: Tensor) -> Tensor:
        chosen = draw.choice(len(features), subset_size, replace=False)
        return features[torch.as_tensor(chosen, device="cpu")].double()

    values = [_mmd2(subset(samples), subset(reference)) for _ in range(subsets)]
    return KernelDistanceEstimate(
        float(np.mean(values)), float(np.std(values)), subsets, subset_size
    )


def _mmd2(x: Tensor, y: Tensor) -> float:
    n, dim = x.shape

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / dim + 1) ** 3

    def off_diagonal_mean(square: Tensor) -> Tensor:
        return (square.sum() - square.trace()) / (n * (n - 1))

    within = off_diagonal_mean(kernel(x, x)) + off_diagonal_mean(kernel(y, y))
    return (within - 2 * kernel(x, y).mean()).item()


def precision_recall(
    samples: Tensor, reference: Tensor, neighbours: int = 3, device: str | torch.device = "cpu"
) -> tuple[float, float]:
    """Share of samples inside the reference's manifold, and the reverse.

    A manifold is the union of balls around its members, each reaching to the member's k-th nearest
    other member. Distances are float64; ADM rounds features to float16 first.

    Args:
        samples: Features [count, dim].
        reference: Features [count, dim]; ADM takes the 10,000 images in its reference file.
        neighbours: k.
        device: Where distances are computed.

    Returns:
        Precision and recall, each in [0, 1].

    Raises:
        EvaluationError: If a side has k features or fewer, or dimensions differ.

    Source:
        Kynkäänniemi et al. 2019, arXiv:1904.06991, Eq. (1) and (2).
    """
    samples, reference = _same_dims(samples, reference)
    for name, features in (("samples", samples), ("reference", reference)):
        if len(features) <= neighbours:
            raise EvaluationError(
                f"precision and recall with k = {neighbours} need more than {neighbours} images, "
                f"the {name} hold {len(features)}"
            )
    # Distances do not change with the origin, and near the data they lose fewer digits.
    centre = reference.double().mean(dim=0)
    samples, reference = ((x.double() - centre).to(device) for x in (samples, reference))
    precision = _share_inside(samples, reference, _radii(reference, neighbours))
    recall = _share_inside(reference, samples, _radii(samples, neighbours))
    return precision, recall


def _radii(features: Tensor, neighbours: int) -> Tensor:
    # The nearest member of all is the member itself, at distance 0.
    return _by_tile(
        features, features, lambda square: square.kthvalue(neighbours + 1, dim=1).values
    )


def _share_inside(points: Tensor, centres: Tensor, radii: Tensor) -> float:
    inside = _by_tile(points, centres, lambda square: (square <= radii).any(dim=1))
    return inside.double().mean().item()


def _by_tile(rows: Tensor, columns: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    norms = columns.square().sum(dim=1)
    parts: list[Tensor] = []
    for tile in torch.split(rows, _TILE):
        square = tile.square().sum(dim=1, keepdim=True) + norms - 2 * tile @ columns.T
        parts.append(reduce(square))
    return torch.cat(parts)


def _same_dims(samples: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    samples, reference = as_features(samples), as_features(reference)
    if samples.shape[1] != reference.shape[1]:
        raise EvaluationError(
            f"samples have {samples.shape[1]} feature dimensions, the reference "
            f"{reference.shape[1]}; use one extractor for both"
        )
    return samples, reference
