"""MHLA for diffusers' Qwen-Image: text-to-image, any aspect ratio."""

from typing import Any

from diffusers.models.transformers.transformer_qwenimage import (
    QwenDoubleStreamAttnProcessor2_0,
    QwenImageTransformer2DModel,
)

from mhla_gen.errors import UserError
from mhla_gen.models.joint import JointFamily, JointMHLAProcessor
from mhla_gen.models.processors import DropsGrid, Rotary
from mhla_gen.models.transformer import MHLATransformerMixin


class SoftmaxQwenImageAttnProcessor(DropsGrid, QwenDoubleStreamAttnProcessor2_0):
    """Stock attention for the softmax layers of a hybrid."""


class MHLAQwenImageAttnProcessor(JointMHLAProcessor):
    """MHLA of an `Attention` layer with a mask of its text."""

    takes_mask = True

    def rotary(self, attn: Any, tables: Any, num_image: int) -> tuple[Rotary, Rotary]:
        """From complex tables `[length, head_dim / 2]` of image and text."""
        image, text = tables
        return (image.real, image.imag), (text.real, text.imag)


class QwenImageFamily(JointFamily):
    """Qwen-Image: image grids packed in a sequence; rotary embedding of text and image."""

    base_class = QwenImageTransformer2DModel
    rank = 2
    layers = ("transformer_blocks.*.attn",)
    # 1024×1024 after the VAE (8×8) and packing (2×2).
    native = (64, 64)
    text_length = 512
    stock_processor = QwenDoubleStreamAttnProcessor2_0
    mhla_processor = MHLAQwenImageAttnProcessor
    unconverted_processor = SoftmaxQwenImageAttnProcessor

    def arguments(self, model: Any, given: dict[str, Any]) -> dict[str, Any]:
        """The grid is passed with the layers' own arguments.

        Raises:
            ValueError: If a sequence has several images or frames.
        """
        shapes = given["img_shapes"]
        sizes = {tuple(shape) for item in shapes for shape in _images(item)}
        if any(len(_images(item)) != 1 for item in shapes) or len(sizes) != 1:
            raise UserError(
                "MHLA layers take one image per sequence, the same size for all of a batch; "
                f"found img_shapes={shapes}"
            )
        frames, height, width = sizes.pop()
        if frames != 1:
            raise UserError(f"MHLA layers of Qwen-Image take one frame, found img_shapes={shapes}")
        own = given.get("attention_kwargs") or {}
        return given | {"attention_kwargs": {**own, "grid": (height, width)}}


def _images(item: Any) -> list[Any]:
    return item if isinstance(item, list) else [item]


class MHLAQwenImageTransformer2DModel(MHLATransformerMixin, QwenImageTransformer2DModel):
    """`QwenImageTransformer2DModel` with MHLA layers.

    Takes the arguments of its base class and `mhla`, an `MHLAConfig` or a dict of its values.
    """

    family = QwenImageFamily()
