"""Sampling: sets of samples of classes and prompts on disk.

Names are imported on first use: settings are checked without torch.
"""

from typing import TYPE_CHECKING

from mhla_gen.lazy import names_from

if TYPE_CHECKING:
    from mhla_gen.sampling.labels import class_labels
    from mhla_gen.sampling.sample_set import generate
    from mhla_gen.sampling.sampling import sample

_HOMES = {
    "class_labels": "labels",
    "generate": "sample_set",
    "sample": "sampling",
}

__all__ = ["class_labels", "generate", "sample"]

__getattr__ = names_from(__name__, _HOMES)
