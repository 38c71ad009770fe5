"""Labelled images, and the order in which training reads them."""

from mhla_gen.data.batches import BatchOrder, batches, derived_seed
from mhla_gen.data.datasets import ArrayImages, FolderImages, load_images
from mhla_gen.data.protocol import Batch, TrainingData

__all__ = [
    "ArrayImages",
    "Batch",
    "BatchOrder",
    "FolderImages",
    "TrainingData",
    "batches",
    "derived_seed",
    "load_images",
]
