"""The same numbers as `torchmetrics.Metric`s: for a training loop, on any number of processes.

Not torchmetrics' own, which shuffle images for the Inception score, draw other subsets for KID than
torch-fidelity, and take the eigenvalues of a product, which lose digits with few samples.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from mhla_gen.evaluation.errors import EvaluationError
from mhla_gen.evaluation.extractor import Extractor
from mhla_gen.evaluation.frechet import (
    FeatureStatistics,
    as_features,
    frechet_distance,
    statistics_from_sums,
)
from mhla_gen.evaluation.scores import inception_score, kernel_distance, precision_recall


def _add_state(
    metric: Metric, name: str, default: Tensor | list[Tensor], reduction: Literal["sum", "cat"]
) -> None:
    # Its parameters lack element types.
    metric.add_state(name, default, reduction)  # pyright: ignore[reportUnknownMemberType]


def _features(images: Tensor, extractor: Extractor | None, name: str) -> Tensor:
    return as_features(images if extractor is None else extractor(images)[name])


class FrechetDistance(Metric):
    """Fréchet distance from float64 sums, which stream, merge and synchronise exactly.

    With an `InceptionExtractor`, feature pool is FID and spatial is sFID.

    Args:
        extractor: Network for `update`; None if `update` is given features.
        feature: Which of its features.
        dim: Feature dimensions; needed without an extractor, and with one of pixels.
        reference: Statistics of the real images, if they are known; then all updates are samples.
        keep_reference: Keep the real images' sums at `reset`.

    Raises:
        EvaluationError: If the dimensions are not known.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    samples_count: Tensor
    samples_sum: Tensor
    samples_outer: Tensor
    real_count: Tensor
    real_sum: Tensor
    real_outer: Tensor

    def __init__(
        self,
        extractor: Extractor | None = None,
        feature: str = "pool",
        *,
        dim: int | None = None,
        reference: FeatureStatistics | None = None,
        keep_reference: bool = True,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        dim = dim or (extractor.dims[feature] if extractor else None)
        if not dim:
            raise EvaluationError("FrechetDistance needs an extractor, or dim for features")
        if reference is not None and reference.dim != dim:
            raise EvaluationError(
                f"expected a reference of {dim} dimensions, found {reference.dim}"
            )
        self.extractor, self.feature = extractor, feature
        self.reference, self.keep_reference = reference, keep_reference
        for side in ("samples", "real"):
            zeros = torch.zeros(dim, dtype=torch.float64)
            _add_state(self, f"{side}_count", torch.tensor(0), "sum")
            _add_state(self, f"{side}_sum", zeros, "sum")
            _add_state(self, f"{side}_outer", torch.outer(zeros, zeros), "sum")

    def update(self, images: Tensor, real: bool = False) -> None:
        """Add a batch.

        Args:
            images: uint8 [batch, 3, height, width]; without an extractor, features [batch, dim].
            real: Whether it belongs to the reference.
        """
        if real and self.reference is not None:
            raise EvaluationError("this metric has a fixed reference; update it with samples only")
        features = _features(images, self.extractor, self.feature).double()
        total, outer = features.sum(dim=0), features.T @ features
        if real:
            self.real_count += len(features)
            self.real_sum += total
            self.real_outer += outer
        else:
            self.samples_count += len(features)
            self.samples_sum += total
            self.samples_outer += outer

    def statistics(self, real: bool = False) -> FeatureStatistics:
        """Mean and covariance of one side so far."""
        if real and self.reference is not None:
            return self.reference
        if real:
            return statistics_from_sums(int(self.real_count), self.real_sum, self.real_outer)
        return statistics_from_sums(int(self.samples_count), self.samples_sum, self.samples_outer)

    def compute(self) -> Tensor:
        """The distance, float64 []."""
        value = frechet_distance(self.statistics(), self.statistics(real=True))
        return torch.tensor(value, dtype=torch.float64, device=self.samples_sum.device)

    def reset(self) -> None:
        """Forget the samples, and the real images unless they are kept."""
        kept = (self.real_count, self.real_sum, self.real_outer)
        super().reset()
        if self.keep_reference:
            self.real_count, self.real_sum, self.real_outer = kept


class InceptionScore(Metric):
    """Inception score over consecutive splits in the order of updates.

    Over several processes the order is all of the first process, then all of the second, and so on.

    Args:
        extractor: Network for `update`; None if `update` is given logits.
        split_size: Images per split.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    logits: list[Tensor]

    def __init__(
        self, extractor: Extractor | None = None, *, split_size: int = 5000, **kwargs: Any
    ):
        super().__init__(**kwargs)
        self.extractor, self.split_size = extractor, split_size
        _add_state(self, "logits", [], "cat")

    def update(self, images: Tensor) -> None:
        """Add a batch of uint8 images, or of logits [batch, classes] without an extractor."""
        self.logits.append(_features(images, self.extractor, "logits"))

    def compute(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation over the splits."""
        mean, spread = inception_score(dim_zero_cat(self.logits), self.split_size)
        return torch.tensor(mean), torch.tensor(spread)


class _FeatureBank(Metric):
    """Keeps the features of both sides, gathered over processes."""

    is_differentiable = False
    full_state_update = False

    samples: list[Tensor]
    real: list[Tensor]

    def __init__(self, extractor: Extractor | None = None, feature: str = "pool", **kwargs: Any):
        super().__init__(**kwargs)
        self.extractor, self.feature = extractor, feature
        _add_state(self, "samples", [], "cat")
        _add_state(self, "real", [], "cat")

    def update(self, images: Tensor, real: bool = False) -> None:
        """Add a batch of uint8 images, or of features without an extractor."""
        side = self.real if real else self.samples
        side.append(_features(images, self.extractor, self.feature))


class KernelDistance(_FeatureBank):
    """KID, see `mhla_gen.evaluation.scores.kernel_distance`."""

    higher_is_better = False

    def __init__(
        self,
        extractor: Extractor | None = None,
        feature: str = "pool",
        *,
        subsets: int = 100,
        subset_size: int = 1000,
        seed: int = 2020,
        **kwargs: Any,
    ):
        super().__init__(extractor, feature, **kwargs)
        self.subsets, self.subset_size, self.seed = subsets, subset_size, seed

    def compute(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation over the subsets."""
        found = kernel_distance(
            dim_zero_cat(self.samples).cpu(),
            dim_zero_cat(self.real).cpu(),
            self.subsets,
            self.subset_size,
            self.seed,
        )
        return torch.tensor(found.mean), torch.tensor(found.std)


class PrecisionRecall(_FeatureBank):
    """Precision and recall, see `mhla_gen.evaluation.scores.precision_recall`."""

    higher_is_better = True

    def __init__(
        self,
        extractor: Extractor | None = None,
        feature: str = "pool",
        *,
        neighbours: int = 3,
        **kwargs: Any,
    ):
        super().__init__(extractor, feature, **kwargs)
        self.neighbours = neighbours

    def compute(self) -> tuple[Tensor, Tensor]:
        """Precision and recall."""
        samples, real = dim_zero_cat(self.samples), dim_zero_cat(self.real)
        precision, recall = precision_recall(samples, real, self.neighbours, samples.device)
        return torch.tensor(precision), torch.tensor(recall)
