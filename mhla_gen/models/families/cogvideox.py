"""MHLA for diffusers' CogVideoX: text and image to video."""

from typing import Any

from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel

from mhla_gen.models.family import patch_grid
from mhla_gen.models.joint import JointFamily, JointMHLAProcessor
from mhla_gen.models.processors import DropsGrid
from mhla_gen.models.transformer import FusesSelfAttention


class SoftmaxCogVideoXAttnProcessor(DropsGrid, CogVideoXAttnProcessor2_0):
    """Stock attention for the softmax layers of a hybrid."""


class CogVideoXFamily(JointFamily):
    """CogVideoX: grids of frames, height and width; text and video share their projections."""

    base_class = CogVideoXTransformer3DModel
    rank = 3
    layers = ("transformer_blocks.*.attn1",)
    text_length = 226
    stock_processor = CogVideoXAttnProcessor2_0
    mhla_processor = JointMHLAProcessor
    unconverted_processor = SoftmaxCogVideoXAttnProcessor

    def native_grid(self, model: Any) -> tuple[int, ...]:
        """Patches along each axis at the model's own size."""
        config = model.config
        frames = (config.sample_frames - 1) // config.temporal_compression_ratio + 1
        return patch_grid((frames, config.sample_height, config.sample_width), _patches(model))

    def arguments(self, model: Any, given: dict[str, Any]) -> dict[str, Any]:
        """The grid is passed with the layers' own arguments."""
        _, frames, _, height, width = given["hidden_states"].shape
        grid = patch_grid((frames, height, width), _patches(model))
        own = given.get("attention_kwargs") or {}
        return given | {"attention_kwargs": {**own, "grid": grid}}


def _patches(model: Any) -> tuple[int, int, int]:
    patch = model.config.patch_size
    return model.config.patch_size_t or 1, patch, patch


class MHLACogVideoXTransformer3DModel(FusesSelfAttention, CogVideoXTransformer3DModel):
    """`CogVideoXTransformer3DModel` with MHLA layers.

    Takes the arguments of its base class and `mhla`, an `MHLAConfig` or a dict of its values.
    """

    family = CogVideoXFamily()
    _repeated_blocks = ["CogVideoXBlock"]  # noqa: RUF012
