"""Images, clips and latents to train on, and the order in which training reads them."""

from mhla_gen.data.batches import BatchOrder, batches, derived_seed
from mhla_gen.data.images import ArrayImages, EncodedImages
from mhla_gen.data.opening import load_data, open_images
from mhla_gen.data.protocol import Batch, TrainingData

__all__ = [
    "ArrayImages",
    "Batch",
    "BatchOrder",
    "EncodedImages",
    "TrainingData",
    "batches",
    "derived_seed",
    "load_data",
    "open_images",
]
