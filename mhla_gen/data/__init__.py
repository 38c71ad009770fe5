"""Labelled images, and the order in which training reads them."""

from mhla_gen.data.batches import BatchOrder, batches, derived_seed
from mhla_gen.data.datasets import ArrayImages, FolderImages, LabelledImages, load_images

__all__ = [
    "ArrayImages",
    "BatchOrder",
    "FolderImages",
    "LabelledImages",
    "batches",
    "derived_seed",
    "load_images",
]
