"""Class-conditional sampling: the pipeline, and sample sets on disk."""

from mhla_gen.sampling.contact_sheet import contact_sheet
from mhla_gen.sampling.pipeline import ClassConditionalPipeline
from mhla_gen.sampling.sample_set import class_labels, generate, sample, write_sample_set

__all__ = [
    "ClassConditionalPipeline",
    "class_labels",
    "contact_sheet",
    "generate",
    "sample",
    "write_sample_set",
]
