"""Sampling: the class-conditional pipeline, and sample sets of classes and prompts on disk."""

from mhla_gen.pipelines.class_conditional import ClassConditionalPipeline
from mhla_gen.pipelines.guidance import Guidance
from mhla_gen.sampling.classes import class_labels
from mhla_gen.sampling.contact_sheet import contact_sheet
from mhla_gen.sampling.sample_set import generate
from mhla_gen.sampling.sampling import sample

__all__ = [
    "ClassConditionalPipeline",
    "Guidance",
    "class_labels",
    "contact_sheet",
    "generate",
    "sample",
]
