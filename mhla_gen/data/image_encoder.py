"""First frames to embeddings, as diffusers' image-to-video pipeline of Wan 2.1 makes them."""

from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mhla_gen.config import ImageEncoderConfig
from mhla_gen.errors import UserError
from mhla_gen.files.digests import settings_digest, weights_digest
from mhla_gen.files.saved import naming_damage
from mhla_gen.hub import locate, pipeline_index

IMAGE_ENCODERS = ("CLIPVisionModel", "CLIPVisionModelWithProjection")


class ImageEncoder(NamedTuple):
    """A CLIP encoder with its image processor."""

    model: Any
    processor: Any

    @torch.inference_mode()
    def embed(self, frame: np.ndarray) -> Tensor:
        """The embedding of uint8 `[height, width, 3]`: `[1, tokens, image_dim]`, on the CPU.

        Source:
            diffusers 0.42, `WanImageToVideoPipeline.encode_image`.
        """
        # An array is taken for what the processor guesses; a picture is what users give.
        inputs = self.processor(images=Image.fromarray(frame), return_tensors="pt")
        found = self.model(**inputs.to(self.model.device), output_hidden_states=True)
        return found.hidden_states[-2].cpu()


def has_image_encoder(path: str) -> bool:
    """Whether a folder or a name on the hub is a pipeline that has an encoder of images."""
    return any(pipeline_index(path).get("image_encoder") or ())


def load_image_encoder(config: ImageEncoderConfig) -> ImageEncoder:
    """The encoder and image processor of a pipeline.

    Raises:
        FileNotFoundError: If there is nothing.
        ValueError: If it is no pipeline, or its encoder is of another kind.
    """
    import transformers

    path = locate(str(config.path))
    if not has_image_encoder(path):
        raise UserError(
            f"image_encoder.path {path} must be a pipeline with the folders image_encoder and "
            "image_processor, such as Wan 2.1's for image to video"
        )
    parts = pipeline_index(path)
    name = parts["image_encoder"][1]
    if name not in IMAGE_ENCODERS:
        raise UserError(
            f"image_encoder.path {path} has a {name}; supported are {', '.join(IMAGE_ENCODERS)}"
        )
    dtype = getattr(torch, config.dtype)
    try:
        with naming_damage(path):
            model = getattr(transformers, name).from_pretrained(
                path, subfolder="image_encoder", dtype=dtype
            )
        kind = getattr(transformers, parts["image_processor"][1])
        processor = kind.from_pretrained(path, subfolder="image_processor")
    except (OSError, KeyError, TypeError) as error:
        line = str(error).splitlines()[0]
        raise UserError(
            f"image_encoder.path {path} has no image_encoder and image_processor: {line}"
        ) from error
    return ImageEncoder(model.eval().requires_grad_(False), processor)


def identity(encoder: ImageEncoder, config: ImageEncoderConfig) -> dict[str, Any]:
    """What determines the embedding of a frame; plain values for a fingerprint."""
    return {
        "class": type(encoder.model).__name__,
        "weights": weights_digest(encoder.model, getattr(torch, config.dtype))[:32],
        "processor": settings_digest(encoder.processor.to_dict())[:32],
        "dtype": config.dtype,
    }
