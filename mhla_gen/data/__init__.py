"""Images, clips and latents to train on, and the order in which training reads them.

Names are imported on first use: settings are checked without torch.
"""

from typing import TYPE_CHECKING

from mhla_gen.lazy import names_from

if TYPE_CHECKING:
    from mhla_gen.data.arrays import ArrayImages
    from mhla_gen.data.batch_order import BatchOrder, batches, derived_seed
    from mhla_gen.data.images import EncodedImages
    from mhla_gen.data.opening import load_data, open_images
    from mhla_gen.data.protocol import Batch, TrainingData

_HOMES = {
    "ArrayImages": "arrays",
    "Batch": "protocol",
    "BatchOrder": "batch_order",
    "EncodedImages": "images",
    "TrainingData": "protocol",
    "batches": "batch_order",
    "derived_seed": "batch_order",
    "load_data": "opening",
    "open_images": "opening",
}

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

__getattr__ = names_from(__name__, _HOMES)
